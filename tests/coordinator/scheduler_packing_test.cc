// Short prompts of which a worker computes several in one pass.
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

// Workers of the names given take passes of 4 prompts and 1000 tokens; all sessions open at once.
class SchedulerPackingTest : public ::testing::Test {
 protected:
  void Start(const std::vector<std::string>& workers, const CoordinatorOptions& options = {}) {
    cluster_ = std::make_unique<FakeCluster>(options);
    cluster_->AddDecodeNode();
    for (const std::string& id : workers) {
      auto registration = MakeWorker(id);
      registration.set_max_packed_prompts(4);
      registration.set_max_packed_tokens(1000);
      cluster_->AddWorker(registration);
    }
  }

  std::shared_ptr<RecordingWatcher> Submit(const std::string& id, int num_tokens, int32_t priority = 0) {
    v1::PrefillRequest request = MakeRequest(id, num_tokens);
    request.set_priority(priority);
    watchers_[id] = cluster_->Submit(request);
    return watchers_[id];
  }

  // Submits a0, a1, ... and opens their sessions.
  void SubmitMany(int count, int num_tokens) {
    for (int i = 0; i < count; ++i) Submit(absl::StrCat("a", i), num_tokens);
    cluster_->decode.AnswerAll();
  }

  // Takes all that the worker has been sent; the assignments' ids, aborts as "-id".
  std::vector<std::string> Take(const std::string& worker) {
    std::vector<std::string> ids;
    while (const auto message = cluster_->worker(worker).link->Next()) {
      if (message->has_assignment()) {
        ids.push_back(message->assignment().request_id());
        assignments_[ids.back()] = message->assignment();
      } else {
        ids.push_back("-" + message->abort().request_id());
      }
    }
    return ids;
  }

  void Complete(const std::string& worker, const std::string& id) {
    cluster_->worker(worker).assignment = assignments_.at(id);
    cluster_->Complete(worker);
    cluster_->decode.AnswerAll();
  }

  void Fail(const std::string& worker, const std::string& id, const absl::Status& status) {
    cluster_->worker(worker).assignment = assignments_.at(id);
    cluster_->Fail(worker, status);
    cluster_->decode.AnswerAll();
  }

  void TearDown() override {
    EXPECT_TRUE(cluster_->decode.violations.empty()) << cluster_->decode.violations.front();
    for (const auto& [id, watcher] : watchers_) {
      EXPECT_TRUE(watcher->violations.empty()) << id << ": " << watcher->violations.front();
    }
  }

  using Ids = std::vector<std::string>;
  std::unique_ptr<FakeCluster> cluster_;
  std::map<std::string, std::shared_ptr<RecordingWatcher>> watchers_;
  std::map<std::string, v1::PrefillAssignment> assignments_;
};

TEST_F(SchedulerPackingTest, AWorkerGetsTwoPassesOfPromptsAndAnotherForEachThatEnds) {
  Start({"w0"});
  SubmitMany(10, 100);

  EXPECT_EQ(Take("w0"), (Ids{"a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"}));
  const auto workers = cluster_->scheduler.ListWorkers();
  EXPECT_EQ(workers.workers(0).num_requests(), 8u);
  EXPECT_EQ(workers.workers(0).num_tokens(), 800u);
  EXPECT_EQ(workers.workers(0).request_id(), "a0");
  EXPECT_EQ(cluster_->coordinator_metrics.requests_running.Value(), 8);
  Complete("w0", "a5");
  EXPECT_EQ(Take("w0"), Ids{"a8"});
  for (const char* id : {"a0", "a1", "a2", "a3", "a4", "a6", "a7"}) Complete("w0", id);
  EXPECT_EQ(Take("w0"), Ids{"a9"});
  for (const char* id : {"a9", "a8"}) Complete("w0", id);

  for (const auto& [id, watcher] : watchers_) EXPECT_TRUE(watcher->result().ok()) << id << watcher->result();
  EXPECT_EQ(cluster_->scheduler.ListWorkers().workers(0).num_requests(), 0u);
}

