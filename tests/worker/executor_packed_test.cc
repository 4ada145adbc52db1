// Passes of several assignments: PrefillExecutor over a backend that packs.
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/metrics.h"
#include "base/rpc/grpc_status.h"
#include "tests/model/dense_forward.h"
#include "tests/worker/assignments.h"
#include "tests/worker/packing_backend.h"
#include "tests/worker/receiver.h"
#include "worker/executor.h"

namespace headwater::testing {
namespace {

using Task = AssignmentRunner::Task;

constexpr absl::Duration kPlenty = absl::Seconds(20);

// Takes everything at once; Finish waits for Release() or Cancel().
class HeldSender final : public KvSender {
 public:
  struct Gate {
    absl::Mutex mutex;
    bool open ABSL_GUARDED_BY(mutex) = false;
    int waiting ABSL_GUARDED_BY(mutex) = 0;
    int senders ABSL_GUARDED_BY(mutex) = 0;

    void Open() {
      absl::MutexLock lock(&mutex);
      open = true;
    }
    bool WaitForWaiting(int count) {
      absl::MutexLock lock(&mutex);
      const auto reached = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return waiting >= count; };
      return mutex.AwaitWithTimeout(absl::Condition(&reached), kPlenty);
    }
  };
  HeldSender(Gate* gate, const KvSenderOptions& options) : gate_(gate), channels_(options.num_channels) {
    absl::MutexLock lock(&gate_->mutex);
    ++gate_->senders;
  }
  ~HeldSender() override {
    absl::MutexLock lock(&gate_->mutex);
    --gate_->senders;
  }

  absl::Status Submit(const KvBlockId&, const void*, std::function<void()> done) override {
    done();
    return absl::OkStatus();
  }
  absl::Status Finish() override {
    EXPECT_EQ(channels_, 1);
    absl::MutexLock lock(&gate_->mutex);
    ++gate_->waiting;
    const auto over = [this]()
                          ABSL_EXCLUSIVE_LOCKS_REQUIRED(gate_->mutex) { return gate_->open || cancelled_; };
    gate_->mutex.AwaitWithTimeout(absl::Condition(&over), kPlenty);
    return cancelled_ ? absl::CancelledError("the transfer was cancelled") : absl::OkStatus();
  }
  void Cancel() override {
    absl::MutexLock lock(&gate_->mutex);
    cancelled_ = true;
  }
  absl::Status status() const override { return absl::OkStatus(); }
  KvSenderStats Stats() const override {
    KvSenderStats stats;
    stats.bytes_submitted = 100;
    stats.bytes_acked = 40;
    return stats;
  }
  std::optional<KvShare> AckedBelow(uint32_t) const override { return std::nullopt; }
  std::vector<KvLayerTimes> LayerTimes() const override { return {}; }

 private:
  Gate* const gate_;
  const int channels_;
  bool cancelled_ = false;
};

class ExecutorPackedTest : public ::testing::Test {
 protected:
  // Passes of two prompts and 1000 tokens.
  void Start(bool overlaps_egress, bool held_senders = false) {
    backend_ =
        std::make_unique<PackingBackend>(fixture_.shared_model(), PackLimits{2, 1000, overlaps_egress});
    ExecutorOptions options;
    options.backend = backend_.get();
    options.worker_id = "w1";
    options.metrics = &worker_metrics_;
    options.kv_stall_timeout = kPlenty;
    if (held_senders) {
      options.make_sender = [this](const KvSenderOptions& sender, const KvGeometry&) {
        return std::make_unique<HeldSender>(&gate_, sender);
      };
    }
    executor_ = std::make_unique<PrefillExecutor>(options);
  }

