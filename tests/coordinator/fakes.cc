#include "tests/coordinator/fakes.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/version.h"

namespace headwater::testing {
namespace {

template <typename Report>
void NameReport(const v1::PrefillAssignment& assignment, Report* report) {
  report->set_request_id(assignment.request_id());
  report->set_epoch(assignment.epoch());
  report->set_rank(assignment.rank());
}

}  // namespace

void RecordingWatcher::OnEvent(std::shared_ptr<const v1::PrefillResponse> event) {
  if (ended_) violations.push_back("event after the end");
  const bool terminal = event->has_completed() || event->has_failed();
  if (events.empty() && event->has_progress()) violations.push_back("progress before accepted");
  if (!events.empty() && event->has_accepted()) violations.push_back("accepted twice");
  ended_ = ended_ || terminal;
  events.push_back(*event);
}

void RecordingWatcher::OnRejected(const absl::Status& status) {
  if (ended_) violations.push_back("rejection after the end");
  if (!events.empty()) violations.push_back("rejection after an event");
  if (status.ok()) violations.push_back("rejection with OK");
  ended_ = true;
  rejection_ = status;
}

absl::Status RecordingWatcher::result() const {
  if (!ended_) return absl::UnknownError("not ended");
  if (!rejection_.ok()) return rejection_;
  return events.back().has_completed() ? absl::OkStatus() : FromRpcStatus(events.back().failed().error());
}

int RecordingWatcher::CountProgress() const {
  return static_cast<int>(
      std::count_if(events.begin(), events.end(), [](const auto& event) { return event.has_progress(); }));
}

bool FakeWorkerLink::Send(v1::ConnectResponse message) {
  if (closed || full) return false;
  if (message.has_registered()) {
    ++registrations;
  } else {
    unread.push_back(std::move(message));
  }
  return true;
}

void FakeWorkerLink::Close(const absl::Status& why) {
  if (!closed) close_status = why;
  closed = true;
}

std::unique_ptr<v1::ConnectResponse> FakeWorkerLink::Next() {
  if (unread.empty()) return nullptr;
  auto message = std::make_unique<v1::ConnectResponse>(std::move(unread.front()));
  unread.pop_front();
  return message;
}

void FakeDecodeClient::OpenSession(const std::string& kv_address, v1::OpenSessionRequest request,
                                   absl::Duration timeout, Done done) {
  pending.push_back({Kind::kOpen, kv_address, std::move(request), {}, {}, std::move(done), timeout});
}

void FakeDecodeClient::CommitSession(const std::string& kv_address, v1::CommitSessionRequest request,
                                     absl::Duration timeout, Done done) {
  pending.push_back({Kind::kCommit, kv_address, {}, std::move(request), {}, std::move(done), timeout});
}

void FakeDecodeClient::AbortSession(const std::string& kv_address, v1::AbortSessionRequest request,
                                    absl::Duration timeout, Done done) {
  pending.push_back({Kind::kAbort, kv_address, {}, {}, std::move(request), std::move(done), timeout});
}

void FakeDecodeClient::Answer(const absl::Status& status, size_t index) {
  ASSERT_LT(index, pending.size()) << "no call to answer";
  const Call call = std::move(pending[index]);
  pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(index));
  if (call.kind == Kind::kAbort) {
    ++aborts;
    if (!status.ok()) left_to_the_lease.insert(call.abort.session_id());
  }
  if (status.ok()) {
    switch (call.kind) {
      case Kind::kOpen: {
        if (call.open.resume_layer() > 0 && !open_sessions.contains(call.open.session_id())) {
          violations.push_back("a session that is not open goes on");
        }
        uint32_t& epoch = open_sessions[call.open.session_id()];
        if (call.open.epoch() < epoch) violations.push_back("session opened with a lower epoch");
        epoch = call.open.epoch();
        opened.push_back(call.open);
        break;
      }
      case Kind::kCommit: {
        const auto it = open_sessions.find(call.commit.session_id());
        if (it == open_sessions.end()) {
          violations.push_back("commit of a session that is not open");
        } else if (it->second != call.commit.epoch()) {
          violations.push_back("commit of another epoch than the open one");
        }
        open_sessions.erase(call.commit.session_id());
        committed[call.commit.session_id()] = call.commit;
        break;
      }
      case Kind::kAbort:
        open_sessions.erase(call.abort.session_id());
        break;
    }
  }
  call.done(status);
}

