// Launches of SparseSkeleton's stages, in the order in which they depend on each other.
#ifndef HW_KERNELS_CUDA_SM90_SKELETON_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_SKELETON_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/sm90/skeleton_params.h"

namespace headwater::kernels::sm90 {

// theta_m, in [-pi, pi].
struct SkeletonFrequencies {
  double theta[64];
};

// per_pi, inverse_sine, turns, turns_f32.
cudaError_t LaunchSkeletonTables(const SkeletonParams& params, const SkeletonFrequencies& frequencies,
                                 cudaStream_t stream);
// chunk_sums, group_sums.
cudaError_t LaunchSkeletonKeySums(const SkeletonParams& params, cudaStream_t stream);
// grams, mu, sigma.
cudaError_t LaunchSkeletonStatistics(const SkeletonParams& params, cudaStream_t stream);
// lambda, last_parts.
cudaError_t LaunchSkeletonLocal(const SkeletonParams& params, cudaStream_t stream);
// distances, keys and target of samples [first, first + batch); rows past the last sample are 0.
cudaError_t LaunchSkeletonDesign(const SkeletonParams& params, int64_t first, cudaStream_t stream);
// Adds the batch to system, or, the first one, sets it.
cudaError_t LaunchSkeletonGram(const SkeletonParams& params, bool is_first, cudaStream_t stream);
// The sum of the splits of system, in the first one's place.
cudaError_t LaunchSkeletonSumSystems(const SkeletonParams& params, cudaStream_t stream);
// coefficients.
cudaError_t LaunchSkeletonSolve(const SkeletonParams& params, cudaStream_t stream);
// constants, s, v, s_most, v_block.
cudaError_t LaunchSkeletonTerms(const SkeletonParams& params, cudaStream_t stream);
// scan_sums, delta, h, s_block, h_block.
cudaError_t LaunchSkeletonRows(const SkeletonParams& params, cudaStream_t stream);
// tau of every head.
cudaError_t LaunchSkeletonThreshold(const SkeletonParams& params, float tau, cudaStream_t stream);
// tau = mean + deviation * quantile of the model over the interior.
cudaError_t LaunchSkeletonSpread(const SkeletonParams& params, double quantile, cudaStream_t stream);
// words.
cudaError_t LaunchSkeletonMasks(const SkeletonParams& params, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_SKELETON_LAUNCH_H_
