// Launches of SharePrefill's decisions (cuda/policies/share.h).
#ifndef HW_KERNELS_CUDA_SM90_SHARE_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_SHARE_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_masks.h"

namespace headwater::kernels::sm90 {

inline constexpr int32_t kMostShareHeads = 512;

// The numbers of reference::ShareRole.
enum class ShareRole : int32_t { kQueryAware, kPivot, kShared, kOwn };

// What has been decided of a query head.
struct ShareHead {
  ShareRole role;
  int32_t slot;  // of the pivot that it is, or was compared with; -1: none
  double vertical_distance, slash_distance;
};

// Pivots of a prompt, a slot each: one for each cluster that shares, or for each of a layer's first heads.
struct SharePivots {
  int32_t count;            // of slots
  int32_t* layers;          // [count]; -1: no pivot yet
  int32_t* fresh;           // [count]: the head that became the slot's pivot in this layer, or -1
  uint8_t* fresh_flags;     // [count]: 1 where fresh is not -1
  float* scores;            // [count, 2, nb]: V, D
  double* ratios;           // [count]: r
  CudaBlockMasks patterns;  // lists are slots
};

struct ShareParams {
  const uint8_t* query_aware;  // [num_heads]
  const float* scores;         // V, D: [2, num_heads, nb]
  int32_t* budgets;            // [2, num_heads]
  int64_t num_blocks;          // nb
  int32_t num_heads;           // 1 to kMostShareHeads
  int32_t layer;
  int32_t pivots_per_layer;  // 0: by cluster
  int32_t least_budget;      // of heads that share
  bool nan_rule;
  double similarity, fallback;
  SharePivots pivots;
  ShareHead* heads;                // [num_heads]
  uint8_t* dense;                  // [num_heads]: 1 for pivots
  int32_t slots[kMostShareHeads];  // by cluster: of each head; -1: none
};

// All heads' roles but kShared; pivots leave V and D in their slots, and the slot of no pivot of this layer
// is not fresh.
cudaError_t LaunchSharePivots(const ShareParams& params, cudaStream_t stream);

// Heads of role kOwn that may share do: role, budgets. By cluster with pivots of earlier layers, otherwise
// with those of this one. By cluster nothing else runs between the two.
cudaError_t LaunchShareSharers(const ShareParams& params, cudaStream_t stream);

// r of the slot, if it is fresh, from its average attention [nb, nb] and its head's own mask.
cudaError_t LaunchShareRatio(const SharePivots& pivots, int32_t slot, const float* average,
                             const CudaBlockMasks& masks, cudaStream_t stream);

// Adds to the mask of each head that shares the pattern of its slot.
cudaError_t LaunchSharePatterns(const ShareHead* heads, const CudaBlockMasks& patterns,
                                const CudaBlockMasks& masks, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_SHARE_LAUNCH_H_
