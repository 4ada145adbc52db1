// headwater-coordinator as a process: flags, signals, exit codes, metrics.
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/grpcpp.h>
#include <signal.h>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/loopback.h"
#include "tests/integration/cluster.h"
#include "tests/integration/process.h"
#include "tests/support/dial.h"
#include "tests/support/health.h"

namespace headwater::testing {
namespace {

TEST(CoordinatorBinaryTest, FlagsOutOfRangeAreNamedWithTheirLimits) {
  struct Case {
    const char* flag;
    const char* limit;
  };
  for (const Case& test : {Case{"--max_epochs=0", "from 1 to 1000"},
                           {"--max_prompt_tokens=16777217", "from 1 to 16777216"},
                           {"--worker_wait=-1s", "from 0 to 720h"},
                           {"--log_format=xml", "json"},
                           {"--listen=nowhere", "HOST:PORT"},
                           {"--decode_cidrs=10.0.0.0", "no range of addresses"},
                           {"--max_queue_requests=0", "from 1 to"},
                           {"stray", "none is wanted"}}) {
    Process process({BinaryPath("headwater-coordinator"), test.flag}, MakeTempDirectory() + "/log");
    const auto status = process.Wait(absl::Seconds(20));
    ASSERT_TRUE(status.has_value()) << test.flag;
    EXPECT_EQ(*status, 2) << test.flag << process.Log();
    EXPECT_TRUE(absl::StrContains(process.Log(), test.limit)) << process.Log();
  }
}

// A process with one worker and one decode node, both scripted.
class CoordinatorProcessTest : public ::testing::Test {
 protected:
  void Start(ScriptedWorker::Script script, const std::string& drain_timeout) {
    metrics_port_ = PickFreePort();
    address_ = absl::StrCat("127.0.0.1:", PickFreePort());
    process_ = std::make_unique<Process>(
        std::vector<std::string>{BinaryPath("headwater-coordinator"), "--listen=" + address_,
                                 absl::StrCat("--metrics=127.0.0.1:", metrics_port_), "--log_format=json",
                                 "--drain_timeout=" + drain_timeout},
        MakeTempDirectory() + "/log");
    decode_ = std::make_unique<ScriptedDecodeNode>(address_, "d0");
    worker_ = std::make_unique<ScriptedWorker>(address_, "w0", std::move(script));
    ASSERT_TRUE(decode_->WaitUntilRegistered()) << process_->Log();
    ASSERT_TRUE(worker_->WaitUntilRegistered()) << process_->Log();
    stub_ = v1::PrefillService::NewStub(DialPlaintext(address_));
  }

  void TearDown() override {
    if (caller_.joinable()) caller_.join();
  }

  absl::Status Prefill(const std::string& id) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const auto reader = stub_->Prefill(&context, MakeRequest(id, 10));
    v1::PrefillResponse event;
    v1::PrefillResponse last;
    while (reader->Read(&event)) last = event;
    const absl::Status status = FromGrpcStatus(reader->Finish());
    return last.has_failed() ? FromRpcStatus(last.failed().error()) : status;
  }

  // A request that runs when this returns.
  void StartRequest() {
    caller_ = std::thread([this] { result_ = Prefill("running"); });
    ASSERT_TRUE(worker_->WaitForAssignments(1));
  }

  void WaitUntilNotServing() {
    const absl::Time end = absl::Now() + absl::Seconds(10);
    while (AskGrpcHealth(address_) != Health::kNotServing && absl::Now() < end) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    EXPECT_EQ(AskGrpcHealth(address_), Health::kNotServing) << "health does not turn NOT_SERVING";
  }

  int ExitCode(absl::Duration within) {
    const auto status = process_->Wait(within);
    EXPECT_TRUE(status.has_value()) << "still running:\n" << process_->Log();
    return status.value_or(-1);
  }

  double Metric(const std::string& name) { return ReadMetric(metrics_port_, name); }

