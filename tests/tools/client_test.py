"""Tests of the Python client against an in-process gRPC server that plays coordinator and decode node."""

import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent import futures
from pathlib import Path

try:
    import grpc
    from google.rpc import error_details_pb2, status_pb2
    from headwater import Client, HeadwaterError, PrefillOptions, PrefillResult, tls_credentials
    from headwater.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
    from headwater.v1 import types_pb2
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)


def make_status(code, reason, message, retry_after_s=None, **metadata):
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="headwater.v1", metadata=metadata))
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_after_s * 1000))
        status.details.add().Pack(retry)
    return status


def abort(context, code, reason, message, **kwargs):
    status = make_status(code, reason, message, **kwargs)
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(code, message)


class FakeService(prefill_pb2_grpc.PrefillServiceServicer, decode_pb2_grpc.DecodeServiceServicer,
                  admin_pb2_grpc.AdminServiceServicer):
    """Answers from the fields below; keeps every request that it got."""

    def __init__(self):
        self.address = ""
        self.requests = []
        self.metadata = {}  # of the last Prefill call
        self.refusals = []  # (code, reason, keyword arguments) for the next Prefill calls
        self.failure = None  # google.rpc.Status of a terminal event
        self.hang = False
        self.cancelled = threading.Event()

    def completed(self, request):
        return prefill_pb2.PrefillResponse(completed=prefill_pb2.PrefillCompleted(
            request_id=request.request_id, num_tokens=len(request.token_ids), decode_node="d0",
            decode_address=self.address, session_id=f"s-{request.request_id}", first_token=request.token_ids[0] + 1,
            top_logprobs=[types_pb2.TokenLogprob(token_id=7, logprob=-0.5)], tokens_per_second=10.0, density=0.25,
            kv_bytes=1 << 40, kv_blocks=6, kv_digest="ab", trace_id="0a" * 16, plan=types_pb2.PrefillPlan(
                world_size=2, partition=types_pb2.PARTITION_ZIGZAG, strategy=types_pb2.STRATEGY_SPARSE,
                worker_ids=["w0", "w1"]), exchange_bytes=5, exchange_bytes_allgather=9,
            stages=types_pb2.StageTimes(total={"seconds": 2, "nanos": 500_000_000})))

    def Prefill(self, request, context):
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.hang and not context.add_callback(self.cancelled.set):
            self.cancelled.set()  # ended before this line
        if self.refusals:
            code, reason, kwargs = self.refusals.pop(0)
            abort(context, code, reason, f"refused: {reason}", **kwargs)
        explanation = types_pb2.PlanExplanation(summary="2 workers", density=0.5, candidates=[
            types_pb2.PlanCandidate(world_size=2, partition=types_pb2.PARTITION_ZIGZAG, strategy=types_pb2.STRATEGY_RING,
                                    cost=types_pb2.PlanCost(linear_s=0.75, total_s=1.5), chosen=True, note="the least time"),
            types_pb2.PlanCandidate(world_size=1, note="no room")])
        yield prefill_pb2.PrefillResponse(accepted=prefill_pb2.PrefillAccepted(
            request_id=request.request_id, queue_position=3, explanation=explanation if request.explain else None))
        yield prefill_pb2.PrefillResponse(progress=prefill_pb2.PrefillProgress(
            request_id=request.request_id, layers_done=1, num_layers=30, bytes_acked=5, bytes_total=10))
        if self.hang:
            self.cancelled.wait(20)
        elif self.failure is not None:
            yield prefill_pb2.PrefillResponse(failed=prefill_pb2.PrefillFailed(
                request_id=request.request_id, error=self.failure))
        else:
            yield self.completed(request)

    def BatchPrefill(self, request, context):
        self.requests.append(request)
        for index in reversed(range(len(request.items))):
            item = request.items[index]
            if item.token_ids:
                yield prefill_pb2.BatchPrefillResponse(item=index, response=self.completed(item))
            else:
                error = make_status(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT", "no tokens")
                yield prefill_pb2.BatchPrefillResponse(item=index, response=prefill_pb2.PrefillResponse(
                    failed=prefill_pb2.PrefillFailed(error=error)))

    def SubmitPrefill(self, request, context):
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.refusals:
            code, reason, kwargs = self.refusals.pop(0)
            abort(context, code, reason, f"refused: {reason}", **kwargs)
        return prefill_pb2.SubmitPrefillResponse(request_id=request.request.request_id)

    def last_of(self, request):
        self.requests.append(request)
        if request.request_id == "unknown":
            return None
        if request.request_id == "waits":
            return prefill_pb2.PrefillResponse()
        if request.request_id == "runs":
            return prefill_pb2.PrefillResponse(progress=prefill_pb2.PrefillProgress(layers_done=3, num_layers=30))
        if self.failure is not None:
            return prefill_pb2.PrefillResponse(failed=prefill_pb2.PrefillFailed(error=self.failure))
        return self.completed(prefill_pb2.PrefillRequest(request_id=request.request_id, token_ids=[1, 2]))

    def WatchPrefill(self, request, context):
        last = self.last_of(request)
        if last is None:
            abort(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST", "no such request")
        yield prefill_pb2.WatchPrefillResponse(response=prefill_pb2.PrefillResponse(
            progress=prefill_pb2.PrefillProgress(layers_done=1, num_layers=30)))
        yield prefill_pb2.WatchPrefillResponse(response=last)

    def GetPrefill(self, request, context):
        last = self.last_of(request)
        if last is None:
            abort(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST", "no such request")
        return prefill_pb2.GetPrefillResponse(last=last)

    def CancelPrefill(self, request, context):
        if request.request_id == "gone":
            abort(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST", "no request gone")
        return prefill_pb2.CancelPrefillResponse(cancelled=(request.tenant, request.request_id) in (("", "runs"), ("acme", "theirs")))

    def Generate(self, request, context):
        self.requests.append(request)
        context.add_callback(self.cancelled.set)
        for index in range(request.max_new_tokens):
            last = index + 1 == request.max_new_tokens
            yield decode_pb2.GenerateResponse(
                token_id=100 + index, position=index, top2_logit_gap=0.5,
                finish_reason=decode_pb2.FINISH_REASON_LENGTH if last else decode_pb2.FINISH_REASON_UNSPECIFIED)

    def Release(self, request, context):
        return decode_pb2.ReleaseResponse(bytes_reclaimed=42 if request.session_id.startswith("s-") else 0)

    def ListWorkers(self, request, context):
        return admin_pb2.ListWorkersResponse(workers=[admin_pb2.WorkerSummary(worker_id="w0", device="cpu")])

    def ListDecodeNodes(self, request, context):
        return admin_pb2.ListDecodeNodesResponse(decode_nodes=[admin_pb2.DecodeNodeSummary(decode_node="d0")])


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.service = FakeService()
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.service, self.server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.service, self.server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self.service, self.server)
        self.service.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()
        self.client = Client(self.service.address, timeout_s=20)

    def tearDown(self):
        self.client.close()
        self.service.cancelled.set()
        self.server.stop(1).wait()

    def test_prefill_reports_progress_and_returns_every_field(self):
        seen = []

        result = self.client.prefill([5, 6, 7], request_id="r1", on_progress=seen.append)

        self.assertEqual([(p.queue_position, p.layers_done, p.num_layers, p.bytes_acked) for p in seen],
                         [(3, 0, 0, 0), (0, 1, 30, 5)])
        self.assertEqual((result.request_id, result.session_id, result.num_tokens, result.first_token), ("r1", "s-r1", 3, 6))
        self.assertEqual((result.kv_bytes, result.density, result.world_size, result.partition), (1 << 40, 0.25, 2, "zigzag"))
        self.assertEqual((result.strategy, result.exchange_bytes, result.exchange_bytes_allgather), ("sparse", 5, 9))
        self.assertEqual(result.worker_ids, ["w0", "w1"])
        self.assertEqual(result.top_logprobs, [(7, -0.5)])
        self.assertEqual(result.stages_s["total"], 2.5)

    def test_a_trace_goes_on_in_the_service(self):
        traceparent = f"00-{'0a' * 16}-{'0b' * 8}-01"
        result = self.client.prefill([5], traceparent=traceparent)
        self.assertEqual(self.service.metadata["traceparent"], traceparent)
        self.assertEqual(result.trace_id, "0a" * 16)
        self.client.prefill([5])
        self.assertNotIn("traceparent", self.service.metadata)

    def test_prefill_sends_its_options(self):
        options = PrefillOptions(model="m", priority=-3, deadline_s=1.5, policy="a_shape",
                                 policy_parameters={"sink_tokens": 64}, decode_pool="p", kv_dtype="f32",
                                 partition="striped", strategy="allgather", world_size=2)

        self.client.prefill([1], options=options)

        sent = self.service.requests[0]
        self.assertEqual((sent.model, sent.priority, sent.deadline.seconds, sent.deadline.nanos), ("m", -3, 1, 500_000_000))
        self.assertEqual((sent.policy.name, dict(sent.policy.parameters)), ("a_shape", {"sink_tokens": 64.0}))
        self.assertEqual((sent.WhichOneof("destination"), sent.decode_pool), ("decode_pool", "p"))
        self.assertEqual((sent.kv_dtype, sent.partition, sent.strategy),
                         (types_pb2.KV_DTYPE_F32, types_pb2.PARTITION_STRIPED, types_pb2.STRATEGY_ALLGATHER))

    def test_the_explanation_of_a_plan_comes_with_the_first_progress(self):
        seen = []

        self.client.prefill([1], options=PrefillOptions(explain=True), on_progress=seen.append)
        self.client.prefill([1], on_progress=seen.append)

        explained = seen[0].explanation
        self.assertEqual((explained.summary, explained.density), ("2 workers", 0.5))
        taken, other = explained.candidates
        self.assertEqual((taken.world_size, taken.partition, taken.strategy, taken.chosen), (2, "zigzag", "ring", True))
        self.assertEqual((taken.cost_s["linear"], taken.cost_s["total"], other.cost_s), (0.75, 1.5, None))
        self.assertIn("total 1.5 s: the least time", str(explained))
        self.assertEqual([progress.explanation for progress in seen[1:]], [None] * 3)

    def test_an_unset_option_leaves_its_field_unset(self):
        self.client.prefill([1])

        sent = self.service.requests[0]
        self.assertIsNone(sent.WhichOneof("destination"))
        self.assertFalse(sent.HasField("deadline") or sent.HasField("policy") or sent.HasField("quality"))

    def test_unavailable_is_retried_with_the_same_request_id(self):
        self.service.refusals = [(grpc.StatusCode.UNAVAILABLE, "NO_WORKERS", {})] * 2

        result = self.client.prefill([5])

        ids = [request.request_id for request in self.service.requests]
        self.assertEqual(len(ids), 3)
        self.assertEqual(set(ids), {result.request_id})
        self.assertTrue(result.request_id)

    def test_retries_end(self):
        self.service.refusals = [(grpc.StatusCode.UNAVAILABLE, "DRAINING", {"retry_after_s": 0.01})] * 10

        with self.assertRaises(HeadwaterError) as caught:
            self.client.prefill([5])

        self.assertEqual(caught.exception.reason, "DRAINING")
        self.assertEqual(len(self.service.requests), 5)

    def test_a_pause_longer_than_the_timeout_is_not_waited_for(self):
        self.service.refusals = [(grpc.StatusCode.UNAVAILABLE, "DRAINING", {"retry_after_s": 500})]
        begin = time.monotonic()

        with self.assertRaises(HeadwaterError):
            self.client.prefill([5])

        self.assertLess(time.monotonic() - begin, 10)

    def test_other_codes_are_not_retried_and_carry_reason_and_metadata(self):
        self.service.refusals = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL",
                                  {"queue_length": "256", "retry_after_s": 2.5})]

        with self.assertRaises(HeadwaterError) as caught:
            self.client.prefill([5])

        error = caught.exception
        self.assertEqual((error.code, error.reason), (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"))
        self.assertEqual((error.metadata, error.retry_after_s), ({"queue_length": "256"}, 2.5))
        self.assertIn("QUEUE_FULL", str(error))
        self.assertEqual(len(self.service.requests), 1)

    def test_a_failed_event_raises_and_is_not_retried(self):
        self.service.failure = make_status(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", "w1 is gone", worker_id="w1")

        with self.assertRaises(HeadwaterError) as caught:
            self.client.prefill([5])

        self.assertEqual((caught.exception.reason, caught.exception.metadata), ("WORKER_LOST", {"worker_id": "w1"}))
        self.assertEqual(len(self.service.requests), 1)

    def test_a_timeout_ends_a_hanging_prefill_and_cancels_it(self):
        self.service.hang = True

        with self.assertRaises(HeadwaterError) as caught:
            self.client.prefill([5], timeout_s=0.3)

        self.assertEqual(caught.exception.code, grpc.StatusCode.DEADLINE_EXCEEDED)
        self.assertTrue(self.service.cancelled.wait(10))

    def test_an_exception_in_on_progress_cancels_the_call(self):
        self.service.hang = True

        with self.assertRaises(KeyError):
            self.client.prefill([5], on_progress=lambda progress: {}[progress.layers_done])

        self.assertTrue(self.service.cancelled.wait(10))

    def test_batch_yields_results_and_errors_by_item(self):
        items = {item.index: item for item in self.client.batch([[1], [], [3]])}

        self.assertEqual([items[i].ok for i in range(3)], [True, False, True])
        self.assertEqual(items[2].outcome.first_token, 4)
        self.assertEqual(items[1].outcome.reason, "EMPTY_PROMPT")
        self.assertEqual(len({item.request_id for item in self.service.requests[0].items}), 3)

    def test_generate_streams_from_the_decode_node_of_the_result(self):
        result = self.client.prefill([5])

        tokens = list(self.client.generate(result, 3, stop_token_ids=[2]))

        self.assertEqual([token.token_id for token in tokens], [100, 101, 102])
        self.assertEqual([token.finish_reason for token in tokens], ["", "", "length"])
        sent = self.service.requests[-1]
        self.assertEqual((sent.session_id, list(sent.stop_token_ids)), (result.session_id, [2]))
        self.assertEqual(self.client.release(result), 42)

    def test_generate_left_early_cancels_the_call(self):
        result = self.client.prefill([5])

        stream = self.client.generate(result, 60000)
        next(stream)
        stream.close()

        self.assertTrue(self.service.cancelled.wait(10))

    def test_cancel_and_lists(self):
        self.assertTrue(self.client.cancel("runs"))
        self.assertFalse(self.client.cancel("ended"))
        self.assertTrue(self.client.cancel("theirs", tenant="acme"))
        self.assertFalse(self.client.cancel("theirs"))
        with self.assertRaises(HeadwaterError) as caught:
            self.client.cancel("gone")
        self.assertEqual(caught.exception.reason, "UNKNOWN_REQUEST")
        self.assertEqual([worker.worker_id for worker in self.client.workers()], ["w0"])
        self.assertEqual([node.decode_node for node in self.client.decode_nodes()], ["d0"])

    def test_a_submitted_prompt_is_watched_and_asked_for(self):
        self.assertEqual(self.client.submit([1, 2], request_id="r", traceparent="00-aa-bb-01",
                                            options=PrefillOptions(tenant="acme")), "r")
        self.assertEqual(self.service.metadata["traceparent"], "00-aa-bb-01")
        self.assertEqual((self.service.requests[-1].request.tenant, list(self.service.requests[-1].request.token_ids)), ("acme", [1, 2]))
        seen = []
        result = self.client.watch("r", tenant="acme", on_progress=seen.append)
        self.assertEqual((result.request_id, [p.layers_done for p in seen]), ("r", [1]))
        self.assertEqual(self.service.requests[-1].tenant, "acme")
        self.assertEqual(self.client.status("r").request_id, "r")
        self.assertEqual(self.client.status("runs").layers_done, 3)
        self.assertIsNone(self.client.status("waits"))
        for call in (self.client.watch, self.client.status):
            with self.assertRaises(HeadwaterError) as caught:
                call("unknown")
            self.assertEqual(caught.exception.reason, "UNKNOWN_REQUEST")

    def test_a_submitted_prompt_that_failed_raises_where_it_is_watched(self):
        self.service.failure = make_status(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", "lost")
        with self.assertRaises(HeadwaterError) as caught:
            self.client.watch("r")
        self.assertEqual(caught.exception.reason, "WORKER_LOST")
        self.assertEqual(self.client.status("r").reason, "WORKER_LOST")
        self.service.refusals = [(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT", {})]
        with self.assertRaises(HeadwaterError):
            self.client.submit([])

    def test_wrong_arguments_are_refused_before_anything_is_sent(self):
        with self.assertRaises(ValueError):
            self.client.prefill()
        with self.assertRaises(ValueError):
            self.client.prefill([1], text="x")
        with self.assertRaisesRegex(ValueError, "tokenizer"):
            self.client.prefill(text="x")
        with self.assertRaisesRegex(ValueError, "int8"):
            self.client.prefill([1], options=PrefillOptions(kv_dtype="int8"))
        self.assertEqual(self.service.requests, [])

    def test_a_coordinator_that_is_not_there_gives_unavailable(self):
        with Client("127.0.0.1:1", timeout_s=5, max_attempts=1) as client:
            with self.assertRaises(HeadwaterError) as caught:
                client.prefill([1])
        self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)

    def test_details_that_do_not_parse_leave_code_and_message(self):
        class Broken(prefill_pb2_grpc.PrefillServiceServicer):
            def CancelPrefill(self, request, context):
                context.set_trailing_metadata([("grpc-status-details-bin", b"\xff\xff\xff")])
                context.abort(grpc.StatusCode.NOT_FOUND, "nothing")

        server = grpc.server(futures.ThreadPoolExecutor(1))
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(Broken(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.addCleanup(lambda: server.stop(0).wait())
        with Client(f"127.0.0.1:{port}", timeout_s=5) as client, self.assertRaises(HeadwaterError) as caught:
            client.cancel("x")
        self.assertEqual((caught.exception.code, caught.exception.reason), (grpc.StatusCode.NOT_FOUND, ""))


class ResultTest(unittest.TestCase):
    def test_a_quality_is_one_bound(self):
        for name, value in (("min_recall", 0.9), ("max_density", 0.25)):
            sent = PrefillOptions(**{name: value}).to_request("r", [1])
            self.assertEqual((sent.quality.WhichOneof("bound"), getattr(sent.quality, name)), (name, value))
        sent = PrefillOptions(time_budget_s=1.5).to_request("r", [1])
        self.assertEqual((sent.quality.time_budget.seconds, sent.quality.time_budget.nanos), (1, 500_000_000))
        with self.assertRaisesRegex(ValueError, "exclude each other"):
            PrefillOptions(min_recall=0.9, max_density=0.25).to_request("r", [1])

    def test_the_attention_report_is_typed_and_prints(self):
        report = types_pb2.AttentionReport(policy="headwater", density=0.05, recall_mean=0.97, recall_p1=0.8,
                                           sampled_queries=32, wait={"nanos": 500_000_000})
        report.groups.add(layer=1, kv_head=0, density=0.1, recall=0.96, threshold=0.25, rounds=4,
                          fallback=types_pb2.ATTENTION_FALLBACK_DENSE_RECALL, note="why")
        report.groups.add(layer=2, density=1.0)
        report.groups.add(layer=3, density=0.2, forced_density=0.125, no_room_tiles=7)
        got = PrefillResult.from_completed(prefill_pb2.PrefillCompleted(request_id="r", attention=report)).attention
        self.assertEqual((got.policy, got.recall_mean, got.recall_p1, got.wait_s), ("headwater", 0.97, 0.8, 0.5))
        first, second, third = got.groups
        self.assertEqual((first.kv_head, first.recall, first.threshold, first.rounds, first.fallback, first.note),
                         (0, 0.96, 0.25, 4, "dense_recall", "why"))
        self.assertEqual((second.kv_head, second.recall, second.threshold, second.fallback), (None, None, None, ""))
        self.assertEqual((first.forced_density, first.no_room_tiles), (None, 0))
        self.assertEqual((third.threshold, third.forced_density, third.no_room_tiles), (None, 0.125, 7))
        self.assertEqual(str(got), "headwater, density 0.0500, recall 0.9700 (p1 0.8000) of 32 queries a layer; "
                                   "dense_recall 1 of 3 groups")
        bare = PrefillResult.from_completed(prefill_pb2.PrefillCompleted(request_id="r")).attention
        self.assertEqual((bare.recall_mean, bare.groups, bare.fallback), (None, [], ""))

    def test_result_is_immutable(self):
        result = PrefillResult.from_completed(prefill_pb2.PrefillCompleted(request_id="r"))
        with self.assertRaises(AttributeError):
            result.request_id = "other"


class TlsClientTest(unittest.TestCase):
    """A server that wants certificates of one authority."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        for authority in ("ours", "theirs"):
            self.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj",
                         f"/CN={authority}", "-keyout", self.folder / f"{authority}.key", "-out", self.folder / f"{authority}.crt")
        self.issue("server", "ours")
        self.issue("client", "ours")
        self.issue("stranger", "theirs")
        self.service = FakeService()
        server = grpc.server(futures.ThreadPoolExecutor(4))
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.service, server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.service, server)
        pair = [((self.folder / "server.key").read_bytes(), (self.folder / "server.crt").read_bytes())]
        credentials = grpc.ssl_server_credentials(pair, (self.folder / "ours.crt").read_bytes(), require_client_auth=True)
        self.service.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        self.addCleanup(lambda: server.stop(1).wait())

    def openssl(self, *words):
        done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=30)
        self.assertEqual(done.returncode, 0, done.stderr)

    def issue(self, name, authority):
        extensions = self.folder / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
        self.openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}", "-keyout",
                     self.folder / f"{name}.key", "-out", self.folder / "request")
        self.openssl("x509", "-req", "-in", self.folder / "request", "-CA", self.folder / f"{authority}.crt", "-CAkey",
                     self.folder / f"{authority}.key", "-CAcreateserial", "-days", "1", "-extfile", extensions, "-out",
                     self.folder / f"{name}.crt")

    def client(self, name, ca="ours"):
        credentials = tls_credentials(self.folder / f"{name}.crt", self.folder / f"{name}.key", self.folder / f"{ca}.crt")
        client = Client(self.service.address, timeout_s=5, max_attempts=1, credentials=credentials)
        self.addCleanup(client.close)
        return client

    def test_the_coordinator_and_decode_nodes_are_dialled_with_the_certificate(self):
        client = self.client("client")
        result = client.prefill([5, 6])
        self.assertEqual(result.first_token, 6)
        self.assertEqual(client.release(result), 42)

    def test_whoever_is_not_believed_or_does_not_believe_gets_no_answer(self):
        for client in (self.client("stranger"), self.client("client", ca="theirs"),
                       Client(self.service.address, timeout_s=5, max_attempts=1)):
            with self.assertRaises(HeadwaterError) as caught:
                client.prefill([5, 6])
            self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)
        self.assertEqual(self.service.requests, [])


if __name__ == "__main__":
    unittest.main()
