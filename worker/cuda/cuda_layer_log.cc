#include "worker/cuda/cuda_layer_log.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "kernels/cuda/layer_ops.h"
#include "model/kernel_status.h"

namespace headwater {
namespace {

absl::Status Between(const CudaEvent& from, const CudaEvent& to, absl::Duration* time) {
  float milliseconds = 0;
  HW_RETURN_IF_ERROR(FromCuda(cudaEventElapsedTime(&milliseconds, from.get(), to.get()), "times"));
  *time = absl::Milliseconds(milliseconds);
  return absl::OkStatus();
}

}  // namespace

absl::Status CudaLayerLog::Init(int32_t num_layers, int64_t num_chunks, int64_t max_searches, bool gathers) {
  gathers_ = gathers;
  num_chunks_ = num_chunks;
  max_searches_ = max_searches;
  events_.resize(static_cast<size_t>(num_layers));
  first_rows_.resize(events_.size());
  searches_.resize(events_.size());
  for (Events& events : events_) {
    for (CudaEvent* event :
         {&events.begin, &events.projected, &events.gathered, &events.attended, &events.end}) {
      HW_RETURN_IF_ERROR(event->Create(cudaEventDefault));
    }
  }
  const auto pinned = [&](int64_t per_layer, uint64_t size, DeviceBuffer* buffer) -> absl::Status {
    HW_ASSIGN_OR_RETURN(*buffer,
                        DeviceBuffer::AllocatePinned(static_cast<uint64_t>(num_layers * per_layer) * size,
                                                     "checks of layers"));
    return absl::OkStatus();
  };
  HW_RETURN_IF_ERROR(pinned(num_chunks, sizeof(int64_t), &bad_rows_));
  return pinned(max_searches, sizeof(CudaPatternCounts), &counts_);
}

CudaPatternCounts* CudaLayerLog::AddSearch(int32_t layer, int64_t begin, int64_t count) {
  std::vector<Search>& searches = searches_[static_cast<size_t>(layer)];
  searches.push_back({begin, count});
  return Counts(layer) + searches.size() - 1;
}

absl::Status CudaLayerLog::CopyBadRows(int32_t layer, const int64_t* bad_rows, int64_t num_chunks,
                                       int64_t first_row, cudaStream_t stream) {
  first_rows_[static_cast<size_t>(layer)] = first_row;
  std::fill_n(BadRows(layer), num_chunks_, -1);
  return FromKernels(
      kernels::CudaStoreToHost(bad_rows, BadRows(layer), num_chunks * int64_t{sizeof(int64_t)}, stream),
      "checks of layers");
}

absl::Status CudaLayerLog::HasRun(int32_t layer, bool* has_run) const {
  const cudaError_t state = cudaEventQuery(events(layer).end.get());
  *has_run = state == cudaSuccess;
  if (state == cudaErrorNotReady) {
    (void)cudaGetLastError();  // no failure: the next launch must not take it for its own
    return absl::OkStatus();
  }
  return FromCuda(state, absl::StrCat("layer ", layer));
}

std::vector<int64_t> CudaLayerLog::NonFiniteRows(int32_t layer, int64_t chunk_tokens) const {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < num_chunks_; ++i) {
    const int64_t row = BadRows(layer)[i];
    if (row >= 0) rows.push_back(first_rows_[static_cast<size_t>(layer)] + i * chunk_tokens + row);
  }
  return rows;
}

absl::Status CudaLayerLog::ReadTimes(int32_t layer, int32_t first_layer, absl::Time begin,
                                     LayerTimes* times) const {
  const Events& at = events(layer);
  absl::Duration since_first;
  HW_RETURN_IF_ERROR(Between(events(first_layer).begin, at.begin, &since_first));
  times->begin = begin + since_first;
  HW_RETURN_IF_ERROR(Between(at.begin, at.projected, &times->project));
  if (gathers_) HW_RETURN_IF_ERROR(Between(at.projected, at.gathered, &times->exchange));
  HW_RETURN_IF_ERROR(Between(gathers_ ? at.gathered : at.projected, at.attended, &times->attention));
  return Between(at.attended, at.end, &times->mlp);
}

CudaLayerLog::Searches CudaLayerLog::CountSearches(int32_t layer, const CudaPattern& pattern) const {
  Searches all;
  const std::vector<Search>& searches = searches_[static_cast<size_t>(layer)];
  for (size_t i = 0; i < searches.size(); ++i) {
    const CudaPatternCounts& found = Counts(layer)[i];
    const CudaPattern::Blocks blocks = pattern.CountBlocks(searches[i].begin, searches[i].count, found);
    all.blocks.computed += blocks.computed;
    all.blocks.possible += blocks.possible;
    all.overflows += found.overflows;
  }
  return all;
}

}  // namespace headwater
