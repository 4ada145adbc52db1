#include "coordinator/cluster_state.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/message_differencer.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "coordinator/job.h"
#include "coordinator/registration.h"

namespace headwater {
namespace {

constexpr size_t kMaxPeers = 4096;
constexpr size_t kMaxServedNames = 64;
constexpr uint64_t kPassesHeld = 2;

absl::Status TooMany(absl::string_view what) {
  return MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_BAD_FIELD,
                   absl::StrCat("more than ", kMaxPeers, " ", what, " are registered"),
                   {{"limit", absl::StrCat(kMaxPeers)}});
}

template <typename Map>
auto* FindById(Map& map, absl::string_view id) {
  const auto it = map.find(std::string(id));
  return it == map.end() ? nullptr : &it->second;
}

template <typename Map>
auto* FindByConnection(Map& map, uint64_t connection) {
  for (auto& [id, peer] : map) {
    if (peer.connection == connection) return &peer;
  }
  return static_cast<decltype(&map.begin()->second)>(nullptr);
}

// Null: it said nothing of that policy.
const v1::PolicyLimit* LimitOf(const v1::WorkerRegistration& registration, absl::string_view policy) {
  const auto& limits = registration.policy_limits();
  const auto found = std::find_if(limits.begin(), limits.end(),
                                  [&](const v1::PolicyLimit& limit) { return limit.name() == policy; });
  return found == limits.end() ? nullptr : &*found;
}

// "dense" needs no word of the worker's.
uint64_t DenseBelow(const v1::WorkerRegistration& registration, const std::string& policy) {
  if (policy == "dense") return std::numeric_limits<uint64_t>::max();
  const v1::PolicyLimit* const limit = LimitOf(registration, policy);
  return limit == nullptr ? 0 : limit->dense_below_tokens();
}

std::vector<PlanWorker> ForPlanner(const std::vector<const Worker*>& workers, const WorkerNeeds& needs) {
  std::vector<PlanWorker> out;
  out.reserve(workers.size());
  for (const Worker* worker : workers) {
    const v1::WorkerRegistration& registration = worker->registration;
    PlanWorker& planned = out.emplace_back();
    planned.worker_id = registration.worker_id();
    planned.memory = registration.memory();
    planned.max_world_size = registration.max_world_size();
    planned.rates = RatesOf(*worker);
    planned.device = registration.device().substr(0, registration.device().find(':'));
    for (const int strategy : registration.strategies())
      planned.strategies.push_back(static_cast<v1::Strategy>(strategy));
    const v1::PolicyLimit* const limit = LimitOf(registration, needs.policy);
    if (limit == nullptr) continue;
    if (limit->max_world_size() > 0) planned.max_world_size = limit->max_world_size();
    if (needs.by_limits) planned.max_tokens = limit->max_tokens();
  }
  return out;
}

bool Has(const v1::WorkerRegistration& registration, const WorkerNeeds& needs) {
  const auto& policies = registration.policies();
  return registration.model().name() == needs.model && (!needs.quality || registration.serves_quality()) &&
         std::find(policies.begin(), policies.end(), needs.policy) != policies.end();
}

// Workers from before the planner's cost model do not state the shape that it goes by.
bool SameModel(v1::ServedModel a, v1::ServedModel b) {
  if (a.hidden_size() == 0 || b.hidden_size() == 0) {
    for (v1::ServedModel* const model : {&a, &b}) {
      model->clear_hidden_size();
      model->clear_num_q_heads();
      model->clear_intermediate_size();
    }
  }
  // Nor do those from before a field that a later version states.
  a.DiscardUnknownFields();
  b.DiscardUnknownFields();
  return google::protobuf::util::MessageDifferencer::Equals(a, b);
}

}  // namespace

bool Worker::HasRoomFor(const PackedPrompt& prompt) const {
  if (!Packs(prompt.num_tokens)) return false;
  if (held.empty()) return true;
  // Where one is packable, all are.
  if (!held.begin()->second.packable || held.contains(prompt.request_id)) return false;
  return held.size() + 1 <= kPassesHeld * registration.max_packed_prompts() &&
         held_tokens + prompt.num_tokens <= kPassesHeld * registration.max_packed_tokens();
}

void Worker::Hold(const std::string& request_id, const HeldJob& job) {
  HW_CHECK(held.empty() || (job.packable && held.begin()->second.packable));
  HW_CHECK(held.emplace(request_id, job).second);
  held_tokens += job.num_tokens;
  last_serial = job.serial;
}

bool Worker::Release(const std::string& request_id, uint64_t serial, absl::Time now) {
  const auto it = held.find(request_id);
  if (it == held.end() || it->second.serial != serial) return false;
  held_tokens -= it->second.num_tokens;
  held.erase(it);
  if (held.empty()) idle_since = now;
  return true;
}

