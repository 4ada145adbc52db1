// A-shape on the GPU: attention sinks and a sliding window, exact to the token.
#ifndef HW_KERNELS_CUDA_POLICIES_A_SHAPE_H_
#define HW_KERNELS_CUDA_POLICIES_A_SHAPE_H_

#include <memory>

#include "kernels/cuda/policy.h"
#include "kernels/cuda/range_attention.h"

namespace headwater::kernels {

// Sets CudaSelection::ranges, which all heads and layers share. `visited` and `possible` count pairs of 64
// query rows and 64 keys.
class AShapePolicy final : public CudaPolicy {
 public:
  AShapePolicy(const AShapeParameters& parameters, const CudaPolicyShape& shape)
      : parameters_(parameters), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override;  // 28 bytes per 64 tokens
  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) override;
  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override;

 private:
  const AShapeParameters parameters_;
  const CudaPolicyShape shape_;
  CudaKeyRanges ranges_;
  CudaSelection selection_;
};

// INVALID_ARGUMENT: a parameter or the shape is out of range. UNIMPLEMENTED: head_dim, GQA ratio.
Status MakeCudaAShape(const AShapeParameters& parameters, const CudaPolicyShape& shape,
                      std::unique_ptr<CudaPolicy>* made);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_A_SHAPE_H_
