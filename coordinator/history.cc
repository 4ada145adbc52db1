#include "coordinator/history.h"

#include <algorithm>
#include <utility>

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

constexpr size_t kMostEnded = 12;
constexpr size_t kMostLost = 8;
constexpr size_t kMostCells = 8192;  // of one map
constexpr size_t kMostWhy = 200;

}  // namespace

RequestView ViewOf(const Job& job) {
  RequestView view;
  view.id = job.key.request_id;
  view.tenant = job.key.tenant;
  view.model = job.model.name();
  view.policy = job.dense() ? "dense" : job.policy;
  view.priority = job.request().priority();
  view.num_tokens = job.num_tokens();
  view.epoch = job.epoch;
  return view;
}

void History::AddEnded(const Job& job, const v1::PrefillResponse& terminal, const absl::Status& status,
                       absl::Time now) {
  EndedView view;
  view.request = ViewOf(job);
  if (job.started_at.has_value()) view.request.waited = *job.started_at - job.accepted_at;
  view.code = absl::StatusCodeToString(status.code());
  view.reason = status.ok() ? "" : ReasonName(ReasonOf(status));
  view.total = now - job.accepted_at;
  view.world_size = job.plan.world_size();
  view.decode_node = job.decode_node;
  if (status.ok()) {
    const v1::PrefillCompleted& completed = terminal.completed();
    view.tokens_per_second = completed.tokens_per_second();
    view.density = completed.density();
    if (completed.attention().has_recall_mean()) view.recall = completed.attention().recall_mean();
    view.kv_bytes = completed.kv_bytes();
    view.map = MapOfEnded(job, kMostCells);
    ++completed_;
    tokens_ += job.num_tokens();
  } else {
    view.map = MapOfRanks(job, kMostCells);
    ++failed_;
  }
  ended_.push_front({now, std::move(view)});
  if (ended_.size() > kMostEnded) ended_.pop_back();
}

void History::AddLostWorker(const std::string& id, const absl::Status& why, absl::Time now) {
  lost_.push_front({now, {id, std::string(why.message().substr(0, kMostWhy)), absl::ZeroDuration()}});
  if (lost_.size() > kMostLost) lost_.pop_back();
}

void History::Fill(absl::Time now, Snapshot* out) const {
  out->uptime = now - start_;
  out->completed_total = completed_;
  out->failed_total = failed_;
  out->tokens_total = tokens_;
  for (const Ended& ended : ended_) {
    out->ended.push_back(ended.view);
    out->ended.back().ago = now - ended.at;
  }
  for (const Lost& lost : lost_) {
    out->lost_workers.push_back(lost.view);
    out->lost_workers.back().ago = now - lost.at;
  }
}

}  // namespace headwater