uint64_t DecodeNode::FreeBytes() const {
  const uint64_t budget = registration.kv_budget_bytes();
  if (kv_bytes_used >= budget || unreported_bytes >= budget - kv_bytes_used) return 0;
  return budget - kv_bytes_used - unreported_bytes;
}

absl::Status ClusterState::AddWorker(Worker worker) {
  if (workers_.size() >= kMaxPeers) return TooMany("workers");
  const v1::ServedModel& model = worker.registration.model();
  for (const auto& [id, other] : workers_) {
    const v1::ServedModel& served = other.registration.model();
    if (served.name() == model.name() && !SameModel(served, model)) {
      return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MODEL_MISMATCH,
                       absl::StrCat("worker ", id, " serves another model under the name ", model.name(),
                                    ": fingerprint ", served.fingerprint(), ", not ", model.fingerprint()),
                       {{"value", model.fingerprint()}, {"limit", served.fingerprint()}});
    }
  }
  if (!WasServed(model.name())) {
    if (served_.size() >= kMaxServedNames) served_.erase(served_.begin());
    served_.push_back(model.name());
  }
  std::string id = worker.registration.worker_id();
  workers_.insert_or_assign(std::move(id), std::move(worker));
  ++version_;
  return absl::OkStatus();
}

std::optional<Worker> ClusterState::RemoveWorker(absl::string_view worker_id) {
  const auto it = workers_.find(std::string(worker_id));
  if (it == workers_.end()) return std::nullopt;
  Worker worker = std::move(it->second);
  workers_.erase(it);
  ++version_;
  return worker;
}

Worker* ClusterState::FindWorker(absl::string_view worker_id) { return FindById(workers_, worker_id); }

Worker* ClusterState::FindWorkerByConnection(uint64_t connection) {
  return FindByConnection(workers_, connection);
}

bool ClusterState::SetDraining(Worker* worker) {
  if (worker->draining) return false;
  worker->draining = true;
  ++version_;
  return true;
}

v1::ComputeRates RatesOf(const Worker& worker) {
  v1::ComputeRates rates = worker.registration.rates();
  if (worker.found.link_bytes_per_s() > 0) rates.set_link_bytes_per_s(worker.found.link_bytes_per_s());
  if (worker.found.egress_bytes_per_s() > 0) rates.set_egress_bytes_per_s(worker.found.egress_bytes_per_s());
  return rates;
}

void ClusterState::FoundLinks(Worker* worker, const v1::LinkRates& links, absl::Time now) {
  const v1::ComputeRates known = RatesOf(*worker);
  if (links.link_bytes_per_s() > 0 && known.link_bytes_per_s() > 0 && IsRate(links.link_bytes_per_s())) {
    worker->found.set_link_bytes_per_s(links.link_bytes_per_s());
    worker->link_until = now + kLinksHold;
    ++version_;
  }
  const double egress = links.egress_bytes_per_s();
  if (egress <= 0 || known.egress_bytes_per_s() <= 0 || !IsRate(egress)) return;
  if (!links.egress_waited() && egress <= known.egress_bytes_per_s()) return;
  worker->found.set_egress_bytes_per_s(egress);
  worker->egress_until = now + kLinksHold;
  ++version_;
}

void ClusterState::ForgetLinks(absl::Time now) {
  bool forgot = false;
  for (auto& [id, worker] : workers_) {
    if (worker.found.link_bytes_per_s() > 0 && worker.link_until <= now) {
      worker.found.clear_link_bytes_per_s();
      forgot = true;
    }
    if (worker.found.egress_bytes_per_s() > 0 && worker.egress_until <= now) {
      worker.found.clear_egress_bytes_per_s();
      forgot = true;
    }
  }
  if (forgot) ++version_;
}

size_t ClusterState::NumDraining() const {
  return static_cast<size_t>(std::count_if(workers_.begin(), workers_.end(),
                                           [](const auto& entry) { return entry.second.draining; }));
}

std::vector<const Worker*> ClusterState::WorkersFor(const WorkerNeeds& needs) const {
  std::vector<const Worker*> found;
  for (const auto& [id, worker] : workers_) {
    if (Has(worker.registration, needs) && !worker.draining) found.push_back(&worker);
  }
  return found;
}

std::vector<PlanWorker> ClusterState::LivingWorkers(const WorkerNeeds& needs) const {
  std::vector<const Worker*> found = WorkersFor(needs);
  std::stable_sort(found.begin(), found.end(),
                   [](const Worker* a, const Worker* b) { return a->idle_since < b->idle_since; });
  return ForPlanner(found, needs);
}

