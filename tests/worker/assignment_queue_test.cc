// AssignmentQueue where assignments share passes, and Finisher. What the queue does with single ones stands
// in control_client_test.cc.
#include "worker/assignment_queue.h"

#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "worker/finisher.h"

namespace headwater::testing {
namespace {

constexpr absl::Duration kPlenty = absl::Seconds(20);

using Ids = std::vector<std::string>;

// Takes passes of 3 prompts and 100 tokens. A pass ends when the test says so, and its assignments when they
// are told to, or are cancelled.
class PackingRunner final : public AssignmentRunner {
 public:
  v1::ConnectRequest Run(const v1::PrefillAssignment& assignment, JobControl* control,
                         const std::function<void(const v1::RankProgress&)>&) override {
    absl::MutexLock lock(&mutex_);
    passes_.push_back({absl::StrCat("alone ", assignment.request_id())});
    AwaitRelease();
    return ResultOf(assignment, control->status());
  }
  PackLimits pack_limits() const override { return {3, 100, true}; }
  void RunPacked(std::vector<Task> tasks) override {
    absl::MutexLock lock(&mutex_);
    Ids ids;
    for (Task& task : tasks) {
      ids.push_back(task.assignment->request_id());
      open_[ids.back()] = std::move(task);
    }
    passes_.push_back(ids);
    AwaitRelease();
  }
  KvBytes kv_bytes() const override { return {}; }

  // Lets passes return, one for each call.
  void Release() {
    absl::MutexLock lock(&mutex_);
    ++releases_;
  }
  // Answers the assignment, with its control's status where that is not OK.
  void End(const std::string& id) {
    Task task;
    {
      absl::MutexLock lock(&mutex_);
      task = std::move(open_.extract(id).mapped());
    }
    task.done(ResultOf(*task.assignment, task.control->status()));
  }
  absl::Status StatusOf(const std::string& id) {
    absl::MutexLock lock(&mutex_);
    return open_.at(id).control->status();
  }
  std::vector<Ids> WaitForPasses(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto reached = [&] { return passes_.size() >= count; };
    mutex_.AwaitWithTimeout(absl::Condition(&reached), kPlenty);
    return passes_;
  }

 private:
  void AwaitRelease() {
    const auto released = [this] { return releases_ > 0; };
    mutex_.AwaitWithTimeout(absl::Condition(&released), kPlenty);
    --releases_;
  }
  static v1::ConnectRequest ResultOf(const v1::PrefillAssignment& assignment, const absl::Status& status) {
    if (!status.ok()) {
      return MakeRankFailed(assignment.request_id(), assignment.epoch(), assignment.rank(), status);
    }
    v1::ConnectRequest result;
    result.mutable_completed()->set_request_id(assignment.request_id());
    result.mutable_completed()->set_epoch(assignment.epoch());
    return result;
  }

  absl::Mutex mutex_;
  std::vector<Ids> passes_;
  std::map<std::string, Task> open_;
  int releases_ = 0;
};

v1::PrefillAssignment Assignment(const std::string& id, int num_tokens) {
  v1::PrefillAssignment assignment;
  assignment.set_request_id(id);
  assignment.set_epoch(1);
  assignment.mutable_plan()->set_world_size(1);
  assignment.mutable_policy()->set_name("dense");
  assignment.mutable_token_ids()->Resize(num_tokens, 1);
  return assignment;
}

class AssignmentQueueTest : public ::testing::Test {
 protected:
  ~AssignmentQueueTest() override {
    for (int i = 0; i < 20; ++i) runner_.Release();
  }
  // Occupies the runner's thread, so that what is added then waits.
  void Block() {
    queue_.Add(1, Assignment("blocker", 1));
    ASSERT_EQ(runner_.WaitForPasses(1).size(), 1u);
  }
  // Lets the blocker's pass return; later passes wait for Release() as well.
  void Unblock() {
    runner_.Release();
    runner_.End("blocker");
  }
  void Abort(const std::string& id) {
    v1::AbortAssignment abort;
    abort.set_request_id(id);
    abort.set_epoch(1);
    queue_.Abort(1, abort);
  }
  // "id" of a completed one, "id CODE" of another, in the order of their ends.
  Ids Results() {
    absl::MutexLock lock(&mutex_);
    return results_;
  }
  void Send(const v1::ConnectRequest& message) {
    absl::MutexLock lock(&mutex_);
    results_.push_back(message.has_completed()
                           ? message.completed().request_id()
                           : absl::StrCat(message.failed().request_id(), " ",
                                          absl::StatusCodeToString(static_cast<absl::StatusCode>(
                                              message.failed().error().code()))));
  }