TEST_F(SchedulerPackingTest, BoundsTheTokensToo) {
  Start({"w0"});
  SubmitMany(5, 500);

  EXPECT_EQ(Take("w0"), (Ids{"a0", "a1", "a2", "a3"}));
  Complete("w0", "a1");

  EXPECT_EQ(Take("w0"), Ids{"a4"});
}

TEST_F(SchedulerPackingTest, TheWorkerWithTheFewestTokensGetsTheNextPrompt) {
  Start({"w0", "w1"});
  Submit("big", 800);
  for (const char* id : {"s1", "s2", "s3"}) Submit(id, 300);
  cluster_->decode.AnswerAll();

  EXPECT_EQ(Take("w0"), Ids{"big"});
  EXPECT_EQ(Take("w1"), (Ids{"s1", "s2", "s3"}));
  Submit("s4", 300);
  cluster_->decode.AnswerAll();
  EXPECT_EQ(Take("w0"), Ids{"s4"}) << "w0 holds 800 tokens, w1 900";
}

TEST_F(SchedulerPackingTest, OtherPoliciesLongerPromptsAndWorkersThatDoNotPackRunAlone) {
  Start({"w0"});
  v1::PrefillRequest sparse = MakeRequest("sparse", 100);
  sparse.mutable_policy()->set_name("a_shape");
  watchers_["sparse"] = cluster_->Submit(sparse);
  Submit("long", 1001);
  Submit("short", 100);
  cluster_->decode.AnswerAll();
  for (const char* id : {"sparse", "long", "short"}) {
    EXPECT_EQ(Take("w0"), Ids{id});
    Complete("w0", id);
  }
  cluster_->Disconnect("w0");
  cluster_->AddWorker("alone");
  SubmitMany(2, 100);
  EXPECT_EQ(Take("alone"), Ids{"a0"});
}

TEST_F(SchedulerPackingTest, ADefaultPolicyThatIsDenseForShortPromptsPacksThem) {
  Start({});
  auto registration = MakeWorker("gpu");
  registration.set_max_packed_prompts(4);
  registration.set_max_packed_tokens(1000);
  registration.add_policies("headwater");
  registration.set_default_policy("headwater");
  registration.set_serves_quality(true);
  registration.add_policy_limits()->set_name("headwater");
  registration.mutable_policy_limits(0)->set_dense_below_tokens(500);
  cluster_->AddWorker(registration);
  v1::PrefillRequest bound = MakeRequest("bound", 100), tuned = MakeRequest("tuned", 100);
  bound.mutable_quality()->set_min_recall(0.9);
  tuned.mutable_policy()->set_name("headwater");
  (*tuned.mutable_policy()->mutable_parameters())["dense_below_tokens"] = 0;

  for (const char* id : {"a0", "a1"}) Submit(id, 499);
  Submit("searched", 500);
  watchers_["bound"] = cluster_->Submit(bound);
  watchers_["tuned"] = cluster_->Submit(tuned);
  Submit("last", 10);
  cluster_->decode.AnswerAll();

  EXPECT_EQ(Take("gpu"), (Ids{"a0", "a1"}));
  EXPECT_EQ(assignments_["a0"].policy().name(), "headwater");
  for (const char* id : {"a0", "a1"}) Complete("gpu", id);
  for (const char* id : {"searched", "bound", "tuned", "last"}) {
    EXPECT_EQ(Take("gpu"), Ids{id});
    Complete("gpu", id);
  }
  EXPECT_EQ(assignments_["bound"].quality().min_recall(), 0.9);
  EXPECT_EQ(watchers_["last"]->completed().attention().policy(), "headwater");
}

