"""Tests against running programs: a KV stream as earlier versions wrote it is answered as it was then; peers of another
protocol version, another model or another KV type are refused before a byte of KV is sent."""

import os
import queue
import re
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

try:
    import grpc
    from google.protobuf import any_pb2, text_format
    from google.rpc import error_details_pb2, status_pb2

    import kv_frames
    from demo_cluster import Cluster, read_metrics
    from headwater import Client, HeadwaterError, PrefillOptions
    from watch_cluster import MODEL, tokens
    from wire_schema import Schema, compile_protos
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)

BIN = os.environ.get("HEADWATER_BIN", "")
if not os.access(Path(BIN) / "headwater-coordinator", os.X_OK):
    print(f"SKIPPED: HEADWATER_BIN={BIN} has no headwater-coordinator")
    sys.exit(77)

GOLDEN = ROOT / "tests/proto/golden"
PROTOCOL_VERSION = int(re.search(r"kProtocolVersion = (\d+);", (ROOT / "base/version.h").read_text())[1])
TIMEOUT_S = 20


def raw(value: bytes) -> bytes:
    return value


def reason_of(error: grpc.RpcError) -> str:
    """Of the ErrorInfo in a call's status."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if any_pb2.Any(type_url=detail.type_url, value=detail.value).Unpack(info):
                    return info.reason
    return ""


class HandshakeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.schema = Schema(compile_protos())
        cls.cluster = Cluster(Path(BIN), MODEL, Path(folder.name), 1, compute="f32")
        cls.enterClassContext(cls.cluster)
        cls.client = cls.enterClassContext(Client(cls.cluster.coordinator))
        cls.cluster.wait_registered(cls.client, lambda *_: None)
        cls.client.release(cls.client.prefill(tokens(20), timeout_s=60))  # a worker that has sent nothing counts no bytes yet
        by_name = {process.name: process for process in cls.cluster.processes}
        cls.decode, cls.worker = by_name["decode"], by_name["worker-0"]
        cls.to_coordinator = cls.enterClassContext(grpc.insecure_channel(cls.cluster.coordinator))
        cls.to_decode = cls.enterClassContext(grpc.insecure_channel(cls.decode.address))
        answer = cls.schema.new("headwater.v1.ListWorkersResponse")
        answer.ParseFromString(cls.call(cls.to_coordinator, "AdminService/ListWorkers", b""))
        cls.served = answer.workers[0].model

    @staticmethod
    def call(channel, method: str, request: bytes) -> bytes:
        return channel.unary_unary(f"/headwater.v1.{method}", raw, raw)(request, timeout=TIMEOUT_S)

    def kv_bytes(self) -> tuple:
        """(payload bytes that the decode node has taken, those that the worker has sent)."""
        def total(process, name):
            lines = [line for line in read_metrics(process.metrics).splitlines() if line.startswith(name)]
            self.assertEqual(len(lines), 1, f"{process.name} exports {name}")
            return int(float(lines[0].split()[1]))

        return (total(self.decode, "headwater_kv_ingress_bytes_total"), total(self.worker, "headwater_kv_egress_bytes_total"))

    def open_request(self, folder: Path, **changes):
        """What opened the recorded session, for the model that this node serves."""
        request = text_format.Parse((folder / "frame.session.txtpb").read_text(),
                                    self.schema.new("headwater.v1.OpenSessionRequest"))
        request.layout.model_fingerprint = self.served.fingerprint
        for name, value in changes.items():
            setattr(request.layout if name in request.layout.DESCRIPTOR.fields_by_name else request, name, value)
        return request

    def stream(self, frames: list) -> list:
        """Sends each frame when the one before is answered; the answers."""
        answers = []
        waiting = queue.Queue()
        call = self.to_decode.stream_stream("/headwater.v1.KvTransferService/PushBlocks", raw, raw)(
            iter(waiting.get, None), timeout=TIMEOUT_S)
        try:
            for frame in frames:
                waiting.put(frame)
                answers.append(next(call))
        finally:
            waiting.put(None)
        return answers

    def refused(self, channel, method: str, first: bytes) -> tuple:
        """(code, reason) of a stream that begins with `first`."""
        waiting = queue.Queue()
        waiting.put(first)
        call = channel.stream_stream(f"/headwater.v1.{method}", raw, raw)(iter(waiting.get, None), timeout=TIMEOUT_S)
        with self.assertRaises(grpc.RpcError) as caught:
            answer = next(call)
            self.fail(f"{method} answered {answer}")
        waiting.put(None)
        return caught.exception.code(), reason_of(caught.exception)

    # --- what earlier versions wrote ---

    def test_a_recorded_stream_is_answered_as_it_was(self):
        versions = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
        self.assertTrue(versions)
        for folder in versions:
            frames = {path.name.split(".")[1]: path.read_bytes() for path in folder.glob("frame.*.bin")}
            blocks = [name for name in sorted(frames) if name.startswith("block_")]
            self.assertEqual(len(blocks), 6)
            before = self.kv_bytes()[0]
            self.call(self.to_decode, "KvTransferService/OpenSession", self.open_request(folder).SerializeToString())
            answers = self.stream([frames["hello"], *(frames[name] for name in blocks)])
            wanted = [frames["state_none"], *(frames[name.replace("block", "ack")] for name in blocks)]
            self.assertEqual(answers, wanted)
            self.assertEqual(self.stream([frames["hello"]]), [frames["state_all"]])
            payload = sum(len(kv_frames.decode(self.schema, frames[name])[1]) for name in blocks)
            self.assertEqual(self.kv_bytes()[0] - before, payload)
            commit = text_format.Parse((folder / "frame.commit.txtpb").read_text(),
                                       self.schema.new("headwater.v1.CommitSessionRequest"))
            committed = self.schema.new("headwater.v1.CommitSessionResponse")
            committed.ParseFromString(self.call(self.to_decode, "KvTransferService/CommitSession", commit.SerializeToString()))
            self.assertEqual((committed.blocks_verified, committed.bytes_stored), (len(blocks), payload))
            release = self.schema.new("headwater.v1.ReleaseRequest")
            release.session_id = kv_frames.SESSION
            released = self.schema.new("headwater.v1.ReleaseResponse")
            released.ParseFromString(self.call(self.to_decode, "DecodeService/Release", release.SerializeToString()))
            self.assertEqual(released.bytes_reclaimed, payload)

    def test_a_message_with_fields_of_a_later_version_is_answered(self):
        later = bytes([0xFA, 0x76, 5]) + b"later"  # field 1903, length-delimited
        answer = self.schema.new("headwater.v1.ListWorkersResponse")
        answer.ParseFromString(self.call(self.to_coordinator, "AdminService/ListWorkers", later))
        self.assertEqual([worker.worker_id for worker in answer.workers], ["w0"])

    # --- what does not fit ---

    def registration(self, **changes):
        request = self.schema.new("headwater.v1.ConnectRequest")
        worker = request.registration
        worker.worker_id, worker.incarnation, worker.rendezvous_address, worker.device = "other", "i1", "127.0.0.1:9", "cpu"
        worker.model.CopyFrom(self.served)
        worker.memory.budget_bytes, worker.memory.bytes_per_token = 1 << 30, 1
        worker.policies.append("dense")
        worker.protocol_version = PROTOCOL_VERSION
        for name, value in changes.items():
            setattr(worker.model if name == "fingerprint" else worker, name, value)
        return request

    def decode_registration(self, **changes):
        request = self.schema.new("headwater.v1.RegisterRequest")
        node = request.registration
        node.decode_node, node.incarnation, node.pool = "other", "i1", "other"
        node.kv_address = node.decode_address = "127.0.0.1:9"
        node.model_fingerprint, node.kv_budget_bytes, node.protocol_version = self.served.fingerprint, 1 << 30, PROTOCOL_VERSION
        text_format.Merge("kv_dtypes: KV_DTYPE_BF16", node)
        for name, value in changes.items():
            setattr(node, name, value)
        return request

    def test_a_worker_or_decode_node_of_another_protocol_version_is_refused(self):
        for version in (0, PROTOCOL_VERSION + 1):
            for method, request in (("WorkerControlService/Connect", self.registration(protocol_version=version)),
                                    ("DecodeRegistryService/Register",
                                     self.decode_registration(decode_node="refused", protocol_version=version))):
                self.assertEqual(self.refused(self.to_coordinator, method, request.SerializeToString()),
                                 (grpc.StatusCode.FAILED_PRECONDITION, "BAD_FIELD"), (method, version))
        self.assertEqual([worker.worker_id for worker in self.client.workers()], ["w0"])
        self.assertNotIn("refused", [node.decode_node for node in self.client.decode_nodes()])

    def test_a_worker_with_another_model_under_the_served_name_is_refused(self):
        request = self.registration(fingerprint="another").SerializeToString()
        self.assertEqual(self.refused(self.to_coordinator, "WorkerControlService/Connect", request),
                         (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"))
        self.assertEqual([worker.worker_id for worker in self.client.workers()], ["w0"])

    def test_a_session_of_another_model_is_refused_and_takes_no_bytes(self):
        before = self.kv_bytes()
        folder = GOLDEN / "v0.1"
        request = self.open_request(folder, model_fingerprint="another")
        with self.assertRaises(grpc.RpcError) as caught:
            self.call(self.to_decode, "KvTransferService/OpenSession", request.SerializeToString())
        self.assertEqual((caught.exception.code(), reason_of(caught.exception)),
                         (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"))
        hello = (folder / "frame.hello.bin").read_bytes()
        self.assertEqual(self.refused(self.to_decode, "KvTransferService/PushBlocks", hello),
                         (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SESSION"))
        self.assertEqual(self.kv_bytes(), before)

    def test_frames_of_another_version_end_the_stream_and_take_no_bytes(self):
        before = self.kv_bytes()
        hello, _ = kv_frames.decode(self.schema, (GOLDEN / "v0.1/frame.hello.bin").read_bytes())
        code, reason = self.refused(self.to_decode, "KvTransferService/PushBlocks", kv_frames.encode(hello, version=2))
        self.assertEqual((code, reason), (grpc.StatusCode.DATA_LOSS, "KV_CORRUPT"))
        self.assertEqual(self.kv_bytes(), before)

    def test_a_prompt_for_a_decode_node_of_another_model_or_type_is_refused_and_sends_no_bytes(self):
        before = self.kv_bytes()
        for changes, options, reason in (
                ({"model_fingerprint": "another"}, {}, "MODEL_MISMATCH"),
                ({}, {"kv_dtype": "f32"}, "KV_DTYPE_UNSUPPORTED")):
            waiting = queue.Queue()
            waiting.put(self.decode_registration(**changes).SerializeToString())
            call = self.to_coordinator.stream_stream("/headwater.v1.DecodeRegistryService/Register", raw, raw)(
                iter(waiting.get, None), timeout=TIMEOUT_S)
            next(call)  # registered: a cluster may have decode nodes of several models
            with self.assertRaises(HeadwaterError) as caught:
                self.client.prefill(tokens(50), options=PrefillOptions(decode_node="other", **options), timeout_s=TIMEOUT_S)
            self.assertEqual((caught.exception.code.name, caught.exception.reason), ("FAILED_PRECONDITION", reason))
            waiting.put(None)
            call.cancel()
        self.assertEqual(self.kv_bytes(), before)

    def test_what_fits_is_served(self):
        before = self.kv_bytes()
        result = self.client.prefill(tokens(50), timeout_s=60)
        self.client.release(result)
        after = self.kv_bytes()
        self.assertEqual([now - then for now, then in zip(after, before)], [result.kv_bytes, result.kv_bytes])
        self.assertGreater(result.kv_bytes, 0)


if __name__ == "__main__":
    unittest.main()