  v1::PrefillAssignment Make(const std::string& id, int64_t tokens) {
    v1::PrefillAssignment assignment = fixture_.Make(tokens, 1, 0);
    assignment.set_request_id(id);
    assignment.mutable_policy()->set_name("dense");
    assignment.mutable_destination()->set_kv_address(receiver_.address());
    assignment.mutable_destination()->set_session_id(id);
    return assignment;
  }
  // The assignment, of which this keeps a copy and the result, as a task.
  Task Add(const v1::PrefillAssignment& assignment) {
    Entry& entry = entries_[assignment.request_id()];
    entry.assignment = assignment;
    return {&entry.assignment, &entry.control,
            [&entry](const v1::RankProgress& progress) {
              EXPECT_EQ(progress.request_id(), entry.assignment.request_id());
              entry.layers = progress.layers_done();
              if (entry.on_progress) entry.on_progress();
            },
            [&entry](v1::ConnectRequest result) {
              absl::MutexLock lock(&entry.mutex);
              entry.result = std::move(result);
              entry.done = true;
            }};
  }
  v1::ConnectRequest ResultOf(const std::string& id) {
    Entry& entry = entries_.at(id);
    absl::MutexLock lock(&entry.mutex);
    EXPECT_TRUE(entry.mutex.AwaitWithTimeout(absl::Condition(&entry.done), kPlenty))
        << id << " is not answered";
    return entry.result;
  }
  bool Done(const std::string& id) {
    absl::MutexLock lock(&entries_.at(id).mutex);
    return entries_.at(id).done;
  }
  absl::Status ErrorOf(const std::string& id) {
    const v1::ConnectRequest result = ResultOf(id);
    EXPECT_TRUE(result.has_failed()) << id;
    EXPECT_EQ(result.failed().request_id(), id);
    return FromRpcStatus(result.failed().error());
  }
  void ExpectStored(const std::string& id) {
    const v1::ConnectRequest result = ResultOf(id);
    ASSERT_TRUE(result.has_completed()) << result.DebugString();
    const v1::PrefillAssignment& assignment = entries_.at(id).assignment;
    EXPECT_EQ(entries_.at(id).layers, assignment.layout().num_layers());
    const absl::Status committed = receiver_.Commit(assignment, {result.completed()});
    ASSERT_TRUE(committed.ok()) << id << ": " << committed;
    const std::vector<int32_t> tokens(assignment.token_ids().begin(), assignment.token_ids().end());
    const auto expected = ForwardDense(fixture_.model(), tokens);
    ASSERT_TRUE(expected.ok());
    EXPECT_EQ(result.completed().first_token(),
              static_cast<uint32_t>(TopTokens(expected->logits, 1)[0].token));
    const auto kv = receiver_.store()->Acquire(id);
    ASSERT_TRUE(kv.ok()) << kv.status();
    std::vector<float> k(expected->k.back().size());
    std::memcpy(k.data(), (*kv)->Tensor(static_cast<uint32_t>(expected->k.size() - 1), KvKind::kK),
                k.size() * sizeof(float));
    EXPECT_LE(RelativeError(k, expected->k.back()), 1e-5) << id;
  }

  struct Entry {
    v1::PrefillAssignment assignment;
    JobControl control;
    uint32_t layers = 0;
    std::function<void()> on_progress;
    absl::Mutex mutex;
    v1::ConnectRequest result ABSL_GUARDED_BY(mutex);
    bool done ABSL_GUARDED_BY(mutex) = false;
  };

