#include "coordinator/page/snapshot_json.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <nlohmann/json.hpp>

#include "base/version.h"

namespace headwater {
namespace {

// Keeps the order in which fields are written.
using Json = nlohmann::ordered_json;

constexpr size_t kMostText = 256;  // bytes of one string, whoever sent it

std::string Text(const std::string& text) { return text.substr(0, kMostText); }

Json Real(double value, double digits) {
  if (!std::isfinite(value)) return nullptr;
  return std::round(value * digits) / digits;
}

Json Seconds(absl::Duration duration) { return Real(absl::ToDoubleSeconds(duration), 1e3); }

Json Seconds(const std::optional<absl::Duration>& duration) {
  return duration.has_value() ? Seconds(*duration) : Json(nullptr);
}

// Below 0: not known.
Json Share(double value) { return value < 0 ? Json(nullptr) : Real(std::min(value, 1.0), 1e4); }

Json Share(const std::optional<double>& value) { return value.has_value() ? Share(*value) : Json(nullptr); }

Json Shares(const std::vector<float>& values) {
  Json out = Json::array();
  for (const float value : values) out.push_back(Share(static_cast<double>(value)));
  return out;
}

const char* NameOf(JobPhase phase) {
  switch (phase) {
    case JobPhase::kWaiting:
      return "waiting";
    case JobPhase::kQueued:
      return "queued";
    case JobPhase::kOpening:
      return "opening";
    case JobPhase::kRunning:
      return "running";
    case JobPhase::kCommitting:
      return "committing";
    case JobPhase::kStopping:
      return "stopping";
    case JobPhase::kClosing:
      return "closing";
  }
  return "";
}

const char* NameOf(WorkerView::State state) {
  switch (state) {
    case WorkerView::State::kIdle:
      return "idle";
    case WorkerView::State::kBusy:
      return "busy";
    case WorkerView::State::kDraining:
      return "draining";
    case WorkerView::State::kSilent:
      return "silent";
  }
  return "";
}

Json MapJson(const LayerMap& map) {
  Json rows = Json::array();
  for (const LayerMap::Row& row : map.rows) {
    const bool measured = std::any_of(row.recall.begin(), row.recall.end(), [](float x) { return x >= 0; });
    rows.push_back({{"name", Text(row.name)},
                    {"density", Shares(row.density)},
                    {"recall", measured ? Shares(row.recall) : Json::array()}});
  }
  return {{"first_layer", map.first_layer}, {"left_out", map.left_out}, {"rows", std::move(rows)}};
}

Json RequestJson(const RequestView& request) {
  return {{"id", Text(request.id)},
          {"tenant", Text(request.tenant)},
          {"model", Text(request.model)},
          {"policy", Text(request.policy)},
          {"priority", request.priority},
          {"tokens", request.num_tokens},
          {"epoch", request.epoch},
          {"waited_s", Seconds(request.waited)},
          {"time_left_s", Seconds(request.time_left)}};
}

Json WorkerJson(const WorkerView& worker) {
  Json works = Json::array();
  for (const WorkerView::Work& work : worker.works) {
    works.push_back({{"id", Text(work.request_id)}, {"rank", work.rank}, {"world_size", work.world_size}});
  }
  return {{"id", Text(worker.id)},
          {"device", Text(worker.device)},
          {"model", Text(worker.model)},
          {"state", NameOf(worker.state)},
          {"heartbeat_age_s", Seconds(worker.heartbeat_age)},
          {"idle_s", Seconds(worker.idle)},
          {"requests", worker.num_requests},
          {"tokens", worker.num_tokens},
          {"kv_unacked_bytes", worker.kv_unacked_bytes},
          {"budget_bytes", worker.budget_bytes},
          {"weight_bytes", worker.weight_bytes},
          {"works", std::move(works)}};
}

Json DecodeNodeJson(const DecodeNodeView& node) {
  return {{"id", Text(node.id)},
          {"pool", Text(node.pool)},
          {"connected", node.connected},
          {"heartbeat_age_s", Seconds(node.heartbeat_age)},
          {"kv_bytes_used", node.kv_bytes_used},
          {"kv_budget_bytes", node.kv_budget_bytes},
          {"sessions", node.sessions}};
}

Json RunningJson(const RunningView& running) {
  Json ranks = Json::array();
  for (const RankView& rank : running.ranks) {
    ranks.push_back({{"worker", Text(rank.worker_id)},
                     {"completed", rank.completed},
                     {"layers_done", rank.layers_done},
                     {"bytes_acked", rank.bytes_acked},
                     {"bytes_total", rank.bytes_total}});
  }
  Json out = RequestJson(running.request);
  out.update({{"phase", NameOf(running.phase)},
              {"strategy", running.strategy},
              {"in_epoch_s", Seconds(running.in_epoch)},
              {"layers_done", running.layers_done},
              {"layers", running.num_layers},
              {"resume_layer", running.resume_layer},
              {"tokens_per_second", Real(running.tokens_per_second, 10)},
              {"density", Share(running.density)},
              {"recall", Share(running.recall)},
              {"eta_s", Seconds(running.eta)},
              {"bytes_acked", running.bytes_acked},
              {"bytes_total", running.bytes_total},
              {"decode_node", Text(running.decode_node)},
              {"decode_away", running.decode_away},
              {"ranks", std::move(ranks)},
              {"ranks_left_out", running.ranks_left_out},
              {"map", MapJson(running.map)}});
  return out;
}

Json WaitingJson(const WaitingView& waiting) {
  Json out = RequestJson(waiting.request);
  out.update({{"accepted", waiting.accepted}, {"why", Text(waiting.why)}});
  return out;
}

Json EndedJson(const EndedView& ended) {
  Json out = RequestJson(ended.request);
  out.update({{"code", ended.code},
              {"reason", ended.reason},
              {"total_s", Seconds(ended.total)},
              {"ago_s", Seconds(ended.ago)},
              {"world_size", ended.world_size},
              {"tokens_per_second", Real(ended.tokens_per_second, 10)},
              {"density", Share(ended.density)},
              {"recall", Share(ended.recall)},
              {"kv_bytes", ended.kv_bytes},
              {"decode_node", Text(ended.decode_node)},
              {"map", MapJson(ended.map)}});
  return out;
}

Json LostWorkerJson(const LostWorkerView& lost) {
  return {{"id", Text(lost.id)}, {"why", Text(lost.why)}, {"ago_s", Seconds(lost.ago)}};
}

// {"total": ..., "left_out": ..., "items": [...]}
template <typename View>
Json ListJson(const std::vector<View>& views, uint64_t total, Json (*item)(const View&)) {
  Json items = Json::array();
  for (const View& view : views) items.push_back(item(view));
  return {{"total", total},
          {"left_out", total - std::min<uint64_t>(total, views.size())},
          {"items", std::move(items)}};
}

}  // namespace

std::string SnapshotJson(const Snapshot& snapshot) {
  const Snapshot& s = snapshot;
  Json out = {{"version", kVersion},
              {"clock_ms", absl::ToUnixMillis(s.now)},
              {"uptime_s", Seconds(s.uptime)},
              {"draining", s.draining},
              {"heartbeat_interval_s", Seconds(s.heartbeat_interval)},
              {"max_queue_requests", s.max_queue_requests},
              {"workers_busy", s.workers_busy},
              {"workers_draining", s.workers_draining},
              {"workers_silent", s.workers_silent},
              {"decode_nodes_connected", s.decode_nodes_connected},
              {"waiting_tokens", s.waiting_tokens},
              {"running_tokens", s.running_tokens},
              {"longest_wait_s", Seconds(s.longest_wait)},
              {"completed_total", s.completed_total},
              {"failed_total", s.failed_total},
              {"tokens_total", s.tokens_total},
              {"retries_total", s.retries_total},
              {"workers", ListJson(s.workers, s.workers_total, WorkerJson)},
              {"decode_nodes", ListJson(s.decode_nodes, s.decode_nodes_total, DecodeNodeJson)},
              {"running", ListJson(s.running, s.running_total, RunningJson)},
              {"waiting", ListJson(s.waiting, s.waiting_total, WaitingJson)},
              {"ended", ListJson(s.ended, s.ended.size(), EndedJson)},
              {"lost_workers", ListJson(s.lost_workers, s.lost_workers.size(), LostWorkerJson)}};
  return out.dump(-1, ' ', true, Json::error_handler_t::replace);
}

}  // namespace headwater
