// The command against a scripted service on loopback.
#include <condition_variable>
#include <functional>
#include <mutex>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tools/cli/cli.h"
#include "tools/cli/render.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

v1::PrefillResponse Completed(const v1::PrefillRequest& request, const std::string& decode_address) {
  v1::PrefillResponse response;
  v1::PrefillCompleted& completed = *response.mutable_completed();
  completed.set_request_id(request.request_id());
  completed.set_session_id("session-of-" + request.request_id());
  completed.set_num_tokens(static_cast<uint64_t>(request.token_ids_size()));
  completed.set_decode_node("d0");
  completed.set_decode_address(decode_address);
  completed.set_first_token(42);
  completed.set_tokens_per_second(100.5);
  completed.set_density(0.25);
  v1::AttentionReport& attention = *completed.mutable_attention();
  attention.set_policy("headwater");
  attention.set_density(0.25);
  attention.set_recall_mean(0.97);
  attention.set_recall_p1(0.8);
  attention.set_sampled_queries(32);
  attention.add_groups()->set_fallback(v1::ATTENTION_FALLBACK_DENSE_RECALL);
  attention.add_groups();
  completed.set_kv_bytes(3 << 20);
  completed.set_kv_blocks(12);
  completed.set_kv_blocks_resent(2);
  completed.set_kv_digest("00ff");
  completed.mutable_layout()->set_dtype(v1::KV_DTYPE_BF16);
  completed.mutable_stages()->mutable_attention()->set_seconds(3);
  completed.mutable_plan()->set_world_size(2);
  completed.mutable_plan()->add_worker_ids("w0");
  completed.mutable_plan()->add_worker_ids("w1");
  completed.mutable_plan()->set_partition(v1::PARTITION_STRIPED);
  completed.mutable_plan()->set_strategy(v1::STRATEGY_SPARSE);
  completed.set_exchange_bytes(1 << 20);
  completed.set_exchange_bytes_allgather(4 << 20);
  return response;
}

v1::PrefillResponse Failed(const v1::PrefillRequest& request, const absl::Status& status) {
  v1::PrefillResponse response;
  response.mutable_failed()->set_request_id(request.request_id());
  *response.mutable_failed()->mutable_error() = ToRpcStatus(status);
  return response;
}

v1::PlanExplanation Explanation() {
  v1::PlanExplanation explanation;
  explanation.set_summary("2 workers, zigzag, ring: 1.5 s predicted; the least time");
  explanation.set_density(0.5);
  v1::PlanCandidate* candidate = explanation.add_candidates();
  candidate->set_world_size(2);
  candidate->set_partition(v1::PARTITION_ZIGZAG);
  candidate->set_strategy(v1::STRATEGY_RING);
  candidate->mutable_cost()->set_linear_s(0.75);
  candidate->mutable_cost()->set_exchange_s(0.25);
  candidate->mutable_cost()->set_exchange_hidden_s(0.125);
  candidate->mutable_cost()->set_total_s(1.5);
  candidate->set_chosen(true);
  candidate->set_note("the least time");
  candidate = explanation.add_candidates();
  candidate->set_world_size(1);
  candidate->set_note("too few workers");
  return explanation;
}

// Prompts that start with 404 fail; one that starts with 555 runs until it is cancelled.
class FakePrefill final : public v1::PrefillService::Service {
 public:
  std::string decode_address;
  v1::PrefillRequest last;  // of the last Prefill call
  std::vector<v1::CancelPrefillRequest> cancels;
  v1::GetPrefillRequest asked;

