// The search of cuda/pattern.h over whole prompts, and dense attention, as policies.
#ifndef HW_KERNELS_CUDA_POLICIES_PROBE_H_
#define HW_KERNELS_CUDA_POLICIES_PROBE_H_

#include <memory>

#include "kernels/cuda/policy.h"

namespace headwater::kernels {

Status MakeCudaDense(const DenseParameters& parameters, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made);

// Dense below dense_below_tokens, unless a density is forced. Lists have room for 64 blocks a tile on
// average, with a forced density for what it asks; a tile that finds none goes dense and is counted.
Status MakeCudaProbe(const ProbeParameters& parameters, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_PROBE_H_
