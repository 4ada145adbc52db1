// Launches of the tail profile.
#ifndef HW_KERNELS_CUDA_SM90_TAIL_PROFILE_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_TAIL_PROFILE_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/policies/tail_profile.h"

namespace headwater::kernels::sm90 {

// The last rows of a prompt lie in slots of which the last is the last token's.
inline constexpr int kTailRows = kMostTailRows;
inline constexpr int kTailLeastChunkKeys = 128;
inline constexpr int kTailMostChunkKeys = 512;

struct TailProfileParams {
  CudaTailProfileArgs args;
  int32_t chunk_keys;  // a multiple of 128
  int64_t chunks;      // of a head
  float2* parts;       // [heads, chunks, kTailRows] largest score, and sum of exponentials under it
  float* tails;        // [heads, chunks, kTailRows] what a chunk adds to the next one's first diagonals
  float* lse;          // [heads, kTailRows] base 2, less log2(factor); infinity in slots without a row
};

cudaError_t LaunchTailProfile(const TailProfileParams& params, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_TAIL_PROFILE_LAUNCH_H_