  grpc::Status SubmitPrefill(grpc::ServerContext* context, const v1::SubmitPrefillRequest* request,
                             v1::SubmitPrefillResponse* response) override {
    last = request->request();
    traced = context->client_metadata().count("traceparent") > 0;
    if (last.token_ids(0) == 404) {
      return ToGrpcStatus(MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_TOKEN_OUT_OF_RANGE,
                                    "token 404", {{"limit", "256"}}));
    }
    response->set_request_id(last.request_id());
    response->set_trace_id("0123");
    return grpc::Status::OK;
  }
  bool traced = false;

  grpc::Status WatchPrefill(grpc::ServerContext* context, const v1::WatchPrefillRequest* request,
                            grpc::ServerWriter<v1::WatchPrefillResponse>* writer) override {
    v1::PrefillRequest known;
    known.set_request_id(request->request_id());
    known.add_token_ids(request->request_id() == "bad" ? 404 : 1);
    v1::WatchPrefillResponse message;
    message.mutable_response()->mutable_progress()->set_layers_done(1);
    message.mutable_response()->mutable_progress()->set_num_layers(2);
    writer->Write(message);
    if (request->request_id() == "endless") {
      std::unique_lock<std::mutex> lock(mutex_);
      running_ = true;
      changed_.notify_all();
      while (!context->IsCancelled()) changed_.wait_for(lock, std::chrono::milliseconds(20));
      return grpc::Status::CANCELLED;
    }
    *message.mutable_response() = Result(known);
    writer->Write(message);
    return grpc::Status::OK;
  }

  grpc::Status GetPrefill(grpc::ServerContext* /*context*/, const v1::GetPrefillRequest* request,
                          v1::GetPrefillResponse* response) override {
    asked = *request;
    v1::PrefillRequest known;
    known.set_request_id(request->request_id());
    known.add_token_ids(request->request_id() == "bad" ? 404 : 1);
    if (request->request_id() == "queued")
      response->mutable_last()->mutable_accepted()->set_queue_position(4);
    if (request->request_id() == "running") {
      response->mutable_last()->mutable_progress()->set_layers_done(1);
      response->mutable_last()->mutable_progress()->set_num_layers(2);
    }
    if (request->request_id() == "done" || request->request_id() == "bad") {
      *response->mutable_last() = Result(known);
    }
    return grpc::Status::OK;
  }

  grpc::Status Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                       grpc::ServerWriter<v1::PrefillResponse>* writer) override {
    last = *request;
    if (request->model() == "unknown") {
      return ToGrpcStatus(MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_MODEL,
                                    "no such model", {{"model", "unknown"}}));
    }
    v1::PrefillResponse event;
    event.mutable_accepted()->set_request_id(request->request_id());
    event.mutable_accepted()->set_queue_position(3);
    if (request->explain()) *event.mutable_accepted()->mutable_explanation() = Explanation();
    writer->Write(event);
    event.mutable_progress()->set_layers_done(1);
    event.mutable_progress()->set_num_layers(2);
    event.mutable_progress()->set_epoch(2);
    writer->Write(event);
    if (request->token_ids(0) == 555) return RunUntilCancelled(context, *request, writer);
    writer->Write(Result(*request));
    return grpc::Status::OK;
  }

  grpc::Status BatchPrefill(grpc::ServerContext* /*context*/, const v1::BatchPrefillRequest* request,
                            grpc::ServerWriter<v1::BatchPrefillResponse>* writer) override {
    // Out of order, and without a result for prompts that start with 777.
    for (int i = request->items_size() - 1; i >= 0; --i) {
      if (request->items(i).token_ids(0) == 777) continue;
      v1::BatchPrefillResponse response;
      response.set_item(static_cast<uint32_t>(i));
      *response.mutable_response() = Result(request->items(i));
      writer->Write(response);
    }
    return grpc::Status::OK;
  }

  grpc::Status CancelPrefill(grpc::ServerContext* /*context*/, const v1::CancelPrefillRequest* request,
                             v1::CancelPrefillResponse* response) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancels.push_back(*request);
    response->set_cancelled(request->request_id() != "old");
    changed_.notify_all();
    return grpc::Status::OK;
  }

  // True once a prompt that runs until it is cancelled has started.
  bool WaitForRunning() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(60), [this] { return running_; });
  }

 private:
  grpc::Status RunUntilCancelled(grpc::ServerContext* context, const v1::PrefillRequest& request,
                                 grpc::ServerWriter<v1::PrefillResponse>* writer) {
    std::unique_lock<std::mutex> lock(mutex_);
    running_ = true;
    changed_.notify_all();
    changed_.wait_for(lock, std::chrono::seconds(60),
                      [&] { return !cancels.empty() || context->IsCancelled(); });
    writer->Write(
        Failed(request, MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, "cancelled")));
    return grpc::Status::OK;
  }

  v1::PrefillResponse Result(const v1::PrefillRequest& request) const {
    if (request.token_ids(0) != 404) return Completed(request, decode_address);
    return Failed(request, MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_TOKEN_OUT_OF_RANGE,
                                     "token 404 is over the vocabulary", {{"limit", "256"}}));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool running_ = false;
};

