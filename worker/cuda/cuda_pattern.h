// CudaPattern: block lists of one layer after another on a GPU, for the policy "probe".
#ifndef HW_WORKER_CUDA_CUDA_PATTERN_H_
#define HW_WORKER_CUDA_CUDA_PATTERN_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

#include "kernels/cuda/attention.h"
#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/pattern.h"
#include "kernels/pattern/policy.h"
#include "model/config.h"
#include "worker/cuda/cuda_plan.h"

namespace headwater {

// What one search found; pinned memory, written when its stream has passed.
struct CudaPatternCounts {
  uint64_t entries;    // of the lists
  uint32_t overflows;  // tiles that went dense for want of room
  uint32_t reserved;
};

// Calls enqueue on one stream and return; searches share memory, so attention over the lists of one must be
// enqueued before the next search is.
class CudaPattern {
 public:
  // num_sms: multiprocessors of the device.
  // memory: PlanCudaPattern(config, num_tokens).total_bytes(), 256-byte aligned, which outlives this.
  CudaPattern(const ModelConfig& config, const kernels::ProbeParameters& probe, int64_t num_tokens,
              int num_sms, char* memory);

  // Where the layer's K leaves its means as it is written.
  kernels::CudaBlockStats stats() const;

  // All of the layer's K has been written.
  absl::Status StartLayer(cudaStream_t stream);

  // Searches for queries [begin, begin + args->total_q), args->q of them, over the whole sequence's keys, and
  // sets args' keys, position and lists. begin: a multiple of 128; at most kMaxQueries of them.
  absl::Status Select(int64_t begin, kernels::CudaAttentionArgs* args, CudaPatternCounts* counts,
                      cudaStream_t stream);

  // Queries for a call that might take `count`: as many as leave no multiprocessor of the device without work
  // at the search's end, in multiples of 128, but at most twice as many and kMaxQueries; else `count`.
  int64_t QueriesOfSearch(int64_t count) const;

  // Blocks that attention over these queries visits, given what the search found, and those there are.
  struct Blocks {
    uint64_t computed = 0;
    uint64_t possible = 0;
  };
  Blocks CountBlocks(int64_t begin, int64_t count, const CudaPatternCounts& counts) const;

 private:
  kernels::CudaSearchArgs SearchArgs() const;  // but for what a search is of
  int64_t TilePositions() const;
  // The last queries see everything: FlashPrefill's rule (arXiv:2603.06199).
  int32_t DenseLastTokens(int64_t end) const;

  const ModelConfig& config_;
  const kernels::ProbeParameters probe_;
  const int64_t num_tokens_;
  const int num_sms_;
  const CudaPatternPlan plan_;
  float* k_mean_;
  char* k_table_;
  char* search_;
  int32_t* counts_;
  int64_t* offsets_;
  int32_t* blocks_;
  char* counters_;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_PATTERN_H_