TEST_F(SchedulerPackingTest, NothingPassesALongPromptThatWaitsForTheWorker) {
  Start({"w0"});
  SubmitMany(3, 100);
  Take("w0");
  Submit("long", 1500);
  for (int i = 0; i < 5; ++i) Submit(absl::StrCat("late", i), 100);
  cluster_->decode.AnswerAll();
  EXPECT_EQ(Take("w0"), Ids{}) << "the worker has room, and the long prompt comes first";

  for (const char* id : {"a0", "a1"}) Complete("w0", id);
  EXPECT_EQ(Take("w0"), Ids{});
  Complete("w0", "a2");
  EXPECT_EQ(Take("w0"), Ids{"long"});
  Complete("w0", "long");

  EXPECT_EQ(Take("w0"), (Ids{"late0", "late1", "late2", "late3", "late4"}));
}

TEST_F(SchedulerPackingTest, AnUrgentLongPromptIsNotPassedByPromptsThatWaitedBefore) {
  Start({"w0"});
  SubmitMany(10, 100);
  Take("w0");
  Submit("urgent", 1500, 5);
  for (int i = 0; i < 8; ++i) Complete("w0", absl::StrCat("a", i));

  EXPECT_EQ(Take("w0"), Ids{"urgent"});
  Complete("w0", "urgent");
  EXPECT_EQ(Take("w0"), (Ids{"a8", "a9"}));
}

TEST_F(SchedulerPackingTest, ALostWorkersJobsAllGoOnInTheirNextEpoch) {
  Start({"w0"});
  SubmitMany(5, 100);
  ASSERT_EQ(Take("w0").size(), 5u);
  auto registration = MakeWorker("w1");
  registration.set_max_packed_prompts(8);
  registration.set_max_packed_tokens(1000);
  cluster_->AddWorker(registration);

  cluster_->Disconnect("w0");
  cluster_->decode.AnswerAll();

  ASSERT_EQ(Take("w1").size(), 5u);
  for (const auto& [id, watcher] : watchers_) {
    EXPECT_EQ(assignments_.at(id).epoch(), 2u) << id;
    Complete("w1", id);
    ASSERT_TRUE(watcher->result().ok()) << id << ": " << watcher->result();
    EXPECT_EQ(watcher->completed().retries(), 1u);
  }
}