class FakeDecode final : public v1::DecodeService::Service {
 public:
  v1::GenerateRequest last;
  std::vector<std::string> released;

  grpc::Status Generate(grpc::ServerContext* /*context*/, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override {
    last = *request;
    if (request->session_id() == "nobody") {
      return ToGrpcStatus(
          MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION, "no session nobody"));
    }
    for (uint32_t i = 0; i < request->max_new_tokens(); ++i) {
      v1::GenerateResponse token;
      token.set_token_id(42 + i);
      token.set_position(3 + i);
      if (i + 1 == request->max_new_tokens()) token.set_finish_reason(v1::FINISH_REASON_LENGTH);
      writer->Write(token);
    }
    return grpc::Status::OK;
  }
  grpc::Status Release(grpc::ServerContext* /*context*/, const v1::ReleaseRequest* request,
                       v1::ReleaseResponse* response) override {
    released.push_back(request->session_id());
    response->set_bytes_reclaimed(4096);
    return grpc::Status::OK;
  }
};

class FakeAdmin final : public v1::AdminService::Service {
 public:
  std::string decode_address;
  // Lists that still have the worker after it was told to leave; after them a new process has its name.
  int lists_until_gone = 2;
  bool draining = false;

  grpc::Status GetTrace(grpc::ServerContext* /*context*/, const v1::GetTraceRequest* request,
                        v1::GetTraceResponse* response) override {
    if (request->request_id() != "r1" || request->tenant() != "t") {
      return ToGrpcStatus(MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_REQUEST, "none"));
    }
    response->mutable_trace()->set_request_id("r1");
    response->mutable_trace()->set_ended_us(7);
    return grpc::Status::OK;
  }
  grpc::Status DrainWorker(grpc::ServerContext* /*context*/, const v1::DrainWorkerRequest* request,
                           v1::DrainWorkerResponse* response) override {
    if (request->worker_id() != "w0") {
      return ToGrpcStatus(MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_WORKER,
                                    "no such worker", {{"value", request->worker_id()}}));
    }
    draining = true;
    v1::WorkerSummary& worker = *response->mutable_worker();
    worker.set_worker_id("w0");
    worker.set_incarnation("first");
    worker.set_num_requests(2);
    worker.set_num_tokens(512);
    return grpc::Status::OK;
  }

  grpc::Status ListWorkers(grpc::ServerContext* /*context*/, const v1::ListWorkersRequest* /*request*/,
                           v1::ListWorkersResponse* response) override {
    v1::WorkerSummary& worker = *response->add_workers();
    worker.set_worker_id("w0");
    worker.set_device("cpu");
    worker.mutable_model()->set_name("tiny");
    worker.set_request_id("busy-with-this");
    worker.set_num_requests(1);
    worker.set_incarnation(draining && lists_until_gone-- <= 0 ? "second" : "first");
    worker.set_draining(draining);
    if (!draining) worker.mutable_rates()->set_link_bytes_per_s(2.5e9);
    return grpc::Status::OK;
  }
  grpc::Status ListDecodeNodes(grpc::ServerContext* /*context*/,
                               const v1::ListDecodeNodesRequest* /*request*/,
                               v1::ListDecodeNodesResponse* response) override {
    v1::DecodeNodeSummary& node = *response->add_decode_nodes();
    node.set_decode_node("d0");
    node.set_pool("default");
    node.set_decode_address(decode_address);
    node.set_connected(true);
    node.add_kv_dtypes(v1::KV_DTYPE_BF16);
    return grpc::Status::OK;
  }
};

struct Outcome {
  int exit_code = 0;
  std::string out;
  std::string err;
  std::vector<Json> events;  // of --json
};

class CliServiceTest : public ::testing::Test {
 protected:
  CliServiceTest() : server_(*StartServer("127.0.0.1:0", {&prefill_, &decode_, &admin_})) {
    prefill_.decode_address = server_.address;
    admin_.decode_address = server_.address;
  }

