// CudaPrefillPlan: device memory of one pass besides the model's, known before it starts. Pure.
#ifndef HW_WORKER_CUDA_CUDA_PLAN_H_
#define HW_WORKER_CUDA_CUDA_PLAN_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/cuda/policy.h"
#include "model/config.h"

namespace headwater {

// Layers whose K and V are on the device at once.
inline constexpr int kCudaKvBuffers = 2;

// Of the block lists of one layer after another, for a part of the queries at a time.
struct CudaPatternPlan {
  // Queries of one search, and entries of its lists; a tile for which there is no room left goes dense.
  static constexpr int64_t kMaxQueries = 1 << 17;
  static constexpr int64_t kMaxEntries = 8 << 20;

  uint64_t k_mean = 0;   // [blocks, num_kv_heads, head_dim] f32
  uint64_t k_table = 0;  // the same in bf16, as the search reads them
  uint64_t search = 0;   // its workspace
  uint64_t counts = 0;   // [num_kv_heads, tiles]
  uint64_t offsets = 0;
  uint64_t blocks = 0;
  uint64_t counters = 0;

  uint64_t total_bytes() const;
};
CudaPatternPlan PlanCudaPattern(const ModelConfig& config, int64_t num_tokens);

// Of a policy of kernels/cuda/policy.h.
struct CudaPolicyPlan {
  // Queries of a layer whose recall is measured, at most: where min_recall is asked for, and else.
  static constexpr int32_t kMostSampledRows = 512, kSampledRows = 32;
  static constexpr uint64_t kMassBytes = uint64_t{64} << 20;  // kSampledRows may take more

  uint64_t policy = 0;     // its own
  uint64_t workspace = 0;  // attention's
  uint64_t lse = 0;        // where the policy wants the rows' sums, and the output apart from Q
  uint64_t out = 0;
  uint64_t counters = 0;     // visited blocks and dense tiles of each list, thresholds, recalls
  uint64_t rows = 0;         // positions of sampled queries
  uint64_t mass = 0;         // of theirs by block
  uint64_t curve = 0;        // recalls of theirs by threshold
  uint64_t part = 0;         // lists of a rank's queries, of a selection for the whole prompt
  int32_t sampled_rows = 0;  // for which there is room

  uint64_t total_bytes() const;
};
// Of a whole prompt on one GPU.
CudaPolicyPlan PlanCudaPolicy(const kernels::CudaPolicy& policy, const ModelConfig& config,
                              int64_t num_tokens);
// Of a rank, whose policy selects for the whole prompt while it attends to its own queries alone.
CudaPolicyPlan PlanCudaPolicyOfPart(const kernels::CudaPolicy& policy, const ModelConfig& config,
                                    int64_t num_tokens);
// Of a rank of world_size with these ranges of the prompt's queries; `policy` takes ranges.
CudaPolicyPlan PlanCudaPolicy(const kernels::CudaPolicy& policy, const ModelConfig& config,
                              int64_t num_tokens, const std::vector<kernels::CudaQueryRange>& ranges,
                              int world_size);

kernels::CudaPolicyShape CudaPolicyShapeOf(const ModelConfig& config);

// Bytes.
struct CudaPrefillPlan {
  uint64_t tokens = 0;      // ids
  uint64_t positions = 0;   // of packed prompts' tokens, int32
  uint64_t cu_seqlens = 0;  // of packed prompts, int32
  uint64_t hidden = 0;      // [rows, hidden_size] f32
  uint64_t q = 0;           // [rows, num_q_heads, head_dim] bf16; attention writes its output in its place
  uint64_t kv = 0;          // K and V of one layer of the whole prompt, bf16
  int num_kv = 0;           // of those
  uint64_t logits = 0;      // [prompts, vocab_size] f32
  uint64_t bad_rows = 0;
  uint64_t workspace = 0;  // attention's
  CudaPatternPlan pattern;
  CudaPolicyPlan policy;
  uint64_t all_q = 0;        // Q of the whole prompt, bf16, where a rank's policy looks at it
  uint64_t checkpoints = 0;  // CheckpointDeviceBytes()

  // Each part rounded up to 256 bytes.
  uint64_t total_bytes() const;
};
inline constexpr int64_t kAllTokens = -1;
// CudaPrefillPlan::all_q.
uint64_t AllQueryBytes(const ModelConfig& config, int64_t num_tokens);

// num_prompts: over 1, packed in one pass; they go dense and need nothing for lists. num_rows: tokens of this
// rank. Without checkpoints.
CudaPrefillPlan PlanCudaPrefill(const ModelConfig& config, int64_t chunk_tokens, int64_t num_tokens,
                                int64_t num_prompts = 1, const CudaPolicyPlan& policy = {},
                                int64_t num_rows = kAllTokens);

// Queries of one call of the attention kernel, but for a range's last one.
inline constexpr int64_t kLeastQueries = 1024;
// Queries [begin, begin + count) of one call, of those up to `end`: as many as take about 18 ms of an H100
// (the last tiles of a call leave part of the device idle for up to 1 ms), at most `most`, in multiples of
// 128. A short rest is shared out: the last tokens' tile sees every key, and a call that is soon done waits
// for it. fit: of so many queries, those that a call should take, if not empty.
int64_t QueriesOfCall(double flop_per_pair, int64_t begin, int64_t end, int64_t most,
                      const std::function<int64_t(int64_t)>& fit = nullptr);

// Rounded up to the alignment of a part.
uint64_t AlignedCudaPart(uint64_t bytes);

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_PLAN_H_
