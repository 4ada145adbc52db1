// Which threshold of the pattern search lets lists hold a wanted recall, from sampled queries and before any
// list is made, on a Hopper GPU.
#ifndef HW_KERNELS_CUDA_RECALL_THRESHOLD_H_
#define HW_KERNELS_CUDA_RECALL_THRESHOLD_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_mass.h"
#include "kernels/status.h"

namespace headwater::kernels {

// The threshold of step i is 2^(-i / kRecallStepsPerOctave), i from 0 to kRecallSteps.
inline constexpr int32_t kRecallStepsPerOctave = 16, kRecallSteps = 24 * kRecallStepsPerOctave;

// What lists are to hold, and where the thresholds for that go.
struct CudaRecallGoal {
  CudaSampledRows rows;         // at least one
  const float* mass = nullptr;  // [num_rows, num_q_heads, blocks] of these rows, of CudaRowMass()
  float min_recall = 0;         // over 0, at most 1
  float errors = 0;             // standard errors of the mean that it must be exceeded by; 0 and more
  float* curve = nullptr;       // [num_rows, num_kv_heads, kRecallSteps + 1]; written: recalls by step
  float* thresholds = nullptr;  // [num_kv_heads]; written. Null: `curve` alone is wanted
};

// One sequence; fields but the goal are those of CudaSearchArgs (cuda/pattern.h).
struct CudaRecallThresholdArgs {
  const void* q = nullptr;
  const void* k_means = nullptr;  // wanted
  CudaQueryRange queries = {};    // that q holds; rows outside are no queries
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float softmax_scale = 0;
  int32_t sink_blocks = 2;
  int32_t window_blocks = 4;
  const int32_t* windows = nullptr;  // host memory [num_kv_heads], in place of window_blocks; may be null
  int32_t dense_last_tokens = 0;
  CudaRecallGoal goal;
};

// A row's recall under a threshold is the mass, a mean over its KV head's query heads, on what the list of
// its tile holds; curve has them, exact to 1e-5 but where a block's score lies within rounding of a step.
// thresholds[h]: that of the first step whose mean over the rows, less `errors` standard errors of the mean
// (rows taken as independent), is min_recall or more; 0: there is none, or what is compared is not finite.
//
// Rows whose queries lie with several callers: each one's curves, then CudaThresholdsOfCurves() over all.
//
// Enqueues on `stream`; arrays must live until it has passed, `windows` until the call returns.
// Deterministic. INVALID_ARGUMENT: null or misaligned arrays (q and k_means 16 bytes, positions as
// CudaRowMass(), others 4), sizes and numbers out of range. UNIMPLEMENTED: head_dim, GQA ratio, over 128 KV
// heads, a device that is not sm_90. Cost: 8 * head_dim FLOP for each row, query head and block that it sees,
// a read of mass.
Status CudaThresholdsForRecall(const CudaRecallThresholdArgs& args, cudaStream_t stream);

// Its second half: of goal, `curve` is read and `thresholds` written, for rows.num_rows; the rows themselves
// and `mass` are not looked at.
Status CudaThresholdsOfCurves(const CudaRecallGoal& goal, int32_t num_kv_heads, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_RECALL_THRESHOLD_H_