  // Runs the command against the fakes.
  Outcome Run(std::vector<std::string> arguments, const std::string& standard_in = "") {
    arguments.push_back("--coordinator=" + server_.address);
    std::istringstream in(standard_in);
    std::ostringstream out;
    std::ostringstream err;
    Outcome outcome;
    outcome.exit_code = RunCli(arguments, Console{in, out, err, false, 80, &interrupt_});
    outcome.out = out.str();
    outcome.err = err.str();
    for (const absl::string_view line : absl::StrSplit(outcome.out, '\n', absl::SkipEmpty())) {
      const Json json = Json::parse(line.begin(), line.end(), nullptr, false);
      if (json.is_object()) outcome.events.push_back(json);
    }
    return outcome;
  }

  FakePrefill prefill_;
  FakeDecode decode_;
  FakeAdmin admin_;
  RunningServer server_;
  Interrupt interrupt_;
};

TEST_F(CliServiceTest, SubmitShowsProgressAndTheResult) {
  const Outcome outcome =
      Run({"submit", "--token_ids=1,2,3", "--request_id=r1", "--model=m", "--policy=a_shape:sink_tokens=4",
           "--decode_node=d0", "--priority=7", "--deadline=90s", "--tenant=t", "--kv_dtype=f32",
           "--min_recall=0.95", "--world_size=2", "--partition=striped", "--strategy=allgather",
           "--block_tokens=64", "--top_logprobs=3"});

  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.err,
              AllOf(HasSubstr("position 3 in the queue"), HasSubstr("layer 1/2"), HasSubstr("epoch 2")));
  for (const char* words :
       {"session-of-r1", "first token  42", "3.0 MiB bf16, 12 blocks verified, 2 resent", "00ff",
        "headwater, density 0.2500, recall 0.9700 (p1 0.8000) of 32 queries a layer",
        "dense_recall 1 of 2 groups", "attention 3.00s", "w0, w1", "striped, sparse",
        "1.0 MiB of K/V, 4.0 MiB by allgather", "TTFT"}) {
    EXPECT_THAT(outcome.out, HasSubstr(words));
  }
  const v1::PrefillRequest& sent = prefill_.last;
  EXPECT_THAT(sent.token_ids(), ElementsAre(1, 2, 3));
  EXPECT_EQ(sent.model(), "m");
  EXPECT_EQ(sent.policy().parameters().at("sink_tokens"), 4);
  EXPECT_EQ(sent.quality().min_recall(), 0.95);
  EXPECT_EQ(sent.decode_node(), "d0");
  EXPECT_EQ(sent.priority(), 7);
  EXPECT_EQ(sent.deadline().seconds(), 90);
  EXPECT_EQ(sent.tenant(), "t");
  EXPECT_EQ(sent.kv_dtype(), v1::KV_DTYPE_F32);
  EXPECT_EQ(sent.world_size(), 2u);
  EXPECT_EQ(sent.partition(), v1::PARTITION_STRIPED);
  EXPECT_EQ(sent.strategy(), v1::STRATEGY_ALLGATHER);
  EXPECT_EQ(sent.block_tokens(), 64u);
  EXPECT_EQ(sent.top_logprobs(), 3u);
}

TEST_F(CliServiceTest, SubmitExplainsThePlan) {
  const Outcome plain = Run({"submit", "--token_ids=1"});
  EXPECT_FALSE(prefill_.last.explain());
  const Outcome outcome = Run({"submit", "--token_ids=1", "--explain"});

  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_TRUE(prefill_.last.explain());
  EXPECT_THAT(
      outcome.out,
      AllOf(HasSubstr("plan     2 workers, zigzag, ring: 1.5 s predicted; the least time\n"),
            HasSubstr("density  0.5000 expected\n"),
            HasSubstr("*  2        zigzag     ring      0.75    0          0.25 (0.125)  0 (0)   0      "
                      "1.5      the least time\n"),
            HasSubstr("   1        -          -         -")));
  EXPECT_THAT(plain.out, ::testing::Not(HasSubstr("WORKERS")));
  const Outcome json = Run({"submit", "--token_ids=1", "--explain", "--json"});
  const Json& explanation = json.events.front()["explanation"];
  EXPECT_EQ(explanation["candidates"][0]["cost"]["exchange_hidden_s"], 0.125);
  EXPECT_EQ(explanation["candidates"][0]["chosen"], true);
  EXPECT_FALSE(explanation["candidates"][1].contains("cost"));
}