std::vector<PlanWorker> ClusterState::FreeWorkers(const WorkerNeeds& needs,
                                                  const PackedPrompt* prompt) const {
  std::vector<const Worker*> found = WorkersFor(needs);
  const auto taken = [&](const Worker* worker) {
    return !worker->held.empty() && (prompt == nullptr || !worker->HasRoomFor(*prompt));
  };
  found.erase(std::remove_if(found.begin(), found.end(), taken), found.end());
  std::stable_sort(found.begin(), found.end(), [](const Worker* a, const Worker* b) {
    return std::pair(a->held_tokens, a->idle_since) < std::pair(b->held_tokens, b->idle_since);
  });
  return ForPlanner(found, needs);
}

std::optional<ModelView> ClusterState::FindModel(absl::string_view name) const {
  ModelView view;
  for (const auto& [id, worker] : workers_) {
    const v1::WorkerRegistration& registration = worker.registration;
    if (registration.model().name() != name) continue;
    const std::string& named = registration.default_policy();
    const std::string default_policy = named.empty() ? "dense" : named;
    if (view.num_workers++ == 0) {
      view.model = registration.model();
      view.default_policy = default_policy;
    } else if (view.default_policy != default_policy) {
      view.default_policy = "dense";
    }
    view.serves_quality = view.serves_quality || registration.serves_quality();
    for (const std::string& policy : registration.policies()) {
      const uint64_t below = DenseBelow(registration, policy);
      const auto [at, added] = view.dense_below.try_emplace(policy, below);
      if (!added) at->second = std::min(at->second, below);
    }
  }
  if (view.num_workers == 0) return std::nullopt;
  for (const auto& [policy, below] : view.dense_below) view.policies.push_back(policy);
  return view;
}

bool ClusterState::WasServed(absl::string_view name) const {
  return std::find(served_.begin(), served_.end(), name) != served_.end();
}

std::vector<std::string> ClusterState::LivingModels() const {
  std::set<std::string> names;
  for (const auto& [id, worker] : workers_) names.insert(worker.registration.model().name());
  return {names.begin(), names.end()};
}

absl::Status ClusterState::AddDecodeNode(DecodeNode node) {
  if (decode_nodes_.size() >= kMaxPeers && FindDecodeNode(node.registration.decode_node()) == nullptr) {
    return TooMany("decode nodes");
  }
  if (node.registration.pool().empty()) node.registration.set_pool("default");
  std::string id = node.registration.decode_node();
  decode_nodes_.insert_or_assign(std::move(id), std::move(node));
  return absl::OkStatus();
}

DecodeNode* ClusterState::FindDecodeNode(absl::string_view id) { return FindById(decode_nodes_, id); }

const DecodeNode* ClusterState::FindDecodeNode(absl::string_view id) const {
  return FindById(decode_nodes_, id);
}

DecodeNode* ClusterState::FindDecodeNodeByConnection(uint64_t connection) {
  return FindByConnection(decode_nodes_, connection);
}

v1::WorkerSummary ClusterState::Summarize(const Worker& worker, absl::Time now) {
  v1::WorkerSummary out;
  out.set_worker_id(worker.registration.worker_id());
  out.set_incarnation(worker.registration.incarnation());
  out.set_device(worker.registration.device());
  *out.mutable_model() = worker.registration.model();
  *out.mutable_memory() = worker.registration.memory();
  SetDuration(now - worker.last_heard, out.mutable_last_heartbeat_age());
  if (!worker.held.empty()) {
    out.set_request_id(worker.held.begin()->first);
    out.set_epoch(worker.held.begin()->second.epoch);
  }
  out.set_num_requests(static_cast<uint32_t>(worker.held.size()));
  out.set_num_tokens(worker.held_tokens);
  out.set_kv_unacked_bytes(worker.kv_unacked_bytes);
  out.set_draining(worker.draining);
  if (worker.registration.has_rates()) *out.mutable_rates() = RatesOf(worker);
  return out;
}

v1::ListWorkersResponse ClusterState::ListWorkers(absl::Time now) const {
  v1::ListWorkersResponse response;
  for (const auto& [id, worker] : workers_) *response.add_workers() = Summarize(worker, now);
  return response;
}

v1::ListDecodeNodesResponse ClusterState::ListDecodeNodes(absl::Time now) const {
  v1::ListDecodeNodesResponse response;
  for (const auto& [id, node] : decode_nodes_) {
    auto* out = response.add_decode_nodes();
    out->set_decode_node(id);
    out->set_pool(node.registration.pool());
    out->set_kv_address(node.registration.kv_address());
    out->set_decode_address(node.registration.decode_address());
    out->set_connected(node.connected);
    SetDuration(now - node.last_heard, out->mutable_last_heartbeat_age());
    out->set_kv_bytes_used(node.kv_bytes_used);
    out->set_kv_budget_bytes(node.registration.kv_budget_bytes());
    out->set_sessions(node.sessions);
    *out->mutable_kv_dtypes() = node.registration.kv_dtypes();
  }
  return response;
}

}  // namespace headwater
