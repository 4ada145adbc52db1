// What the live page shows: read alone, no job changes.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

#include "coordinator/scheduler.h"
#include "coordinator/snapshot.h"

namespace headwater {
namespace {

constexpr size_t kMostWorks = 4;   // of a worker
constexpr size_t kMostRanks = 64;  // of a request
constexpr size_t kMostWhy = 200;

bool Waits(JobPhase phase) { return phase == JobPhase::kWaiting || phase == JobPhase::kQueued; }

std::string StrategyName(const v1::PrefillPlan& plan) {
  if (plan.world_size() <= 1) return "";
  switch (plan.strategy()) {
    case v1::STRATEGY_ALLGATHER:
      return "allgather";
    case v1::STRATEGY_SPARSE:
      return "sparse";
    default:
      return "ring";
  }
}

RequestView ViewOf(const Job& job, absl::Time now) {
  RequestView view = ViewOf(job);
  const absl::Time since = job.accepted ? job.accepted_at : job.arrived;
  view.waited = job.started_at.value_or(now) - since;
  if (job.deadline != absl::InfiniteFuture()) view.time_left = job.deadline - now;
  return view;
}

RunningView RunningOf(const Job& job, absl::Time now) {
  RunningView view;
  view.request = ViewOf(job, now);
  view.phase = job.phase;
  view.strategy = StrategyName(job.plan);
  view.num_layers = job.model.num_layers();
  view.resume_layer = job.resume_layer();
  const v1::PrefillProgress progress = MakeProgress(job, now);
  view.bytes_total = progress.bytes_total();
  view.decode_node = job.decode_node;
  view.decode_away = job.away_since.has_value();
  // Before the ranks are assigned, the times and reports are of an earlier epoch, if of any.
  if (job.phase == JobPhase::kOpening) return view;
  view.in_epoch = now - job.epoch_started_at;
  view.layers_done = progress.layers_done();
  view.tokens_per_second = progress.tokens_per_second();
  view.density = progress.density();
  if (progress.attention().has_recall_mean()) view.recall = progress.attention().recall_mean();
  if (progress.has_eta()) {
    view.eta = absl::Seconds(progress.eta().seconds()) + absl::Nanoseconds(progress.eta().nanos());
  }
  view.bytes_acked = progress.bytes_acked();
  return view;
}

void AddRanks(const Job& job, size_t most_cells, RunningView* view) {
  for (const Rank& rank : job.ranks) {
    if (view->ranks.size() == kMostRanks) break;
    RankView out;
    out.worker_id = rank.worker_id;
    out.completed = rank.state == Rank::State::kCompleted;
    out.layers_done = out.completed ? job.model.num_layers() : rank.progress.layers_done();
    out.bytes_acked = out.completed ? rank.completed.kv_bytes() : rank.progress.bytes_acked();
    out.bytes_total = out.completed ? rank.completed.kv_bytes() : rank.progress.bytes_total();
    view->ranks.push_back(std::move(out));
  }
  view->ranks_left_out = job.ranks.size() - view->ranks.size();
  view->map = MapOfRanks(job, most_cells);
}

template <typename Report>
LayerMap::Row RowOf(const std::string& worker_id, const Report& report) {
  return {worker_id,
          {report.layer_densities().begin(), report.layer_densities().end()},
          {report.layer_recalls().begin(), report.layer_recalls().end()}};
}

}  // namespace

size_t LayerMap::cells() const {
  size_t cells = 0;
  for (const Row& row : rows) cells += row.density.size() + row.recall.size();
  return cells;
}

LayerMap MapOfRanks(const Job& job, size_t most_cells) {
  LayerMap map;
  map.first_layer = job.resume_layer();
  for (const Rank& rank : job.ranks) {
    const bool completed = rank.state == Rank::State::kCompleted && rank.completed.layer_densities_size() > 0;
    map.rows.push_back(completed ? RowOf(rank.worker_id, rank.completed)
                                 : RowOf(rank.worker_id, rank.progress));
  }
  if (map.cells() > most_cells) {
    map.rows.clear();
    map.left_out = true;
  }
  return map;
}

LayerMap MapOfEnded(const Job& job, size_t most_cells) {
  const v1::AttentionReport* report = nullptr;
  for (const Rank& rank : job.ranks) {
    const auto& groups = rank.completed.attention().groups();
    if (std::any_of(groups.begin(), groups.end(), [](const auto& group) { return group.has_kv_head(); })) {
      report = &rank.completed.attention();
    }
  }
  const size_t layers = job.model.num_layers(), heads = job.model.num_kv_heads();
  // Both numbers of all heads.
  if (report == nullptr || 2 * layers * heads > most_cells) return MapOfRanks(job, most_cells);
  LayerMap map;
  for (size_t head = 0; head < heads; ++head) {
    map.rows.push_back(
        {absl::StrCat("KV head ", head), std::vector<float>(layers, -1), std::vector<float>(layers, -1)});
  }
  for (const v1::AttentionGroup& group : report->groups()) {
    if (group.layer() >= layers || group.kv_head() >= heads) continue;
    const size_t first = group.has_kv_head() ? group.kv_head() : 0;
    const size_t end = group.has_kv_head() ? first + 1 : heads;
    for (size_t head = first; head < end; ++head) {
      map.rows[head].density[group.layer()] = static_cast<float>(group.density());
      if (group.has_recall()) map.rows[head].recall[group.layer()] = static_cast<float>(group.recall());
    }
  }
  return map;
}

WorkerView Scheduler::ViewOfWorker(const std::string& id, const Worker& worker, absl::Time now) const {
  WorkerView view;
  view.id = id;
  view.device = worker.registration.device();
  view.model = worker.registration.model().name();
  view.heartbeat_age = now - worker.last_heard;
  if (view.heartbeat_age > 2 * options_.heartbeat_interval) {
    view.state = WorkerView::State::kSilent;
  } else if (worker.draining) {
    view.state = WorkerView::State::kDraining;
  } else if (!worker.held.empty()) {
    view.state = WorkerView::State::kBusy;
  }
  if (worker.held.empty()) view.idle = now - worker.idle_since;
  view.num_requests = worker.held.size();
  view.num_tokens = worker.held_tokens;
  view.kv_unacked_bytes = worker.kv_unacked_bytes;
  view.budget_bytes = worker.registration.memory().budget_bytes();
  view.weight_bytes = worker.registration.memory().weight_bytes();
  for (const auto& [request_id, held] : worker.held) {
    if (view.works.size() == kMostWorks) break;
    const auto job = jobs_.find(held.serial);
    if (job == jobs_.end()) continue;
    const auto& ranks = job->second->ranks;
    const auto rank =
        std::find_if(ranks.begin(), ranks.end(), [&id](const Rank& r) { return r.worker_id == id; });
    view.works.push_back(
        {request_id, static_cast<uint32_t>(rank - ranks.begin()), static_cast<uint32_t>(ranks.size())});
  }
  return view;
}

void Scheduler::AddPeers(const SnapshotLimits& limits, Snapshot* out) const {
  std::vector<WorkerView> well;
  for (const auto& [id, worker] : cluster_.workers()) {
    ++out->workers_total;
    if (!worker.held.empty()) ++out->workers_busy;
    const bool silent = out->now - worker.last_heard > 2 * options_.heartbeat_interval;
    if (silent) ++out->workers_silent;
    if (worker.draining) ++out->workers_draining;
    std::vector<WorkerView>* const to = silent || worker.draining ? &out->workers : &well;
    if (to->size() < limits.workers) to->push_back(ViewOfWorker(id, worker, out->now));
  }
  const size_t room = limits.workers - out->workers.size();
  well.resize(std::min(well.size(), room));
  std::move(well.begin(), well.end(), std::back_inserter(out->workers));
  for (const auto& [id, node] : cluster_.decode_nodes()) {
    ++out->decode_nodes_total;
    if (node.connected) ++out->decode_nodes_connected;
    if (out->decode_nodes.size() == limits.decode_nodes) continue;
    out->decode_nodes.push_back({id, node.registration.pool(), node.connected, out->now - node.last_heard,
                                 node.kv_bytes_used, node.registration.kv_budget_bytes(), node.sessions});
  }
}

Snapshot Scheduler::TakeSnapshot(const SnapshotLimits& limits) const {
  Snapshot out;
  out.now = clock_->Now();
  out.draining = draining_;
  out.heartbeat_interval = options_.heartbeat_interval;
  out.max_queue_requests = options_.max_queue_requests;
  out.waiting_total = waiting_jobs_;
  out.waiting_tokens = waiting_tokens_;
  out.retries_total = static_cast<uint64_t>(metrics_->retries_total.Value());
  AddPeers(limits, &out);

  const auto add_waiting = [&](const Job& job) {
    out.longest_wait = std::max(out.longest_wait, out.now - job.arrived);
    if (out.waiting.size() >= limits.waiting) return;
    out.waiting.push_back(
        {ViewOf(job, out.now), job.accepted, std::string(job.unplannable.message().substr(0, kMostWhy))});
  };
  for (const auto& [key, job] : queue_) add_waiting(*job);
  size_t cells = limits.cells;
  for (const auto& [serial, job] : jobs_) {
    if (job->phase == JobPhase::kWaiting) add_waiting(*job);
    if (Waits(job->phase)) continue;
    ++out.running_total;
    out.running_tokens += job->num_tokens();
    if (out.running.size() >= limits.running) continue;
    out.running.push_back(RunningOf(*job, out.now));
    AddRanks(*job, cells, &out.running.back());
    cells -= out.running.back().map.cells();
  }
  history_.Fill(out.now, &out);
  return out;
}

}  // namespace headwater