TEST_F(CliServiceTest, SubmitGeneratesAndReleases) {
  const Outcome outcome = Run(
      {"submit", "--tokens=-", "--request_id=r2", "--generate=3", "--stop_token_ids=9", "--release"}, "1 2");

  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("generated    42 43 44\n"), HasSubstr("released     4.0 KiB")));
  EXPECT_EQ(decode_.last.session_id(), "session-of-r2");
  EXPECT_THAT(decode_.last.stop_token_ids(), ElementsAre(9));
  EXPECT_THAT(decode_.released, ElementsAre("session-of-r2"));
}

TEST_F(CliServiceTest, SubmitWritesJsonLinesWithTheResultLast) {
  const Outcome outcome =
      Run({"submit", "--token_ids=1", "--request_id=r3", "--json", "--generate=2", "--release"});

  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  std::vector<std::string> names;
  for (const Json& event : outcome.events) names.push_back(event["event"]);
  EXPECT_THAT(names,
              ElementsAre("accepted", "progress", "completed", "token", "token", "released", "result"));
  const Json& result = outcome.events.back();
  EXPECT_EQ(result["ok"], true);
  EXPECT_EQ(result["session_id"], "session-of-r3");
  EXPECT_EQ(result["first_token"], 42);
  EXPECT_EQ(result["kv_bytes"], 3 << 20);
  EXPECT_EQ(result["plan"]["partition"], "striped");
  EXPECT_EQ(result["plan"]["strategy"], "sparse");
  EXPECT_EQ(result["exchange_bytes"], 1 << 20);
  EXPECT_EQ(result["exchange_bytes_allgather"], 4 << 20);
  EXPECT_EQ(result["generated"]["tokens"], Json({42, 43}));
  EXPECT_EQ(result["generated"]["finish_reason"], "length");
  EXPECT_EQ(result["bytes_reclaimed"], 4096);
}

TEST_F(CliServiceTest, RefusalsEndWithThreeAndAllTheirDetails) {
  const Outcome at_once = Run({"submit", "--token_ids=1", "--model=unknown"});
  const Outcome later = Run({"submit", "--token_ids=404", "--json"});

  EXPECT_EQ(at_once.exit_code, 3);
  EXPECT_THAT(at_once.err, HasSubstr("NOT_FOUND UNKNOWN_MODEL: no such model\n  model: unknown"));
  EXPECT_EQ(later.exit_code, 3);
  EXPECT_EQ(later.events.back()["error"]["reason"], "TOKEN_OUT_OF_RANGE");
  EXPECT_EQ(later.events.back()["error"]["metadata"]["limit"], "256");
}

TEST_F(CliServiceTest, CtrlCCancelsTheRequestInTheService) {
  std::thread hand([this] {
    EXPECT_TRUE(prefill_.WaitForRunning());
    EXPECT_TRUE(interrupt_.Raise());
  });

  const Outcome outcome = Run({"submit", "--token_ids=555", "--request_id=r5", "--tenant=t5"});
  hand.join();

  EXPECT_EQ(outcome.exit_code, 130);
  ASSERT_EQ(prefill_.cancels.size(), 1u);
  EXPECT_EQ(prefill_.cancels[0].request_id(), "r5");
  EXPECT_EQ(prefill_.cancels[0].tenant(), "t5");
}

