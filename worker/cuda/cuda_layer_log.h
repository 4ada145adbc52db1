// CudaLayerLog: what the layers of a pass leave for the host, read without waiting for the device: events and
// their times, rows that are not finite, what searches found.
#ifndef HW_WORKER_CUDA_CUDA_LAYER_LOG_H_
#define HW_WORKER_CUDA_CUDA_LAYER_LOG_H_

#include <cstdint>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "model/cuda/device_buffer.h"
#include "worker/cuda/cuda_pattern.h"
#include "worker/prefill.h"

namespace headwater {

// Owns an event.
class CudaEvent {
 public:
  CudaEvent() = default;
  CudaEvent(CudaEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  CudaEvent& operator=(CudaEvent&&) = delete;
  ~CudaEvent() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }
  absl::Status Create(unsigned flags) {
    return FromCuda(cudaEventCreateWithFlags(&event_, flags), "an event");
  }
  absl::Status Record(cudaStream_t stream) const {
    return FromCuda(cudaEventRecord(event_, stream), "an event");
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaLayerLog {
 public:
  struct Events {
    // projected: this rank's K and V are whole; gathered: all ranks' are, in a group
    CudaEvent begin, projected, gathered, attended, end;
  };
  // Queries of one search.
  struct Search {
    int64_t begin, count;
  };

  // max_searches: of a layer. gathers: `gathered` is recorded.
  absl::Status Init(int32_t num_layers, int64_t num_chunks, int64_t max_searches, bool gathers);

  const Events& events(int32_t layer) const { return events_[static_cast<size_t>(layer)]; }

  // Where the next search of the layer leaves its counts.
  CudaPatternCounts* AddSearch(int32_t layer, int64_t begin, int64_t count);

  // Enqueues the copy of a layer's first bad row in each chunk, `num_chunks` of them. first_row: of the first
  // chunk.
  absl::Status CopyBadRows(int32_t layer, const int64_t* bad_rows, int64_t num_chunks, int64_t first_row,
                           cudaStream_t stream);

  absl::Status HasRun(int32_t layer, bool* has_run) const;

  // Of a layer that has run: rows of the pass that are not finite, the first of each chunk. chunk_tokens:
  // rows of a chunk.
  std::vector<int64_t> NonFiniteRows(int32_t layer, int64_t chunk_tokens) const;
  // Likewise: all but `layer` and egress_stall. first_layer, which began at `begin`: of the pass.
  absl::Status ReadTimes(int32_t layer, int32_t first_layer, absl::Time begin, LayerTimes* times) const;
  struct Searches {
    CudaPattern::Blocks blocks;
    uint32_t overflows = 0;
  };
  Searches CountSearches(int32_t layer, const CudaPattern& pattern) const;

 private:
  int64_t* BadRows(int32_t layer) const {
    return reinterpret_cast<int64_t*>(bad_rows_.data()) + layer * num_chunks_;
  }
  CudaPatternCounts* Counts(int32_t layer) const {
    return reinterpret_cast<CudaPatternCounts*>(counts_.data()) + layer * max_searches_;
  }

  int64_t num_chunks_ = 0;
  int64_t max_searches_ = 0;
  bool gathers_ = false;
  std::vector<Events> events_;
  std::vector<int64_t> first_rows_;
  std::vector<std::vector<Search>> searches_;
  DeviceBuffer bad_rows_;  // pinned
  DeviceBuffer counts_;    // pinned
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_LAYER_LOG_H_