  // Outlives the worker's thread, whose script may wait for it.
  std::atomic<bool> released_{false};
  std::string address_;
  int metrics_port_ = 0;
  std::unique_ptr<Process> process_;
  std::unique_ptr<ScriptedDecodeNode> decode_;
  std::unique_ptr<ScriptedWorker> worker_;
  std::unique_ptr<v1::PrefillService::Stub> stub_;
  std::thread caller_;
  absl::Status result_;
};

TEST_F(CoordinatorProcessTest, SigtermWaitsForAcceptedRequestsAndEndsWithZero) {
  Start(
      [this](ScriptedWorker* worker, const v1::PrefillAssignment& assignment) {
        while (!released_) absl::SleepFor(absl::Milliseconds(5));
        ScriptedWorker::CompleteAtOnce(worker, assignment);
      },
      "30s");
  StartRequest();

  process_->Signal(SIGTERM);
  WaitUntilNotServing();
  EXPECT_EQ(ReasonOf(Prefill("late")), v1::ERROR_REASON_DRAINING);
  released_ = true;
  caller_.join();

  EXPECT_TRUE(result_.ok()) << result_;
  EXPECT_EQ(ExitCode(absl::Seconds(10)), 0) << process_->Log();
}

TEST_F(CoordinatorProcessTest, SigtermCutsWhatOutlastsTheDrainTimeout) {
  Start(ScriptedWorker::Stall, "200ms");
  StartRequest();

  process_->Signal(SIGTERM);
  caller_.join();

  EXPECT_EQ(ReasonOf(result_), v1::ERROR_REASON_DRAINING) << result_;
  EXPECT_EQ(ExitCode(absl::Seconds(10)), 75) << process_->Log();
  EXPECT_EQ(decode_->num_open(), 0u);
}

TEST_F(CoordinatorProcessTest, SigintEndsWithinFiveSecondsThoughAWorkerIsSilent) {
  Start(
      [this](ScriptedWorker*, const v1::PrefillAssignment&) {
        while (!released_) absl::SleepFor(absl::Milliseconds(5));
      },
      "30s");
  StartRequest();

  process_->Signal(SIGINT);

  EXPECT_EQ(ExitCode(absl::Seconds(5)), 75) << process_->Log();
  released_ = true;
}

TEST_F(CoordinatorProcessTest, ASecondSigtermEndsWithinFiveSeconds) {
  Start(
      [this](ScriptedWorker*, const v1::PrefillAssignment&) {
        while (!released_) absl::SleepFor(absl::Milliseconds(5));
      },
      "30s");
  StartRequest();

  process_->Signal(SIGTERM);
  WaitUntilNotServing();
  process_->Signal(SIGTERM);

  EXPECT_EQ(ExitCode(absl::Seconds(5)), 75) << process_->Log();
  released_ = true;
}

TEST_F(CoordinatorProcessTest, MetricsCountWhatHappened) {
  Start(ScriptedWorker::CompleteAtOnce, "1s");
  EXPECT_TRUE(Prefill("good").ok());
  v1::PrefillRequest bad = MakeRequest("bad", 0);
  grpc::ClientContext context;
  const auto reader = stub_->Prefill(&context, bad);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  EXPECT_EQ(Metric("headwater_requests_total{code=\"OK\",reason=\"\"}"), 1);
  EXPECT_EQ(Metric("headwater_rejections_total{reason=\"EMPTY_PROMPT\"}"), 1);
  EXPECT_EQ(Metric("headwater_prompt_tokens_total{source=\"computed\"}"), 10);
  EXPECT_EQ(Metric("headwater_requests_running"), 0);
  EXPECT_EQ(Metric("headwater_requests_waiting"), 0);
  EXPECT_EQ(Metric("headwater_tokens_waiting"), 0);
  EXPECT_EQ(Metric("headwater_tokens_running"), 0);
  EXPECT_EQ(Metric("headwater_workers"), 1);
  EXPECT_EQ(Metric("headwater_decode_nodes"), 1);
  EXPECT_EQ(Metric("headwater_retries_total"), 0);
  EXPECT_EQ(Metric("headwater_request_prompt_tokens_count"), 1);
  EXPECT_EQ(Metric("headwater_attention_density_ratio_count"), 1);
  for (const char* stage : {"queue", "compute", "egress", "total"}) {
    EXPECT_EQ(Metric(absl::StrCat("headwater_time_to_kv_ready_seconds_count{stage=\"", stage, "\"}")), 1);
  }
}

}  // namespace
}  // namespace headwater::testing