  AssignmentFixture fixture_;
  Receiver receiver_;
  HeldSender::Gate gate_;
  Metrics metrics_{"test"};
  WorkerMetrics worker_metrics_{&metrics_};
  std::map<std::string, Entry> entries_;
  std::unique_ptr<PackingBackend> backend_;
  std::unique_ptr<PrefillExecutor> executor_;
};

using Passes = std::vector<std::vector<std::string>>;

TEST_F(ExecutorPackedTest, EachOfAPassHasItsOwnCacheProgressAndResult) {
  for (const bool overlaps : {false, true}) {
    SCOPED_TRACE(overlaps);
    Start(overlaps);
    for (const char* pass : {"x", "y", "z"}) {
      std::vector<Task> tasks;
      for (const auto& [id, tokens] :
           {std::pair(absl::StrCat(pass, 0, overlaps), 150), std::pair(absl::StrCat(pass, 1, overlaps), 7)}) {
        tasks.push_back(Add(Make(id, tokens)));
        receiver_.Open(entries_.at(id).assignment);
      }
      executor_->RunPacked(std::move(tasks));
    }
    for (const char* pass : {"x", "y", "z"}) {
      for (const int i : {0, 1}) ExpectStored(absl::StrCat(pass, i, overlaps));
    }
    EXPECT_EQ(backend_->passes().size(), 3u);
  }
}

TEST_F(ExecutorPackedTest, ABadAssignmentFailsAlone) {
  Start(false);
  v1::PrefillAssignment bad = Make("bad", 20);
  bad.set_token_ids(3, 1 << 30);
  receiver_.Open(Make("good", 30));

  executor_->RunPacked({Add(bad), Add(Make("good", 30))});

  EXPECT_EQ(ReasonOf(ErrorOf("bad")), v1::ERROR_REASON_TOKEN_OUT_OF_RANGE);
  ExpectStored("good");
  EXPECT_EQ(backend_->passes(), Passes{{"good"}});
}

TEST_F(ExecutorPackedTest, WhatTheBackendDoesNotPackRunsAloneAfterThePass) {
  Start(true);
  v1::PrefillAssignment sparse = Make("sparse", 40);
  sparse.mutable_policy()->set_name("a_shape");
  for (const char* id : {"sparse", "dense"}) receiver_.Open(Make(id, 40));

  executor_->RunPacked({Add(sparse), Add(Make("dense", 40))});

  ExpectStored("dense");
  EXPECT_TRUE(ResultOf("sparse").has_completed());
  EXPECT_EQ(backend_->passes(), Passes{{"dense"}});
}

TEST_F(ExecutorPackedTest, WhatGoesOnFromACheckpointSharesNoPass) {
  Start(false);
  v1::PrefillAssignment resumed = Make("resumed", 20);
  resumed.mutable_resume()->set_layer(1);
  resumed.mutable_resume()->set_world_size(2);
  resumed.mutable_resume()->set_partition(v1::PARTITION_ZIGZAG);
  resumed.mutable_resume()->set_block_tokens(16);
  resumed.mutable_resume()->add_providers(0);
  resumed.mutable_resume()->add_providers(0);
  receiver_.Open(Make("good", 30));

  executor_->RunPacked({Add(resumed), Add(Make("good", 30))});

  EXPECT_EQ(ReasonOf(ErrorOf("resumed")), v1::ERROR_REASON_CHECKPOINT_LOST);
  ExpectStored("good");
  EXPECT_EQ(backend_->passes(), Passes{{"good"}});
}

TEST_F(ExecutorPackedTest, AReceiversRefusalOfOneLeavesTheOther) {
  Start(false);
  v1::PrefillAssignment refused = Make("refused", 200);
  receiver_.Open(refused);
  refused.mutable_destination()->set_session_token("wrong");
  receiver_.Open(Make("good", 200));

  executor_->RunPacked({Add(refused), Add(Make("good", 200))});

  EXPECT_EQ(ErrorOf("refused").code(), absl::StatusCode::kPermissionDenied);
  ExpectStored("good");
}

TEST_F(ExecutorPackedTest, ACancelledOneLeavesTheOther) {
  Start(false);
  for (const char* id : {"cancelled", "good"}) receiver_.Open(Make(id, 100));
  std::vector<Task> tasks = {Add(Make("cancelled", 100)), Add(Make("good", 100))};
  Entry& entry = entries_.at("cancelled");
  entry.on_progress = [&] {
    entry.control.Cancel(MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, "enough"));
  };

  executor_->RunPacked(std::move(tasks));

  EXPECT_EQ(ReasonOf(ErrorOf("cancelled")), v1::ERROR_REASON_CANCELLED);
  EXPECT_EQ(entry.layers, 1u);
  ExpectStored("good");
}

TEST_F(ExecutorPackedTest, OneThatEndsBeforeItsPassIsAnsweredThen) {
  Start(false);
  for (const char* id : {"cancelled", "good"}) receiver_.Open(Make(id, 100));
  std::vector<Task> tasks = {Add(Make("cancelled", 100)), Add(Make("good", 100))};
  backend_->before_pass = [&] {
    entries_.at("cancelled")
        .control.Cancel(MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, "enough"));
  };
  bool answered = false;
  entries_.at("good").on_progress = [&] { answered = Done("cancelled"); };

  executor_->RunPacked(std::move(tasks));

  EXPECT_TRUE(answered) << "while the pass ran";
  EXPECT_EQ(ReasonOf(ErrorOf("cancelled")), v1::ERROR_REASON_CANCELLED);
  ExpectStored("good");
}

