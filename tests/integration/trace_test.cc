// A trace from the client's call to the workers' logs, and the timeline of a real prefill.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

constexpr int kLayers = 4;
constexpr char kTrace[] = "0af7651916cd43dd8448eb211c80319c";
constexpr char kTraceparent[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

double Seconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + 1e-9 * duration.nanos();
}

class TraceTest : public ::testing::Test {
 protected:
  TraceTest() {
    ClusterOptions options;
    options.model_directory = MakeTempDirectory();
    WriteTinyModel(TinyModel{.layers = kLayers}, options.model_directory);
    options.worker_flags = {"--log_format=json"};
    options.coordinator_flags = {"--log_format=json"};
    cluster_ = std::make_unique<Cluster>(options);
  }
  ~TraceTest() override {
    if (HasFailure()) std::fprintf(stderr, "%s", cluster_->Logs().c_str());
  }

  // With the trace of a caller.
  v1::PrefillCompleted PrefillInTrace(const std::string& request_id, int tokens) {
    v1::PrefillRequest request = MakeRequest(RandomTokens(3, tokens));
    request.set_request_id(request_id);
    grpc::ClientContext context;
    context.AddMetadata("traceparent", kTraceparent);
    const auto reader = cluster_->prefill().Prefill(&context, request);
    v1::PrefillResponse event;
    v1::PrefillCompleted completed;
    while (reader->Read(&event)) {
      if (event.has_accepted()) {
        EXPECT_EQ(event.accepted().trace_id(), kTrace);
      }
      if (event.has_completed()) completed = event.completed();
    }
    EXPECT_TRUE(reader->Finish().ok());
    return completed;
  }

  v1::RequestTrace GetTrace(const std::string& request_id) {
    grpc::ClientContext context;
    v1::GetTraceRequest request;
    request.set_request_id(request_id);
    v1::GetTraceResponse response;
    const absl::Status status = FromGrpcStatus(cluster_->admin().GetTrace(&context, request, &response));
    EXPECT_TRUE(status.ok()) << status;
    return response.trace();
  }

  std::unique_ptr<Cluster> cluster_;
};

TEST_F(TraceTest, ATimelineAccountsForThePrefill) {
  const v1::PrefillCompleted completed = PrefillInTrace("shared", 4000);
  ASSERT_EQ(completed.trace_id(), kTrace);
  const v1::RequestTrace trace = GetTrace("shared");
  EXPECT_EQ(trace.trace_id(), kTrace);
  EXPECT_EQ(trace.parent_id(), "b7ad6b7169203331");
  EXPECT_EQ(trace.code(), "OK");
  EXPECT_NEAR(static_cast<double>(trace.arrived().seconds()),
              absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()), 120);
  ASSERT_EQ(trace.epochs_size(), 1);
  const v1::EpochTrace& epoch = trace.epochs(0);
  ASSERT_EQ(epoch.ranks_size(), 2);
  const double total = 1e-6 * static_cast<double>(trace.ended_us());
  EXPECT_NEAR(total, Seconds(completed.stages().total()), .05 * total + .01);
  for (const v1::RankTimeline& rank : epoch.ranks()) {
    ASSERT_EQ(rank.trace().layers_size(), kLayers);
    // The stages cannot last longer than what they are stages of, and leave little of it.
    uint64_t compute = 0;
    uint64_t last_end = rank.trace().begin_us();
    for (const v1::LayerTrace& layer : rank.trace().layers()) {
      EXPECT_GE(layer.start_us() + 1, last_end);
      const uint64_t inside =
          layer.project_us() + layer.exchange_us() + layer.attention_us() + layer.mlp_us();
      last_end = layer.start_us() + inside;
      compute += inside;
      EXPECT_GE(layer.egress_start_us(), layer.start_us());
      EXPECT_GT(layer.egress_end_us(), layer.egress_start_us());
      EXPECT_LE(layer.egress_end_us(), rank.trace().end_us());
    }
    EXPECT_LE(last_end, rank.trace().end_us() + 1);
    const uint64_t whole = epoch.computed_us() - epoch.assigned_us();
    EXPECT_LE(rank.trace().end_us(), whole + 1000);
    EXPECT_GT(static_cast<double>(compute),
              .5 * static_cast<double>(rank.trace().end_us() - rank.trace().begin_us()));
  }
  for (const int worker : {0, 1}) {
    EXPECT_NE(cluster_->worker(worker).Log().find(absl::StrCat("\"trace_id\":\"", kTrace, "\"")),
              std::string::npos);
  }
  EXPECT_NE(cluster_->coordinator().Log().find(kTrace), std::string::npos);
}

TEST_F(TraceTest, PackedPromptsHaveTimelinesToo) {
  PrefillInTrace("short", 100);
  const v1::RequestTrace trace = GetTrace("short");
  ASSERT_EQ(trace.epochs(0).ranks_size(), 1);
  EXPECT_EQ(trace.epochs(0).ranks(0).trace().layers_size(), kLayers);
}

TEST_F(TraceTest, TheCommandWritesAFileOfItself) {
  PrefillInTrace("r", 300);
  const std::string path = cluster_->directory() + "/trace.json";
  Process command({BinaryPath("headwater"), "trace", "r", "--coordinator=" + cluster_->coordinator_address()},
                  path);
  EXPECT_EQ(command.Wait(absl::Seconds(20)), 0);
  const std::string text = ReadFile(path);
  EXPECT_EQ(text.rfind("{\"displayTimeUnit\"", 0), 0u) << text.substr(0, 200);
  EXPECT_NE(text.find("\"KV of layer 3\""), std::string::npos);
  Process unknown(
      {BinaryPath("headwater"), "trace", "no-such", "--coordinator=" + cluster_->coordinator_address()},
      cluster_->directory() + "/unknown.json");
  EXPECT_EQ(unknown.Wait(absl::Seconds(20)), 3);
}

}  // namespace
}  // namespace headwater::testing
