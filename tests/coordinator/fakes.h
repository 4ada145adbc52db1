// A cluster without a network: the real scheduler, and fakes of everything around it, with time standing
// still until a test moves it.
#ifndef HW_TESTS_COORDINATOR_FAKES_H_
#define HW_TESTS_COORDINATOR_FAKES_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "base/metrics.h"
#include "coordinator/coordinator_metrics.h"
#include "coordinator/links.h"
#include "coordinator/options.h"
#include "coordinator/scheduler.h"
#include "headwater/v1/worker.pb.h"
#include "tests/support/fake_clock.h"

namespace headwater::testing {

// Remembers what a client call would have seen, and checks the order of events as they come: accepted first,
// at most one terminal event, nothing after it.
class RecordingWatcher final : public JobWatcher {
 public:
  void OnEvent(std::shared_ptr<const v1::PrefillResponse> event) override;
  void OnRejected(const absl::Status& status) override;

  bool ended() const { return ended_; }
  bool accepted() const { return !events.empty() && events.front().has_accepted(); }
  // OK: completed. Else the status of the rejection or of the failed event.
  absl::Status result() const;
  const v1::PrefillCompleted& completed() const { return events.back().completed(); }
  int CountProgress() const;

  std::vector<v1::PrefillResponse> events;
  std::vector<std::string> violations;

 private:
  bool ended_ = false;
  absl::Status rejection_;
};

class FakeWorkerLink final : public WorkerLink {
 public:
  bool Send(v1::ConnectResponse message) override;
  void Close(const absl::Status& why) override;

  // Next unread assignment or abort; null: none.
  std::unique_ptr<v1::ConnectResponse> Next();

  std::deque<v1::ConnectResponse> unread;
  int registrations = 0;
  bool full = false;
  bool closed = false;
  absl::Status close_status;
};

// A decode node's sessions, and calls that a test answers.
class FakeDecodeClient final : public DecodeClient {
 public:
  enum class Kind { kOpen, kCommit, kAbort };
  struct Call {
    Kind kind = Kind::kOpen;
    std::string kv_address;
    v1::OpenSessionRequest open;
    v1::CommitSessionRequest commit;
    v1::AbortSessionRequest abort;
    Done done;
    absl::Duration timeout;
  };

  void OpenSession(const std::string& kv_address, v1::OpenSessionRequest request, absl::Duration timeout,
                   Done done) override;
  void CommitSession(const std::string& kv_address, v1::CommitSessionRequest request, absl::Duration timeout,
                     Done done) override;
  void AbortSession(const std::string& kv_address, v1::AbortSessionRequest request, absl::Duration timeout,
                    Done done) override;

  // Answers the call at `index` of pending; an OK answer changes the sessions as a real node would.
  void Answer(const absl::Status& status, size_t index = 0);
  // Answers all calls, and those that the answers bring about.
  void AnswerAll(const absl::Status& status = absl::OkStatus());

  std::deque<Call> pending;
  // Session id -> epoch.
  std::map<std::string, uint32_t> open_sessions;
  std::map<std::string, v1::CommitSessionRequest> committed;
  std::vector<v1::OpenSessionRequest> opened;
  int aborts = 0;
  // Sessions whose abort did not reach the node.
  std::set<std::string> left_to_the_lease;
  std::vector<std::string> violations;
};

class FakeDecodeLink final : public PeerLink {
 public:
  void Close(const absl::Status&) override { closed = true; }
  bool closed = false;
};

// A registered worker as the test plays it.
struct PlayedWorker {
  std::string id;
  uint64_t connection = 0;
  std::shared_ptr<FakeWorkerLink> link;
  // Sends no heartbeats.
  bool muted = false;
  v1::PrefillAssignment assignment;
  bool assigned = false;
};

v1::WorkerRegistration MakeWorker(const std::string& id, const std::string& incarnation = "i1");
v1::DecodeRegistration MakeDecodeNode(const std::string& id, const std::string& pool = "default");
v1::PrefillRequest MakeRequest(const std::string& id, int num_tokens);

class FakeCluster {
 public:
  explicit FakeCluster(const CoordinatorOptions& options = {});

  PlayedWorker& AddWorker(const std::string& id) { return AddWorker(MakeWorker(id)); }
  PlayedWorker& AddWorker(const v1::WorkerRegistration& registration);
  uint64_t AddDecodeNode(const std::string& id = "d0", const std::string& pool = "default");
  // Ends the stream of a worker.
  void Disconnect(const std::string& id);
  PlayedWorker& worker(const std::string& id) { return workers_.at(id); }

  // HW_CHECKs that the request is well-formed.
  std::shared_ptr<RecordingWatcher> Submit(const v1::PrefillRequest& request);
  void Detach(const std::string& request_id, std::shared_ptr<JobWatcher> watcher);

  // Takes the next message of the worker and expects an assignment (an abort).
  v1::PrefillAssignment TakeAssignment(const std::string& id);
  bool TakeAbort(const std::string& id);
  bool HasMessage(const std::string& id);
  void Progress(const std::string& id, uint32_t layers_done);
  // The share is 16 bytes of 8 * layer + rank + 1; 100 bytes and 1 block a layer.
  v1::RankCheckpoint CheckpointOf(const std::string& id, uint32_t layer);
  // Of the assignment's request, epoch and rank.
  void ReportCheckpoint(const std::string& id, const v1::RankCheckpoint& checkpoint);
  // The share is 16 bytes of rank + 1.
  v1::RankCompleted CompletionOf(const std::string& id);
  void Complete(const std::string& id) { Complete(id, CompletionOf(id)); }
  void Complete(const std::string& id, const v1::RankCompleted& completed);
  void Fail(const std::string& id, const absl::Status& status);

  // In steps of at most half a second, each with heartbeats and a tick.
  void Advance(absl::Duration duration);

  FakeClock clock;
  Metrics metrics;
  CoordinatorMetrics coordinator_metrics;
  FakeDecodeClient decode;
  Scheduler scheduler;

 private:
  std::map<std::string, PlayedWorker> workers_;
  std::map<std::string, uint64_t> decode_nodes_;

 public:
  bool decode_muted = false;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_COORDINATOR_FAKES_H_
