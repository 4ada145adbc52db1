// Timelines of requests, from the scheduler and in their store.
#include "coordinator/trace.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

v1::RequestTrace Sized(size_t bytes) {
  v1::RequestTrace trace;
  trace.set_model(std::string(bytes, 'm'));
  return trace;
}

JobKey Key(int i) { return {"", absl::StrCat("r", i)}; }

TEST(TraceStoreTest, KeepsTheNewestWithinItsBound) {
  TraceStore store(1000);
  for (int i = 0; i < 10; ++i) store.Put(Key(i), Sized(300));
  EXPECT_LE(store.bytes(), 1000u);
  EXPECT_EQ(store.size(), 3u);
  EXPECT_EQ(store.Find(Key(6)), nullptr);
  ASSERT_NE(store.Find(Key(7)), nullptr);
  store.Put(Key(7), Sized(10));
  EXPECT_EQ(store.size(), 3u);
  EXPECT_EQ(store.Find(Key(7))->model().size(), 10u);
  store.Put(Key(8), Sized(5000));
  EXPECT_EQ(store.Find(Key(8)), nullptr) << "larger than all the room, and the old one is not it";
  EXPECT_NE(store.Find(Key(9)), nullptr);
  TraceStore none(0);
  none.Put(Key(1), Sized(1));
  EXPECT_EQ(none.size(), 0u);
}

class TraceTest : public ::testing::Test {
 protected:
  TraceTest() {
    cluster_.AddDecodeNode();
    cluster_.AddWorker("w0");
    cluster_.AddWorker("w1");
  }

  v1::RequestTrace Trace(const std::string& id = "r") {
    const auto trace = cluster_.scheduler.GetTrace({"", id});
    EXPECT_TRUE(trace.ok()) << trace.status();
    return trace.ok() ? *trace : v1::RequestTrace();
  }
  // With layers as a rank reports them, and some that no rank may.
  v1::RankCompleted CompletionWithTrace(const std::string& id) {
    v1::RankCompleted completed = cluster_.CompletionOf(id);
    completed.mutable_trace()->set_begin_us(5);
    for (const uint32_t layer : {0u, 1u, 1u, 0u, 999'999u}) {
      completed.mutable_trace()->add_layers()->set_layer(layer);
    }
    return completed;
  }

  FakeCluster cluster_;
};

TEST_F(TraceTest, TellsWhenARequestWaitedComputedAndCommitted) {
  const auto watcher = cluster_.Submit(MakeRequest("r", 4000));
  const std::string trace_id = watcher->events.front().accepted().trace_id();
  EXPECT_EQ(trace_id.size(), 32u);
  cluster_.Advance(absl::Milliseconds(30));
  ASSERT_EQ(cluster_.decode.pending.size(), 1u);
  EXPECT_NE(cluster_.decode.pending[0].open.traceparent().find(trace_id), std::string::npos);
  cluster_.decode.AnswerAll();
  EXPECT_NE(cluster_.TakeAssignment("w0").traceparent().find(trace_id), std::string::npos);
  cluster_.TakeAssignment("w1");
  EXPECT_EQ(Trace().code(), "") << "it runs";
  cluster_.Advance(absl::Milliseconds(200));
  cluster_.Complete("w0", CompletionWithTrace("w0"));
  EXPECT_EQ(Trace().epochs(0).ranks_size(), 1);
  cluster_.Advance(absl::Milliseconds(100));
  cluster_.Complete("w1", CompletionWithTrace("w1"));
  cluster_.Advance(absl::Milliseconds(40));
  cluster_.decode.AnswerAll();

  EXPECT_EQ(watcher->completed().trace_id(), trace_id);
  const v1::RequestTrace trace = Trace();
  EXPECT_EQ(trace.trace_id(), trace_id);
  EXPECT_EQ(trace.code(), "OK");
  EXPECT_EQ(trace.num_tokens(), 4000u);
  EXPECT_EQ(trace.accepted_us(), 1u) << "at once";
  ASSERT_EQ(trace.epochs_size(), 1);
  const v1::EpochTrace& epoch = trace.epochs(0);
  EXPECT_EQ(epoch.started_us(), 1u);
  EXPECT_EQ(epoch.assigned_us(), 30'000u);
  EXPECT_EQ(epoch.computed_us(), 330'000u);
  EXPECT_EQ(epoch.ended_us(), 370'000u);
  EXPECT_EQ(trace.ended_us(), 370'000u);
  EXPECT_EQ(epoch.given_up(), "");
  ASSERT_EQ(epoch.ranks_size(), 2);
  EXPECT_EQ(epoch.ranks(0).completed_us(), 230'000u);
  EXPECT_EQ(epoch.ranks(1).worker_id(), epoch.plan().worker_ids(1));
  EXPECT_EQ(epoch.ranks(0).trace().begin_us(), 5u);
  ASSERT_EQ(epoch.ranks(0).trace().layers_size(), 2) << "each layer of the model once";
  EXPECT_EQ(epoch.ranks(0).trace().layers(1).layer(), 1u);
}

TEST_F(TraceTest, HasEveryTryAndWhyItEnded) {
  const auto watcher = cluster_.Submit(MakeRequest("r", 4000));
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  cluster_.TakeAssignment("w1");
  cluster_.Advance(absl::Milliseconds(100));
  cluster_.Disconnect("w1");
  EXPECT_TRUE(cluster_.TakeAbort("w0"));
  cluster_.Fail("w0", absl::CancelledError("aborted"));
  cluster_.decode.AnswerAll();
  cluster_.TakeAssignment("w0");
  EXPECT_EQ(Trace().epochs_size(), 2);
  cluster_.Fail("w0", MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE, "NaN"));
  cluster_.decode.AnswerAll();

  const v1::RequestTrace trace = Trace();
  EXPECT_EQ(trace.code(), "INTERNAL");
  EXPECT_EQ(trace.reason(), "NON_FINITE");
  ASSERT_EQ(trace.epochs_size(), 2);
  EXPECT_EQ(trace.epochs(0).given_up(), "WORKER_LOST");
  EXPECT_EQ(trace.epochs(0).ended_us(), 100'000u);
  EXPECT_EQ(trace.epochs(1).given_up(), "NON_FINITE");
  EXPECT_EQ(trace.epochs(1).computed_us(), 0u);
}

TEST_F(TraceTest, UnknownRequestsAreNamed) {
  const auto trace = cluster_.scheduler.GetTrace({"", "nobody"});
  EXPECT_EQ(trace.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(trace.status()), v1::ERROR_REASON_UNKNOWN_REQUEST);
  cluster_.Submit(MakeRequest("r", 10));
  EXPECT_FALSE(cluster_.scheduler.GetTrace({"other-tenant", "r"}).ok());
}

}  // namespace
}  // namespace headwater::testing
