// A request that runs on two workers, for tests of what fails around it.
#ifndef HW_TESTS_COORDINATOR_SCHEDULER_PAIR_H_
#define HW_TESTS_COORDINATOR_SCHEDULER_PAIR_H_

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {

inline absl::Status Error(absl::StatusCode code, v1::ErrorReason reason) {
  return MakeError(code, reason, "test");
}
inline absl::Status WorkerLost() {
  return Error(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST);
}

// A request of 4000 tokens runs on w0 and w1; session and assignments are taken.
class SchedulerPairTest : public ::testing::Test {
 protected:
  void StartPair(const CoordinatorOptions& options = {}) {
    cluster_ = std::make_unique<FakeCluster>(options);
    cluster_->AddDecodeNode();
    cluster_->AddWorker("w0");
    cluster_->AddWorker("w1");
    watcher_ = cluster_->Submit(MakeRequest("r", 4000));
    cluster_->decode.AnswerAll();
    cluster_->TakeAssignment("w0");
    cluster_->TakeAssignment("w1");
  }

  // Every rank of `ids` takes its assignment and completes, and the commit is answered.
  void CompleteOn(const std::vector<std::string>& ids) {
    cluster_->decode.AnswerAll();
    for (const auto& id : ids) cluster_->TakeAssignment(id);
    for (const auto& id : ids) cluster_->Complete(id);
    cluster_->decode.AnswerAll();
  }

  void TearDown() override {
    EXPECT_TRUE(cluster_->decode.violations.empty()) << cluster_->decode.violations.front();
    EXPECT_TRUE(watcher_->violations.empty()) << watcher_->violations.front();
  }

  std::unique_ptr<FakeCluster> cluster_;
  std::shared_ptr<RecordingWatcher> watcher_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_COORDINATOR_SCHEDULER_PAIR_H_