void FakeDecodeClient::AnswerAll(const absl::Status& status) {
  for (int i = 0; !pending.empty() && i < 10'000; ++i) Answer(status);
}

v1::WorkerRegistration MakeWorker(const std::string& id, const std::string& incarnation) {
  v1::WorkerRegistration out;
  out.set_worker_id(id);
  out.set_incarnation(incarnation);
  out.set_rendezvous_address(absl::StrCat("127.0.0.1:", 7100 + id.back()));
  out.set_device("cpu");
  auto* model = out.mutable_model();
  model->set_name("tiny");
  model->set_fingerprint("sha256:tiny");
  model->set_vocab_size(256);
  model->set_max_position(1 << 20);
  model->set_num_layers(4);
  model->set_num_kv_heads(2);
  model->set_head_dim(32);
  out.mutable_memory()->set_budget_bytes(1'000'000'000);
  out.mutable_memory()->set_weight_bytes(100'000'000);
  out.mutable_memory()->set_fixed_bytes(1'000'000);
  out.mutable_memory()->set_bytes_per_token(1'000);
  out.add_policies("dense");
  out.add_policies("a_shape");
  out.set_protocol_version(kProtocolVersion);
  return out;
}

v1::DecodeRegistration MakeDecodeNode(const std::string& id, const std::string& pool) {
  v1::DecodeRegistration out;
  out.set_decode_node(id);
  out.set_incarnation("i1");
  out.set_pool(pool);
  out.set_kv_address(absl::StrCat(id, ".kv:7080"));
  out.set_decode_address(absl::StrCat(id, ".decode:7080"));
  out.set_epoch_tokens(true);
  out.set_model_fingerprint("sha256:tiny");
  out.add_kv_dtypes(v1::KV_DTYPE_F32);
  out.add_kv_dtypes(v1::KV_DTYPE_BF16);
  out.set_kv_budget_bytes(10'000'000'000);
  out.set_max_position(1 << 20);
  out.set_protocol_version(kProtocolVersion);
  return out;
}

v1::PrefillRequest MakeRequest(const std::string& id, int num_tokens) {
  v1::PrefillRequest request;
  request.set_request_id(id);
  for (int i = 0; i < num_tokens; ++i) request.add_token_ids(static_cast<uint32_t>(i % 256));
  return request;
}

FakeCluster::FakeCluster(const CoordinatorOptions& options)
    : metrics("test"),
      coordinator_metrics(&metrics),
      scheduler(options, &clock, &decode, &coordinator_metrics) {}

PlayedWorker& FakeCluster::AddWorker(const v1::WorkerRegistration& registration) {
  PlayedWorker worker;
  worker.id = registration.worker_id();
  worker.link = std::make_shared<FakeWorkerLink>();
  // The link may get its first assignment before AddWorker returns.
  const auto connection = scheduler.AddWorker(registration, worker.link);
  EXPECT_TRUE(connection.ok()) << connection.status();
  worker.connection = connection.value_or(0);
  return workers_[registration.worker_id()] = std::move(worker);
}

uint64_t FakeCluster::AddDecodeNode(const std::string& id, const std::string& pool) {
  const auto connection =
      scheduler.AddDecodeNode(MakeDecodeNode(id, pool), std::make_shared<FakeDecodeLink>());
  EXPECT_TRUE(connection.ok()) << connection.status();
  return decode_nodes_[id] = connection.value_or(0);
}

void FakeCluster::Disconnect(const std::string& id) {
  const uint64_t connection = workers_.at(id).connection;
  workers_.erase(id);
  scheduler.OnWorkerClosed(connection);
}

std::shared_ptr<RecordingWatcher> FakeCluster::Submit(const v1::PrefillRequest& request) {
  auto watcher = std::make_shared<RecordingWatcher>();
  auto prepared = PrepareRequest(request, scheduler.options());
  HW_CHECK(prepared.ok());
  scheduler.Submit(*std::move(prepared), watcher);
  return watcher;
}

void FakeCluster::Detach(const std::string& request_id, std::shared_ptr<JobWatcher> watcher) {
  scheduler.Detach({JobWatch{JobKey{"", request_id}, std::move(watcher)}});
}

v1::PrefillAssignment FakeCluster::TakeAssignment(const std::string& id) {
  PlayedWorker& worker = workers_.at(id);
  const auto message = worker.link->Next();
  EXPECT_TRUE(message != nullptr && message->has_assignment()) << "worker " << id << " has no assignment";
  if (message == nullptr) return {};
  worker.assignment = message->assignment();
  return worker.assignment;
}

bool FakeCluster::TakeAbort(const std::string& id) {
  const auto message = workers_.at(id).link->Next();
  return message != nullptr && message->has_abort();
}

bool FakeCluster::HasMessage(const std::string& id) { return !workers_.at(id).link->unread.empty(); }

void FakeCluster::Progress(const std::string& id, uint32_t layers_done) {
  const PlayedWorker& worker = workers_.at(id);
  v1::ConnectRequest message;
  auto* progress = message.mutable_progress();
  NameReport(worker.assignment, progress);
  progress->set_layers_done(layers_done);
  progress->set_bytes_acked(1000 * layers_done);
  progress->set_pairs_computed(10 * layers_done);
  progress->set_pairs_possible(20 * layers_done);
  scheduler.OnWorkerMessage(worker.connection, message);
}

v1::RankCheckpoint FakeCluster::CheckpointOf(const std::string& id, uint32_t layer) {
  v1::RankCheckpoint checkpoint;
  checkpoint.set_layer(layer);
  const uint32_t byte = 8 * layer + workers_.at(id).assignment.rank() + 1;
  checkpoint.set_kv_digest_share(std::string(16, static_cast<char>(byte)));
  checkpoint.set_kv_bytes(100 * layer);
  checkpoint.set_kv_blocks(layer);
  return checkpoint;
}

void FakeCluster::ReportCheckpoint(const std::string& id, const v1::RankCheckpoint& checkpoint) {
  const PlayedWorker& worker = workers_.at(id);
  v1::ConnectRequest message;
  auto* progress = message.mutable_progress();
  NameReport(worker.assignment, progress);
  progress->set_layers_done(checkpoint.layer());
  *progress->mutable_checkpoint() = checkpoint;
  scheduler.OnWorkerMessage(worker.connection, message);
}

v1::RankCompleted FakeCluster::CompletionOf(const std::string& id) {
  const v1::PrefillAssignment& assignment = workers_.at(id).assignment;
  v1::RankCompleted completed;
  NameReport(assignment, &completed);
  completed.set_kv_digest_share(std::string(16, static_cast<char>(assignment.rank() + 1)));
  completed.set_kv_bytes(4000);
  completed.set_kv_blocks(8);
  completed.set_kv_blocks_resent(1);
  completed.set_kv_stream_resumes(1);
  completed.set_pairs_computed(50);
  completed.set_pairs_possible(100);
  if (assignment.rank() == 0) completed.set_first_token(42);
  return completed;
}

void FakeCluster::Complete(const std::string& id, const v1::RankCompleted& completed) {
  v1::ConnectRequest message;
  *message.mutable_completed() = completed;
  scheduler.OnWorkerMessage(workers_.at(id).connection, message);
}

void FakeCluster::Fail(const std::string& id, const absl::Status& status) {
  const PlayedWorker& worker = workers_.at(id);
  v1::ConnectRequest message;
  auto* failed = message.mutable_failed();
  NameReport(worker.assignment, failed);
  *failed->mutable_error() = ToRpcStatus(status);
  scheduler.OnWorkerMessage(worker.connection, message);
}

void FakeCluster::Advance(absl::Duration duration) {
  while (duration > absl::ZeroDuration()) {
    const absl::Duration step = std::min(duration, absl::Milliseconds(500));
    duration -= step;
    clock.Advance(step);
    v1::ConnectRequest heartbeat;
    heartbeat.mutable_heartbeat();
    for (const auto& [id, worker] : workers_) {
      if (!worker.muted) scheduler.OnWorkerMessage(worker.connection, heartbeat);
    }
    for (const auto& [id, connection] : decode_nodes_) {
      if (!decode_muted) scheduler.OnDecodeHeartbeat(connection, {});
    }
    scheduler.Tick();
  }
}

}  // namespace headwater::testing