TEST_F(ExecutorPackedTest, TailsOfTwoPassesRunOnBesideTheNextAndNoMore) {
  Start(true, true);
  executor_->RunPacked({Add(Make("a", 20)), Add(Make("b", 20))});
  executor_->RunPacked({Add(Make("c", 20)), Add(Make("d", 20))});
  ASSERT_TRUE(gate_.WaitForWaiting(4)) << "no pass waits for the tails of the one before";
  EXPECT_EQ(executor_->kv_bytes().unacked, 4 * 60u);
  EXPECT_EQ(executor_->kv_bytes().acked, 0u) << "none runs alone";
  EXPECT_EQ(entries_.at("a").control.StepAge(), absl::ZeroDuration()) << "it waits for the decode node";
  std::vector<Task> third = {Add(Make("e", 20))};
  std::thread next([&] { executor_->RunPacked(std::move(third)); });
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(backend_->passes(), (Passes{{"a", "b"}, {"c", "d"}})) << "four senders are two passes";

  // One of them ends, and the next pass has room.
  entries_.at("c").control.Cancel(absl::CancelledError("enough"));
  EXPECT_EQ(ErrorOf("c").code(), absl::StatusCode::kCancelled);
  next.join();

  EXPECT_EQ(backend_->passes().size(), 3u);
  for (const char* id : {"a", "b", "d", "e"}) EXPECT_FALSE(Done(id)) << id;
  gate_.Open();
  for (const char* id : {"a", "b", "d", "e"}) EXPECT_TRUE(ResultOf(id).has_completed()) << id;
  executor_.reset();
  EXPECT_EQ(gate_.senders, 0);
}

TEST_F(ExecutorPackedTest, WithoutOverlapAPassWaitsForTheSendersOfTheOneBefore) {
  Start(false, true);
  backend_->before_pass = [&] {
    absl::MutexLock lock(&gate_.mutex);
    // Its own.
    EXPECT_EQ(gate_.senders, 1);
  };
  executor_->RunPacked({Add(Make("a", 20))});
  ASSERT_TRUE(gate_.WaitForWaiting(1));
  std::vector<Task> second = {Add(Make("b", 20))};
  std::thread next([&] { executor_->RunPacked(std::move(second)); });
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(backend_->passes(), Passes{{"a"}});

  gate_.Open();
  next.join();

  for (const char* id : {"a", "b"}) EXPECT_TRUE(ResultOf(id).has_completed()) << id;
  EXPECT_EQ(backend_->passes(), (Passes{{"a"}, {"b"}}));
}

TEST_F(ExecutorPackedTest, WhatIsCancelledWhileItWaitsForRoomIsAnsweredAtOnce) {
  Start(false, true);
  executor_->RunPacked({Add(Make("a", 20))});
  ASSERT_TRUE(gate_.WaitForWaiting(1));
  std::vector<Task> second = {Add(Make("b", 20)), Add(Make("c", 20))};
  std::thread next([&] { executor_->RunPacked(std::move(second)); });

  entries_.at("b").control.Cancel(absl::CancelledError("enough"));

  EXPECT_EQ(ErrorOf("b").code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(Done("a"));
  EXPECT_FALSE(Done("c"));
  entries_.at("c").control.Cancel(absl::CancelledError("enough"));
  next.join();
  EXPECT_EQ(ErrorOf("c").code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(backend_->passes(), Passes{{"a"}});
  gate_.Open();
}

TEST_F(ExecutorPackedTest, AJobThatRunsAloneWaitsForThePassesSendersOrItsCancellation) {
  Start(true, true);
  executor_->RunPacked({Add(Make("a", 20))});
  ASSERT_TRUE(gate_.WaitForWaiting(1));
  v1::ConnectRequest result;
  JobControl control;
  std::thread alone([&] {
    result = executor_->Run(Make("alone", 20), &control,
                            [](const v1::RankProgress&) { ADD_FAILURE() << "a's sender lives"; });
  });
  absl::SleepFor(absl::Milliseconds(30));

  control.Cancel(absl::CancelledError("enough"));
  alone.join();

  EXPECT_TRUE(result.has_failed());
  EXPECT_FALSE(Done("a"));
  gate_.Open();
  EXPECT_TRUE(ResultOf("a").has_completed());
}

}  // namespace
}  // namespace headwater::testing
