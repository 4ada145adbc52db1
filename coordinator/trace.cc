#include "coordinator/trace.h"

#include <algorithm>
#include <utility>

namespace headwater {

uint64_t TraceMicros(absl::Time arrived, absl::Time at) {
  return static_cast<uint64_t>(std::max<int64_t>(1, absl::ToInt64Microseconds(at - arrived)));
}

void AddRankTimeline(const Job& job, uint32_t rank, const v1::RankTrace& reported, absl::Time now,
                     v1::EpochTrace* epoch) {
  v1::RankTimeline* const timeline = epoch->add_ranks();
  timeline->set_rank(rank);
  timeline->set_worker_id(job.ranks[rank].worker_id);
  timeline->set_completed_us(TraceMicros(job.arrived, now));
  timeline->mutable_trace()->set_begin_us(reported.begin_us());
  timeline->mutable_trace()->set_end_us(reported.end_us());
  uint32_t next = 0;
  for (const v1::LayerTrace& layer : reported.layers()) {
    if (layer.layer() < next || layer.layer() >= job.model.num_layers()) continue;
    *timeline->mutable_trace()->add_layers() = layer;
    next = layer.layer() + 1;
  }
}

v1::RequestTrace MakeRequestTrace(const Job& job) {
  v1::RequestTrace trace;
  trace.set_request_id(job.key.request_id);
  trace.set_tenant(job.key.tenant);
  trace.set_trace_id(job.prepared.trace.trace_id);
  trace.set_parent_id(job.prepared.trace.parent_id);
  trace.set_span_id(job.prepared.trace.span_id);
  trace.set_model(job.model.name());
  trace.set_policy(job.policy);
  trace.set_num_tokens(job.num_tokens());
  trace.set_decode_node(job.decode_node);
  const int64_t micros = absl::ToUnixMicros(job.arrived_wall);
  trace.mutable_arrived()->set_seconds(micros / 1'000'000);
  trace.mutable_arrived()->set_nanos(static_cast<int32_t>(micros % 1'000'000 * 1000));
  if (job.accepted) trace.set_accepted_us(TraceMicros(job.arrived, job.accepted_at));
  for (const v1::EpochTrace& epoch : job.epoch_traces) *trace.add_epochs() = epoch;
  return trace;
}

void TraceStore::Put(const JobKey& key, v1::RequestTrace trace) {
  if (const auto it = index_.find(key); it != index_.end()) Erase(it->second);
  const uint64_t bytes = trace.ByteSizeLong();
  if (bytes > max_bytes_) return;
  while (bytes_ + bytes > max_bytes_) Erase(entries_.begin());
  entries_.push_back({key, std::move(trace), bytes});
  index_.emplace(key, std::prev(entries_.end()));
  bytes_ += bytes;
}

const v1::RequestTrace* TraceStore::Find(const JobKey& key) const {
  const auto it = index_.find(key);
  return it == index_.end() ? nullptr : &it->second->trace;
}

void TraceStore::Erase(std::list<Entry>::iterator it) {
  bytes_ -= it->bytes;
  index_.erase(it->key);
  entries_.erase(it);
}

}  // namespace headwater