TEST_F(CliServiceTest, BatchReportsEachItem) {
  const std::string good =
      "{\"token_ids\":[1,2],\"request_id\":\"a\"}\n{\"token_ids\":[3],\"request_id\":\"b\"}\n";
  const std::string bad = "{\"token_ids\":[404],\"request_id\":\"c\"}\n";
  const std::string lost = "{\"token_ids\":[777],\"request_id\":\"d\"}\n";

  const Outcome all = Run({"batch", "--requests=-"}, good);
  const Outcome some = Run({"batch", "--requests=-"}, good + bad);
  const Outcome mixed = Run({"batch", "--requests=-", "--json"}, good + bad + lost);

  EXPECT_EQ(all.exit_code, 0) << all.err;
  EXPECT_THAT(all.out, AllOf(HasSubstr("ok      item 0 a  2 tokens"), HasSubstr("2 of 2 succeeded")));
  EXPECT_EQ(some.exit_code, 3);
  EXPECT_THAT(some.out, AllOf(HasSubstr("FAILED  item 2 c"), HasSubstr("TOKEN_OUT_OF_RANGE"),
                              HasSubstr("2 of 3 succeeded")));
  EXPECT_EQ(mixed.exit_code, 1) << "failures of different kinds";
  const Json& result = mixed.events.back();
  EXPECT_EQ(result["succeeded"], 2);
  EXPECT_EQ(result["failed"], 2);
  EXPECT_EQ(result["items"][0]["first_token"], 42);
  EXPECT_EQ(result["items"][3]["error"]["code"], "UNAVAILABLE");
}

TEST_F(CliServiceTest, GenerateAndReleaseFindTheNode) {
  const Outcome by_name = Run({"generate", "--session=s", "--decode_node=d0", "--max_new_tokens=3"});
  const Outcome by_address =
      Run({"generate", "--session=s", "--decode_address=" + server_.address, "--max_new_tokens=1", "--json"});
  const Outcome unknown_node = Run({"generate", "--session=s", "--decode_node=d9"});
  const Outcome unknown_session = Run({"generate", "--session=nobody", "--decode_node=d0"});
  const Outcome release = Run({"release", "--session=s", "--decode_node=d0"});

  EXPECT_EQ(by_name.out, "42 43 44\n");
  EXPECT_EQ(by_address.events.back()["generated"]["tokens"], Json({42}));
  EXPECT_EQ(unknown_node.exit_code, 3);
  EXPECT_THAT(unknown_node.err, HasSubstr("d9"));
  EXPECT_EQ(unknown_session.exit_code, 3);
  EXPECT_THAT(unknown_session.err, HasSubstr("UNKNOWN_SESSION"));
  EXPECT_EQ(release.exit_code, 0) << release.err;
  EXPECT_THAT(decode_.released, ElementsAre("s"));
}

TEST_F(CliServiceTest, DrainWaitsUntilThatProcessHasLeft) {
  EXPECT_THAT(Run({"workers"}).out, HasSubstr("busy"));
  const Outcome drained = Run({"drain", "w0"});
  EXPECT_EQ(drained.exit_code, 0) << drained.err;
  EXPECT_THAT(drained.out, AllOf(HasSubstr("w0 drains: 2 requests of 512 tokens"), HasSubstr("has left")));
  EXPECT_EQ(admin_.lists_until_gone, -1) << "asked until another process had the name";
  EXPECT_THAT(Run({"workers"}).out, HasSubstr("draining"));

  admin_.lists_until_gone = 1'000'000;
  const Outcome late = Run({"drain", "w0", "--timeout=300ms", "--json"});
  EXPECT_EQ(late.exit_code, 4);
  EXPECT_THAT(late.err, AllOf(HasSubstr("w0"), HasSubstr("300ms"), HasSubstr("goes on draining")));
  const Outcome no_wait = Run({"drain", "w0", "--nowait", "--json"});
  EXPECT_EQ(no_wait.events.back()["left"], false);
  EXPECT_EQ(no_wait.exit_code, 0);
  const Outcome unknown = Run({"drain", "w9"});
  EXPECT_EQ(unknown.exit_code, 3);
  EXPECT_THAT(unknown.err, HasSubstr("UNKNOWN_WORKER"));
  EXPECT_EQ(Run({"drain"}).exit_code, 2);
}

TEST_F(CliServiceTest, WritesATimeline) {
  const Outcome trace = Run({"trace", "r1", "--tenant=t"});
  EXPECT_EQ(trace.exit_code, 0) << trace.err;
  EXPECT_EQ(Json::parse(trace.out)["otherData"]["request_id"], "r1");
  EXPECT_EQ(Run({"trace", "r1", "--tenant=t", "--json"}).events.back()["trace"]["ended_us"], "7");
  EXPECT_EQ(Run({"trace", "r1"}).exit_code, 3);
  EXPECT_EQ(Run({"trace"}).exit_code, 2);
  EXPECT_EQ(Run({"submit", "--token_ids=1", "--traceparent=00-1-2-3"}).exit_code, 2);
}