  absl::Mutex mutex_;
  Ids results_;
  PackingRunner runner_;
  AssignmentQueue queue_{&runner_, 20,
                         [this](uint64_t, const v1::ConnectRequest& message) { Send(message); }};
};

TEST_F(AssignmentQueueTest, PacksThoseInFrontThatFitInTheirOrder) {
  Block();
  for (const auto& [id, tokens] : {std::pair("a", 10), std::pair("b", 10), std::pair("c", 10),
                                   std::pair("d", 60), std::pair("e", 41), std::pair("f", 1)}) {
    queue_.Add(1, Assignment(id, tokens));
  }
  Unblock();
  for (int i = 0; i < 3; ++i) runner_.Release();

  const auto passes = runner_.WaitForPasses(4);

  ASSERT_EQ(passes.size(), 4u);
  EXPECT_EQ(passes[1], (Ids{"a", "b", "c"})) << "three prompts";
  EXPECT_EQ(passes[2], Ids{"d"}) << "e would make 101 tokens, and f does not pass it";
  EXPECT_EQ(passes[3], (Ids{"e", "f"}));
  for (const char* id : {"f", "a", "b", "c", "d", "e"}) runner_.End(id);
  EXPECT_EQ(Results(), (Ids{"blocker", "f", "a", "b", "c", "d", "e"}));
}

TEST_F(AssignmentQueueTest, WhatMayNotBePackedRunsAloneAndInItsTurn) {
  Block();
  v1::PrefillAssignment sparse = Assignment("sparse", 10);
  sparse.mutable_policy()->set_name("a_shape");
  v1::PrefillAssignment pair = Assignment("pair", 10);
  pair.mutable_plan()->set_world_size(2);
  for (const auto& assignment : {Assignment("a", 10), sparse, Assignment("b", 10), pair,
                                 Assignment("long", 101), Assignment("c", 100)}) {
    queue_.Add(1, assignment);
  }
  Unblock();
  for (int i = 0; i < 6; ++i) runner_.Release();

  EXPECT_EQ(
      runner_.WaitForPasses(7),
      (std::vector<Ids>{{"blocker"}, {"a"}, {"alone sparse"}, {"b"}, {"alone pair"}, {"alone long"}, {"c"}}));
  for (const char* id : {"a", "b", "c"}) runner_.End(id);
}

TEST_F(AssignmentQueueTest, AnAbortCancelsOneOfAPass) {
  Block();
  for (const char* id : {"a", "b", "c"}) queue_.Add(1, Assignment(id, 10));
  Unblock();
  ASSERT_EQ(runner_.WaitForPasses(2).size(), 2u);

  Abort("b");

  EXPECT_TRUE(runner_.StatusOf("a").ok());
  EXPECT_TRUE(absl::IsCancelled(runner_.StatusOf("b")));
  EXPECT_TRUE(runner_.StatusOf("c").ok());
  for (const char* id : {"a", "b", "c"}) runner_.End(id);
  EXPECT_EQ(Results(), (Ids{"blocker", "a", "b CANCELLED", "c"}));
  Abort("b");
  EXPECT_EQ(Results().size(), 4u) << "an ended one has been answered";
  runner_.Release();
}

TEST_F(AssignmentQueueTest, ADeadlineCancelsOneOfAPassAndTheNextIsTold) {
  Block();
  v1::PrefillAssignment late = Assignment("late", 10), later = Assignment("later", 10);
  late.set_deadline_ms(1);
  later.set_deadline_ms(60'000);
  for (const auto& assignment : {late, later, Assignment("never", 10)}) queue_.Add(1, assignment);
  Unblock();
  ASSERT_EQ(runner_.WaitForPasses(2)[1].size(), 3u);
  absl::SleepFor(absl::Milliseconds(2));

  const absl::Duration left = queue_.EnforceDeadline();

  EXPECT_GT(left, absl::Seconds(50));
  EXPECT_LE(left, absl::Seconds(60));
  for (const char* id : {"never", "later", "late"}) runner_.End(id);
  EXPECT_EQ(Results(), (Ids{"blocker", "never", "later", "late DEADLINE_EXCEEDED"}));
  EXPECT_EQ(queue_.EnforceDeadline(), absl::InfiniteDuration());
  runner_.Release();
}

TEST_F(AssignmentQueueTest, DrainsWhatRunsAndWhatThePassLeftBehind) {
  Block();
  for (const char* id : {"a", "b"}) queue_.Add(1, Assignment(id, 10));
  Unblock();
  ASSERT_EQ(runner_.WaitForPasses(2).size(), 2u);
  queue_.Add(1, Assignment("waits", 10));
  queue_.StartDraining();
  queue_.Add(1, Assignment("late", 10));
  EXPECT_EQ(Results(), (Ids{"blocker", "waits UNAVAILABLE", "late UNAVAILABLE"}));

  runner_.Release();
  runner_.End("a");
  EXPECT_FALSE(queue_.WaitIdle(absl::Milliseconds(20))) << "b is not answered";
  runner_.End("b");

  EXPECT_TRUE(queue_.WaitIdle(kPlenty));
  EXPECT_TRUE(queue_.idle());
}

TEST_F(AssignmentQueueTest, WhatABrokenStreamLeftRunningDoesNotHideItsNameOnTheNext) {
  Block();
  queue_.DropAll(absl::CancelledError("the stream broke"));
  queue_.Add(2, Assignment("blocker", 10));
  runner_.End("blocker");
  runner_.Release();
  ASSERT_EQ(runner_.WaitForPasses(2).back(), Ids{"blocker"});
  EXPECT_TRUE(runner_.StatusOf("blocker").ok());

  v1::AbortAssignment abort;
  abort.set_request_id("blocker");
  abort.set_epoch(1);
  queue_.Abort(2, abort);

  EXPECT_TRUE(absl::IsCancelled(runner_.StatusOf("blocker"))) << "the end of the first is not its end";
  runner_.End("blocker");
  EXPECT_EQ(Results(), (Ids{"blocker CANCELLED", "blocker CANCELLED"}));
}

TEST_F(AssignmentQueueTest, AReturnedPassLeavesRoomForTheNextWhileItsResultsAreOut) {
  queue_.Add(1, Assignment("a", 10));
  ASSERT_EQ(runner_.WaitForPasses(1).size(), 1u);
  runner_.Release();
  queue_.Add(1, Assignment("b", 10));
  EXPECT_EQ(runner_.WaitForPasses(2).size(), 2u);
  queue_.Add(1, Assignment("a", 10));
  EXPECT_TRUE(Results().empty()) << "a is still here: its repetition is ignored";

  runner_.Release();
  runner_.End("b");
  runner_.End("a");

  EXPECT_EQ(Results(), (Ids{"b", "a"}));
  EXPECT_TRUE(queue_.idle());
}

TEST_F(AssignmentQueueTest, TheStepAgeIsThatOfTheOneThatIsStuckLongest) {
  Block();
  EXPECT_LT(queue_.StepAge(), absl::Seconds(10));
  absl::SleepFor(absl::Milliseconds(30));
  queue_.Add(1, Assignment("a", 10));
  runner_.Release();
  ASSERT_EQ(runner_.WaitForPasses(2).size(), 2u);

  EXPECT_GE(queue_.StepAge(), absl::Milliseconds(30)) << "the blocker's";
  runner_.End("blocker");
  runner_.End("a");
  EXPECT_EQ(queue_.StepAge(), absl::ZeroDuration());
  runner_.Release();
}

TEST_F(AssignmentQueueTest, StopCancelsAllAndWaitsForTheirResults) {
  Block();
  for (const char* id : {"a", "b"}) queue_.Add(1, Assignment(id, 10));
  Unblock();
  ASSERT_EQ(runner_.WaitForPasses(2).size(), 2u);
  runner_.Release();
  std::thread runner([&] {
    while (runner_.StatusOf("b").ok()) absl::SleepFor(absl::Milliseconds(1));
    runner_.End("a");
    runner_.End("b");
  });

  queue_.Stop();

  EXPECT_EQ(Results(), (Ids{"blocker", "a CANCELLED", "b CANCELLED"}));
  runner.join();
}

TEST(FinisherTest, RunsWorksBesideEachOtherAndCountsThem) {
  Finisher finisher;
  absl::Notification first, second;
  finisher.Add([&] { first.WaitForNotificationWithTimeout(kPlenty); });
  finisher.Add([&] { second.WaitForNotificationWithTimeout(kPlenty); });
  EXPECT_FALSE(finisher.WaitUntil(1, absl::Milliseconds(10)));

  second.Notify();
  EXPECT_TRUE(finisher.WaitUntil(1, kPlenty)) << "the first holds up nobody";
  EXPECT_FALSE(finisher.WaitUntil(0, absl::Milliseconds(10)));
  first.Notify();

  EXPECT_TRUE(finisher.WaitUntil(0, kPlenty));
}

TEST(FinisherTest, ItsEndWaitsForTheWorks) {
  bool done = false;
  {
    Finisher finisher;
    finisher.Add([&] {
      absl::SleepFor(absl::Milliseconds(20));
      done = true;
    });
  }
  EXPECT_TRUE(done);
}

}  // namespace
}  // namespace headwater::testing
