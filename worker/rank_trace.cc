#include "worker/rank_trace.h"

#include <algorithm>
#include <cstdint>

namespace headwater {
namespace {

uint64_t Micros(absl::Duration duration) {
  return static_cast<uint64_t>(std::max<int64_t>(0, absl::ToInt64Microseconds(duration)));
}

}  // namespace

v1::RankTrace MakeRankTrace(const std::vector<LayerTimes>& layers, const std::vector<KvLayerTimes>& sent,
                            absl::Time received, absl::Time begin, absl::Time end) {
  v1::RankTrace trace;
  trace.set_begin_us(Micros(begin - received));
  trace.set_end_us(Micros(end - received));
  for (const LayerTimes& times : layers) {
    v1::LayerTrace* const layer = trace.add_layers();
    layer->set_layer(static_cast<uint32_t>(times.layer));
    layer->set_start_us(Micros(times.begin - received));
    layer->set_egress_stall_us(Micros(times.egress_stall));
    layer->set_project_us(Micros(times.project));
    layer->set_exchange_us(Micros(times.exchange));
    layer->set_attention_us(Micros(times.attention));
    layer->set_mlp_us(Micros(times.mlp));
    const auto index = static_cast<size_t>(times.layer);
    if (index >= sent.size() || sent[index].last_acked < sent[index].first_submitted) continue;
    layer->set_egress_start_us(Micros(sent[index].first_submitted - received));
    layer->set_egress_end_us(Micros(sent[index].last_acked - received));
  }
  return trace;
}

}  // namespace headwater