TEST_F(CliServiceTest, SubmitsDetachedAndPrintsTheId) {
  const Outcome outcome = Run({"submit", "--token_ids=1,2", "--request_id=r1", "--detach", "--tenant=t",
                               "--traceparent=00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "r1\n");
  EXPECT_EQ(prefill_.last.tenant(), "t");
  EXPECT_TRUE(prefill_.traced);
  const Outcome json = Run({"submit", "--token_ids=1", "--request_id=r2", "--detach", "--json"});
  EXPECT_EQ(json.events.back()["request_id"], "r2");
  EXPECT_EQ(json.events.back()["trace_id"], "0123");
  EXPECT_EQ(Run({"submit", "--token_ids=404", "--detach"}).exit_code, 3);
  for (const char* flag : {"--generate=2", "--release", "--explain"}) {
    const Outcome wrong = Run({"submit", "--token_ids=1", "--detach", flag});
    EXPECT_EQ(wrong.exit_code, 2);
    EXPECT_THAT(wrong.err, HasSubstr("--detach and --"));
  }
}

TEST_F(CliServiceTest, WatchShowsTheEndOfARequest) {
  const Outcome outcome = Run({"watch", "r1"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.err, HasSubstr("layer 1/2"));
  EXPECT_THAT(outcome.out, HasSubstr("session-of-r1"));
  const Outcome json = Run({"watch", "r1", "--json"});
  EXPECT_EQ(json.events.front()["event"], "progress");
  EXPECT_EQ(json.events.back()["event"], "result");
  EXPECT_EQ(json.events.back()["session_id"], "session-of-r1");
  EXPECT_EQ(Run({"watch", "bad"}).exit_code, 3);
  EXPECT_EQ(Run({"watch"}).exit_code, 2);

  Outcome left;
  std::thread watching([&] { left = Run({"watch", "endless"}); });
  EXPECT_TRUE(prefill_.WaitForRunning());
  EXPECT_TRUE(interrupt_.Raise());
  watching.join();
  EXPECT_EQ(left.exit_code, 130);
  EXPECT_TRUE(prefill_.cancels.empty()) << "leaving cancels nothing";
}

TEST_F(CliServiceTest, StatusSaysHowFarARequestIs) {
  EXPECT_EQ(Run({"status", "waiting", "--tenant=t"}).out, "waiting for workers of its model\n");
  EXPECT_EQ(prefill_.asked.tenant(), "t");
  EXPECT_EQ(Run({"status", "queued"}).out, "accepted, position 4\n");
  EXPECT_THAT(Run({"status", "running"}).out, HasSubstr("running: layer 1/2"));
  EXPECT_THAT(Run({"status", "done"}).out, HasSubstr("session-of-done"));
  const Outcome bad = Run({"status", "bad"});
  EXPECT_EQ(bad.exit_code, 0) << "it could be told";
  EXPECT_THAT(bad.out, HasSubstr("failed: INVALID_ARGUMENT: token 404"));
  EXPECT_EQ(Run({"status", "bad", "--json"}).events.back()["last"]["event"], "failed");
  EXPECT_TRUE(Run({"status", "waiting", "--json"}).events.back()["last"].is_null());
}

TEST_F(CliServiceTest, ListsAndCancels) {
  EXPECT_THAT(Run({"workers"}).out, AllOf(HasSubstr("w0"), HasSubstr("busy-with-this")));
  EXPECT_EQ(Run({"workers", "--json"}).events.back()["workers"][0]["model"], "tiny");
  EXPECT_EQ(Run({"workers", "--json"}).events.back()["workers"][0]["rates"]["link_bytes_per_s"], 2.5e9);
  EXPECT_THAT(Run({"nodes"}).out, AllOf(HasSubstr("d0"), HasSubstr("connected")));
  EXPECT_EQ(Run({"nodes", "--json"}).events.back()["decode_nodes"][0]["kv_dtypes"], Json({"bf16"}));
  EXPECT_EQ(Run({"cancel", "r9"}).out, "cancelled\n");
  EXPECT_EQ(Run({"cancel", "old"}).out, "had already ended\n");
}

}  // namespace
}  // namespace headwater
