// Random schedules: whatever happens in whatever order, every request ends exactly once and nothing is left.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

constexpr int kSteps = 400;
constexpr int kNumWorkers = 4;

// A worker process, as the coordinator sees it: it obeys, mostly.
struct SimulatedWorker {
  bool connected = false;
  uint64_t connection = 0;
  std::shared_ptr<FakeWorkerLink> link;
  // One, or several that one pass may hold.
  std::vector<v1::PrefillAssignment> held;
  // Whose checkpoints it has.
  v1::PrefillAssignment last;
};

constexpr uint32_t kPackedPrompts = 2;
constexpr uint32_t kPackedTokens = 80;

// Odd workers pack.
bool Packs(int index) { return index % 2 == 1; }

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed), cluster_(Options()) {
    cluster_.AddDecodeNode("d0");
    cluster_.AddDecodeNode("d1");
  }

  // Counts what happened into `outcomes`.
  void Run(std::map<std::string, int>* outcomes) {
    for (int step = 0; step < kSteps; ++step) Step();
    Settle();
    Check();
    for (const auto& [outcome, count] : outcomes_) (*outcomes)[outcome] += count;
  }

 private:
  static CoordinatorOptions Options() {
    CoordinatorOptions options;
    options.max_queue_requests = 20;
    options.max_queue_wait = absl::Seconds(40);
    options.worker_wait = absl::Seconds(8);
    options.decode_grace = absl::Seconds(5);
    options.reserve_wait = absl::Seconds(3);
    return options;
  }

  int Below(int bound) { return std::uniform_int_distribution<int>(0, bound - 1)(random_); }
  bool OneIn(int n) { return Below(n) == 0; }

  void Step() {
    switch (Below(14)) {
      case 0:
      case 1:
        Submit();
        break;
      case 2:
        Connect(Below(kNumWorkers));
        break;
      case 3:
        if (OneIn(6)) Disconnect(Below(kNumWorkers));
        break;
      case 4:
        if (OneIn(3)) LeaveOne();
        break;
      case 5:
        if (OneIn(3)) CancelOne();
        break;
      case 6:
        cluster_.Advance(absl::Milliseconds(100 * (1 + Below(15))));
        Heartbeats();
        break;
      case 7:
      case 8:
      case 9:
        AnswerDecode();
        break;
      default:
        PlayWorker(workers_[static_cast<size_t>(Below(kNumWorkers))]);
        break;
    }
    CheckStep();
  }

  void Submit() {
    // Few ids, so that requests meet their own repetitions.
    const int id = Below(60);
    v1::PrefillRequest request = MakeRequest(absl::StrCat("r", id), OneIn(3) ? 3000 : 10 + id);
    request.set_priority(id % 3);
    if (id % 5 == 0) request.mutable_deadline()->set_seconds(1 + id);
    if (id % 7 == 0) request.set_world_size(2);
    const auto watcher = cluster_.Submit(request);
    watchers_.emplace_back(request.request_id(), watcher);
  }

  void Connect(int index) {
    SimulatedWorker& worker = workers_[static_cast<size_t>(index)];
    SimulatedWorker fresh;
    fresh.link = std::make_shared<FakeWorkerLink>();
    auto registration = MakeWorker(absl::StrCat("w", index), absl::StrCat("i", ++incarnations_));
    if (Packs(index)) {
      registration.set_max_packed_prompts(kPackedPrompts);
      registration.set_max_packed_tokens(kPackedTokens);
    }
    const auto connection = cluster_.scheduler.AddWorker(registration, fresh.link);
    ASSERT_TRUE(connection.ok()) << connection.status();
    fresh.connection = *connection;
    fresh.connected = true;
    worker = std::move(fresh);
  }

  void Disconnect(int index) {
    SimulatedWorker& worker = workers_[static_cast<size_t>(index)];
    if (!worker.connected) return;
    worker.connected = false;
    cluster_.scheduler.OnWorkerClosed(worker.connection);
  }

  void LeaveOne() {
    if (watchers_.empty()) return;
    const auto& [id, watcher] = watchers_[static_cast<size_t>(Below(static_cast<int>(watchers_.size())))];
    left_.insert(watcher.get());
    cluster_.Detach(id, watcher);
  }

  void CancelOne() {
    ++cancels_asked_;
    cluster_.scheduler.Cancel(JobKey{"", absl::StrCat("r", Below(60))},
                              [this](const absl::StatusOr<bool>&) { ++cancels_answered_; });
  }

  void Heartbeats() {
    v1::ConnectRequest message;
    message.mutable_heartbeat();
    for (auto& worker : workers_) {
      if (worker.connected && !OneIn(5)) cluster_.scheduler.OnWorkerMessage(worker.connection, message);
    }
  }

  void AnswerDecode() {
    auto& pending = cluster_.decode.pending;
    if (pending.empty()) return;
    const auto index = static_cast<size_t>(Below(static_cast<int>(pending.size())));
    // A node answers OK, is away, or has forgotten the session.
    if (OneIn(12)) {
      cluster_.decode.Answer(absl::UnavailableError("away"), index);
    } else if (OneIn(15) && pending[index].kind == FakeDecodeClient::Kind::kCommit) {
      Forget(pending[index].commit.session_id(), index);
    } else {
      AnswerWell(index);
    }
  }

  void Forget(const std::string& session_id, size_t index) {
    cluster_.decode.open_sessions.erase(session_id);
    cluster_.decode.Answer(
        MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION, "forgotten"), index);
  }

  // A session that is to go on may be gone all the same.
  void AnswerWell(size_t index) {
    const v1::OpenSessionRequest open = cluster_.decode.pending[index].open;
    if (open.resume_layer() > 0 && OneIn(3)) {
      ++outcomes_["forgotten at the open"];
      Forget(open.session_id(), index);
    } else {
      cluster_.decode.Answer(absl::OkStatus(), index);
    }
  }

  void PlayWorker(SimulatedWorker& worker) {
    if (!worker.connected || worker.link->closed) return;
    const auto message = worker.link->Next();
    if (message != nullptr && message->has_assignment()) {
      const v1::PrefillAssignment& assignment = message->assignment();
      const auto session = cluster_.decode.open_sessions.find(assignment.destination().session_id());
      EXPECT_TRUE(session == cluster_.decode.open_sessions.end() || session->second >= assignment.epoch())
          << "assigned before the session was open";
      CheckResume(worker, assignment);
      worker.held.push_back(assignment);
      worker.last = assignment;
      CheckHeld(worker);
    } else if (message != nullptr && message->has_abort()) {
      const auto mine = std::find_if(worker.held.begin(), worker.held.end(), [&](const auto& held) {
        return held.request_id() == message->abort().request_id() && held.epoch() == message->abort().epoch();
      });
      if (mine != worker.held.end()) {
        Report(worker, static_cast<size_t>(mine - worker.held.begin()), absl::CancelledError("aborted"));
      }
    } else if (!worker.held.empty() && !OneIn(3)) {
      Work(worker, static_cast<size_t>(Below(static_cast<int>(worker.held.size()))));
    }
  }

  // An epoch goes on from where the node was told, from a layer that all ranks reported, and from workers
  // that have it.
  void CheckResume(const SimulatedWorker& worker, const v1::PrefillAssignment& assignment) {
    const std::string& session = assignment.destination().session_id();
    const v1::ResumePoint& resume = assignment.resume();
    for (const v1::OpenSessionRequest& open : cluster_.decode.opened) {
      if (open.session_id() != session || open.epoch() != assignment.epoch()) continue;
      EXPECT_EQ(open.resume_layer(), resume.layer());
    }
    if (!assignment.has_resume()) return;
    ++outcomes_["resumed"];
    EXPECT_TRUE(resume.layer() >= 1 && resume.layer() <= 4) << resume.layer();
    ASSERT_EQ(resume.providers_size(), static_cast<int>(resume.world_size()));
    for (uint32_t rank = 0; rank < resume.world_size(); ++rank) {
      const auto& layers = reported_[{session, resume.epoch(), rank}];
      EXPECT_TRUE(layers.contains(resume.layer())) << "rank " << rank;
      if (resume.providers(static_cast<int>(rank)) != assignment.rank()) continue;
      EXPECT_EQ(worker.last.destination().session_id(), session);
      EXPECT_EQ(worker.last.epoch(), resume.epoch());
      const uint32_t was = worker.last.rank();
      EXPECT_TRUE(was == rank || was == (rank + 1) % resume.world_size()) << was << " provides " << rank;
    }
  }

  void CheckHeld(const SimulatedWorker& worker) {
    if (worker.held.size() <= 1) return;
    ++outcomes_["packed"];
    const bool packs = Packs(static_cast<int>(&worker - workers_.data()));
    uint32_t tokens = 0;
    for (const auto& held : worker.held) {
      tokens += static_cast<uint32_t>(held.token_ids_size());
      EXPECT_TRUE(packs && held.plan().world_size() == 1 && held.token_ids_size() <= int{kPackedTokens})
          << held.request_id() << " runs alone";
    }
    EXPECT_LE(worker.held.size(), 2 * kPackedPrompts);
    EXPECT_LE(tokens, 2 * kPackedTokens);
  }

  void Work(SimulatedWorker& worker, size_t index) {
    const v1::PrefillAssignment& assignment = worker.held[index];
    // Ranks that share a prompt speak of their checkpoints more than they end.
    const bool group = assignment.plan().world_size() > 1;
    if (OneIn(2) || (group && !OneIn(3))) {
      v1::ConnectRequest progress;
      progress.mutable_progress()->set_request_id(assignment.request_id());
      progress.mutable_progress()->set_epoch(assignment.epoch());
      progress.mutable_progress()->set_rank(assignment.rank());
      const auto layer = static_cast<uint32_t>(group && !OneIn(4) ? 2 : Below(6));
      progress.mutable_progress()->set_layers_done(layer);
      if (group || OneIn(9))
        AddCheckpoint(assignment, layer, progress.mutable_progress()->mutable_checkpoint());
      cluster_.scheduler.OnWorkerMessage(worker.connection, progress);
    } else if (OneIn(8)) {
      const absl::Status failures[] = {
          MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST, "peer"),
          MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST, "ring"),
          MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_KV_STREAM_STALLED, "stalled"),
          MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE, "nan"),
          MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION, "unknown"),
          MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_CHECKPOINT_LOST, "gone"),
          absl::OkStatus()};
      Report(worker, index, failures[Below(7)]);
    } else {
      v1::ConnectRequest message;
      auto* completed = message.mutable_completed();
      completed->set_request_id(assignment.request_id());
      completed->set_epoch(assignment.epoch());
      completed->set_rank(assignment.rank());
      completed->set_kv_digest_share(std::string(OneIn(30) ? 3 : 16, 'x'));
      if (assignment.rank() == 0) completed->set_first_token(1);
      worker.held.erase(worker.held.begin() + static_cast<std::ptrdiff_t>(index));
      cluster_.scheduler.OnWorkerMessage(worker.connection, message);
    }
  }

  void AddCheckpoint(const v1::PrefillAssignment& assignment, uint32_t layer, v1::RankCheckpoint* out) {
    out->set_layer(layer);
    out->set_kv_digest_share(std::string(OneIn(30) ? 3 : 16, 'x'));
    if (out->kv_digest_share().size() != 16) return;
    reported_[{assignment.destination().session_id(), assignment.epoch(), assignment.rank()}].insert(layer);
  }

  void Report(SimulatedWorker& worker, size_t index, const absl::Status& status) {
    v1::ConnectRequest message;
    message.mutable_failed()->set_request_id(worker.held[index].request_id());
    message.mutable_failed()->set_epoch(worker.held[index].epoch());
    message.mutable_failed()->set_rank(worker.held[index].rank());
    *message.mutable_failed()->mutable_error() = ToRpcStatus(status);
    worker.held.erase(worker.held.begin() + static_cast<std::ptrdiff_t>(index));
    cluster_.scheduler.OnWorkerMessage(worker.connection, message);
  }

  void CheckStep() {
    for (const auto& [id, watcher] : watchers_) {
      ASSERT_TRUE(watcher->violations.empty()) << id << ": " << watcher->violations.front();
    }
    ASSERT_TRUE(cluster_.decode.violations.empty()) << cluster_.decode.violations.front();
    // The gauges and the table of jobs always tell the same.
    const auto& metrics = cluster_.coordinator_metrics;
    ASSERT_EQ(metrics.requests_running.Value() + metrics.requests_waiting.Value(),
              static_cast<double>(cluster_.scheduler.num_jobs()));
  }

  // From now on everybody behaves.
  void Settle() {
    for (int round = 0; round < 2000 && cluster_.scheduler.num_jobs() > 0; ++round) {
      while (!cluster_.decode.pending.empty()) AnswerWell(0);
      for (auto& worker : workers_) PlayWorker(worker);
      cluster_.Advance(absl::Milliseconds(200));
      Heartbeats();
      CheckStep();
    }
    cluster_.decode.AnswerAll();
  }

  void Check() {
    EXPECT_EQ(cluster_.scheduler.num_jobs(), 0u);
    for (const auto& [id, watcher] : watchers_) {
      EXPECT_TRUE(watcher->ended() || left_.contains(watcher.get())) << id << " was forgotten";
    }
    const auto workers = cluster_.scheduler.ListWorkers();
    for (const auto& worker : workers.workers()) {
      EXPECT_EQ(worker.request_id(), "");
      EXPECT_EQ(worker.num_tokens(), 0u);
    }
    EXPECT_EQ(cancels_answered_, cancels_asked_);
    const auto& metrics = cluster_.coordinator_metrics;
    EXPECT_EQ(metrics.requests_running.Value(), 0);
    EXPECT_EQ(metrics.requests_waiting.Value(), 0);
    EXPECT_EQ(metrics.tokens_running.Value(), 0);
    EXPECT_EQ(metrics.tokens_waiting.Value(), 0);
    for (const auto& [session, epoch] : cluster_.decode.open_sessions) {
      EXPECT_TRUE(cluster_.decode.left_to_the_lease.contains(session)) << "a session leaked";
    }
    for (const auto& [id, watcher] : watchers_) {
      if (!watcher->ended()) continue;
      ++outcomes_[absl::StatusCodeToString(watcher->result().code())];
      if (!watcher->result().ok()) continue;
      const auto& completed = watcher->completed();
      EXPECT_TRUE(cluster_.decode.committed.contains(completed.session_id())) << id << " without a commit";
      if (completed.retries() > 0) ++outcomes_["retried"];
      if (completed.resume_layer() > 0) ++outcomes_["completed from a checkpoint"];
      if (!watcher->accepted()) ++outcomes_["replayed"];
    }
  }

  std::mt19937_64 random_;
  FakeCluster cluster_;
  std::vector<SimulatedWorker> workers_{kNumWorkers};
  std::vector<std::pair<std::string, std::shared_ptr<RecordingWatcher>>> watchers_;
  std::set<const RecordingWatcher*> left_;
  // Checkpoints by session, epoch and rank.
  std::map<std::tuple<std::string, uint32_t, uint32_t>, std::set<uint32_t>> reported_;
  std::map<std::string, int> outcomes_;
  int incarnations_ = 0;
  int cancels_asked_ = 0;
  int cancels_answered_ = 0;
};

TEST(SchedulerPropertyTest, EveryRequestEndsExactlyOnceUnderRandomSchedules) {
  std::map<std::string, int> outcomes;
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Simulation simulation(seed);
    simulation.Run(&outcomes);
    if (HasFailure()) break;
  }
  // The schedules reach every kind of end.
  for (const char* outcome : {"OK", "retried", "replayed", "packed", "CANCELLED", "UNAVAILABLE", "INTERNAL",
                              "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "resumed",
                              "completed from a checkpoint", "forgotten at the open"}) {
    EXPECT_GE(outcomes[outcome], 20) << outcome;
  }
}

}  // namespace
}  // namespace headwater::testing
