// Workers and decode nodes that come, speak and go.
#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "coordinator/registration.h"
#include "coordinator/scheduler.h"
#include "coordinator/validation.h"

namespace headwater {
namespace {

void SetDecodeGauges(const ClusterState& cluster, CoordinatorMetrics* metrics) {
  double connected = 0, used = 0, budget = 0;
  for (const auto& [id, node] : cluster.decode_nodes()) {
    if (!node.connected) continue;
    ++connected;
    used += static_cast<double>(node.kv_bytes_used);
    budget += static_cast<double>(node.registration.kv_budget_bytes());
  }
  metrics->decode_nodes.Set(connected);
  metrics->decode_kv_usage_ratio.Set(budget > 0 ? used / budget : 0);
}

}  // namespace

absl::StatusOr<uint64_t> Scheduler::AddWorker(const v1::WorkerRegistration& registration,
                                              const std::shared_ptr<WorkerLink>& link) {
  HW_RETURN_IF_ERROR(CheckRegistration(registration));
  const std::string& id = registration.worker_id();
  if (const Worker* earlier = cluster_.FindWorker(id)) {
    LoseWorker(id, MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_WORKER_LOST,
                             absl::StrCat("worker ", id, " registered anew: incarnation ",
                                          registration.incarnation(), " takes the place of ",
                                          earlier->registration.incarnation())));
  }
  Worker worker;
  worker.registration = registration;
  worker.connection = next_connection_++;
  worker.link = link;
  worker.last_heard = clock_->Now();
  worker.idle_since = clock_->Now();
  const uint64_t connection = worker.connection;
  const absl::Status added = cluster_.AddWorker(std::move(worker));
  if (added.ok()) {
    metrics_->workers.Set(static_cast<double>(cluster_.workers().size()));
    HW_LOG(INFO).Field("worker", id).Field("incarnation", registration.incarnation())
        << "worker registered for model " << registration.model().name();
    v1::ConnectResponse accepted;
    accepted.mutable_registered()->set_heartbeat_interval_ms(
        static_cast<uint32_t>(absl::ToInt64Milliseconds(options_.heartbeat_interval)));
    // Where this does not go out, the end of the stream follows.
    link->Send(std::move(accepted));
  }
  cluster_changed_ = true;
  Settle();
  if (!added.ok()) return added;
  return connection;
}

void Scheduler::OnWorkerMessage(uint64_t connection, const v1::ConnectRequest& message) {
  Worker* worker = cluster_.FindWorkerByConnection(connection);
  if (worker == nullptr) return;
  worker->last_heard = clock_->Now();
  switch (message.message_case()) {
    case v1::ConnectRequest::kHeartbeat:
      worker->kv_unacked_bytes = message.heartbeat().kv_unacked_bytes();
      if (message.heartbeat().draining()) SetDraining(worker, "it was told to end");
      break;
    case v1::ConnectRequest::kProgress:
      OnRankProgress(*worker, message.progress());
      break;
    case v1::ConnectRequest::kCompleted:
      OnRankCompleted(*worker, message.completed());
      break;
    case v1::ConnectRequest::kFailed:
      OnRankFailed(*worker, message.failed());
      break;
    case v1::ConnectRequest::kRegistration:
      LoseWorker(worker->registration.worker_id(),
                 MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
                           "a stream carries one registration, its first message"));
      break;
    case v1::ConnectRequest::MESSAGE_NOT_SET:
      break;
  }
  Settle();
}

void Scheduler::OnWorkerClosed(uint64_t connection) {
  const Worker* worker = cluster_.FindWorkerByConnection(connection);
  if (worker == nullptr) return;
  const std::string id = worker->registration.worker_id();
  LoseWorker(id, MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST,
                           absl::StrCat("the stream of worker ", id, " ended")));
  Settle();
}

bool Scheduler::SetDraining(Worker* worker, absl::string_view why) {
  if (!cluster_.SetDraining(worker)) return false;
  metrics_->draining_workers.Set(static_cast<double>(cluster_.NumDraining()));
  HW_LOG(INFO)
          .Field("worker", worker->registration.worker_id())
          .Field("requests", static_cast<int64_t>(worker->held.size()))
      << "worker drains: " << why;
  // Plans over living workers have one less.
  cluster_changed_ = true;
  return true;
}

absl::StatusOr<v1::WorkerSummary> Scheduler::DrainWorker(const std::string& worker_id) {
  Worker* const worker = cluster_.FindWorker(worker_id);
  if (worker == nullptr) {
    return MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_WORKER,
                     absl::StrCat("no worker \"", Printable(worker_id), "\" is registered"),
                     {{"value", Printable(worker_id)}});
  }
  if (SetDraining(worker, "an administrator asked for it")) {
    v1::ConnectResponse message;
    message.mutable_drain();
    // Where this does not go out, the end of the stream follows.
    worker->link->Send(std::move(message));
  }
  const v1::WorkerSummary summary = ClusterState::Summarize(*worker, clock_->Now());
  Settle();
  return summary;
}

absl::StatusOr<uint64_t> Scheduler::AddDecodeNode(const v1::DecodeRegistration& registration,
                                                  std::shared_ptr<PeerLink> link) {
  HW_RETURN_IF_ERROR(CheckRegistration(registration, options_.decode_ranges));
  DecodeNode node;
  if (const DecodeNode* earlier = cluster_.FindDecodeNode(registration.decode_node())) {
    if (earlier->connected) earlier->link->Close(absl::AbortedError("the decode node registered anew"));
    node.kv_bytes_used = earlier->kv_bytes_used;
  }
  node.registration = registration;
  node.connection = next_connection_++;
  node.link = std::move(link);
  node.connected = true;
  node.last_heard = clock_->Now();
  const uint64_t connection = node.connection;
  HW_RETURN_IF_ERROR(cluster_.AddDecodeNode(std::move(node)));
  SetDecodeGauges(cluster_, metrics_);
  HW_LOG(INFO).Field("decode_node", registration.decode_node()).Field("kv_address", registration.kv_address())
      << "decode node registered";
  cluster_changed_ = true;
  Settle();
  return connection;
}

void Scheduler::OnDecodeHeartbeat(uint64_t connection, const v1::DecodeHeartbeat& heartbeat) {
  DecodeNode* node = cluster_.FindDecodeNodeByConnection(connection);
  if (node == nullptr) return;
  node->last_heard = clock_->Now();
  node->kv_bytes_used = heartbeat.kv_bytes_used();
  node->sessions = heartbeat.sessions();
  node->unreported_bytes = 0;
  SetDecodeGauges(cluster_, metrics_);
}

void Scheduler::OnDecodeClosed(uint64_t connection) {
  DecodeNode* node = cluster_.FindDecodeNodeByConnection(connection);
  if (node == nullptr || !node->connected) return;
  HW_LOG(INFO).Field("decode_node", node->registration.decode_node()) << "decode node disconnected";
  node->connected = false;
  node->disconnected_at = clock_->Now();
  node->link.reset();
  SetDecodeGauges(cluster_, metrics_);
}

}  // namespace headwater