TEST_F(SchedulerPackingTest, CancelOfOneAbortsItAndLeavesTheOthers) {
  Start({"w0"});
  SubmitMany(9, 100);
  ASSERT_EQ(Take("w0").size(), 8u);
  std::optional<bool> cancelled;
  cluster_->scheduler.Cancel(JobKey{"", "a3"},
                             [&](const absl::StatusOr<bool>& ok) { cancelled = ok.value(); });

  EXPECT_EQ(Take("w0"), Ids{"-a3"}) << "it counts as the worker's until the answer";
  Fail("w0", "a3", absl::CancelledError("aborted"));

  EXPECT_EQ(cancelled, true);
  EXPECT_EQ(watchers_["a3"]->result().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(Take("w0"), Ids{"a8"});
  for (const char* id : {"a0", "a1", "a2", "a4", "a5", "a6", "a7", "a8"}) {
    Complete("w0", id);
    EXPECT_TRUE(watchers_[id]->result().ok()) << id;
  }
}

TEST_F(SchedulerPackingTest, AWorkerThatAnswersNoAbortIsLostWithAllItsJobs) {
  CoordinatorOptions options;
  options.abort_wait = absl::Seconds(10);
  Start({"w0", "w1"}, options);
  SubmitMany(4, 100);
  EXPECT_EQ(Take("w0"), (Ids{"a0", "a2"}));
  EXPECT_EQ(Take("w1"), (Ids{"a1", "a3"}));
  cluster_->scheduler.Cancel(JobKey{"", "a0"}, [](const absl::StatusOr<bool>&) {});

  cluster_->Advance(absl::Seconds(11));
  cluster_->decode.AnswerAll();

  EXPECT_TRUE(cluster_->worker("w0").link->closed);
  EXPECT_EQ(watchers_["a0"]->result().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(Take("w1"), Ids{"a2"}) << "in its next epoch, beside the others";
}

TEST_F(SchedulerPackingTest, ADrainingWorkersWaitingJobsGoToAnother) {
  Start({"w0"});
  SubmitMany(5, 100);
  ASSERT_EQ(Take("w0").size(), 5u);
  const absl::Status draining =
      MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING, "draining");
  for (const char* id : {"a2", "a3", "a4"}) Fail("w0", id, draining);
  EXPECT_EQ(Take("w0"), Ids{}) << "it gets nothing new";
  for (const char* id : {"a0", "a1"}) Complete("w0", id);
  cluster_->AddWorker("w1");
  cluster_->decode.AnswerAll();

  for (const char* id : {"a2", "a3", "a4"}) {
    EXPECT_EQ(Take("w1"), Ids{id});
    Complete("w1", id);
  }
  for (const auto& [id, watcher] : watchers_) EXPECT_TRUE(watcher->result().ok()) << id;
}

TEST_F(SchedulerPackingTest, SessionCallsThatANodeHasNoRoomForAreMadeAgain) {
  Start({"w0"});
  const absl::Status full =
      MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL, "calls wait already");
  for (const char* id : {"a", "b"}) Submit(id, 100);
  cluster_->decode.Answer(full, 1);
  cluster_->decode.AnswerAll();
  EXPECT_EQ(Take("w0"), Ids{"a"});
  EXPECT_FALSE(watchers_["b"]->ended());

  cluster_->Advance(absl::Milliseconds(500));
  cluster_->decode.AnswerAll();

  ASSERT_EQ(Take("w0"), Ids{"b"});
  cluster_->worker("w0").assignment = assignments_["b"];
  cluster_->Complete("w0");
  cluster_->decode.Answer(full);
  EXPECT_FALSE(watchers_["b"]->ended());
  cluster_->Advance(absl::Milliseconds(500));
  cluster_->decode.AnswerAll();
  EXPECT_TRUE(watchers_["b"]->result().ok());
}

TEST_F(SchedulerPackingTest, TenantsRequestsOfOneIdDoNotMeetAtAWorker) {
  Start({"w0"});
  for (const char* tenant : {"red", "blue"}) {
    v1::PrefillRequest request = MakeRequest("same", 100);
    request.set_tenant(tenant);
    watchers_[tenant] = cluster_->Submit(request);
  }
  cluster_->decode.AnswerAll();
  ASSERT_EQ(Take("w0"), Ids{"same"});
  EXPECT_EQ(assignments_["same"].tenant(), "red");

  Complete("w0", "same");

  EXPECT_TRUE(watchers_["red"]->result().ok());
  EXPECT_FALSE(watchers_["blue"]->ended());
  ASSERT_EQ(Take("w0"), Ids{"same"});
  EXPECT_EQ(assignments_["same"].tenant(), "blue");
}

TEST_F(SchedulerPackingTest, JobsThatNoWorkersCanRunAreLookedAtAgainWhenWorkersCome) {
  Start({"w0", "w1"});
  v1::PrefillRequest pair = MakeRequest("pair", 100);
  pair.set_world_size(2);
  Submit("first", 1500);
  watchers_["pair"] = cluster_->Submit(pair);
  cluster_->Disconnect("w1");
  Submit("short", 100);
  cluster_->decode.AnswerAll();
  Take("w0");
  Complete("w0", "first");
  EXPECT_EQ(Take("w0"), Ids{"short"}) << "past the one that cannot be planned";
  Complete("w0", "short");

  cluster_->AddWorker("w2");
  cluster_->decode.AnswerAll();

  EXPECT_EQ(Take("w0"), Ids{"pair"});
  EXPECT_EQ(Take("w2"), Ids{"pair"});
}

}  // namespace
}  // namespace headwater::testing
