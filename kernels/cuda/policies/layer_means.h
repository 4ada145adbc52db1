// Block means of a layer's K, and of V where there is a correction, in a policy's memory.
#ifndef HW_KERNELS_CUDA_POLICIES_LAYER_MEANS_H_
#define HW_KERNELS_CUDA_POLICIES_LAYER_MEANS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/policy.h"

namespace headwater::kernels {

struct LayerMeans {
  void *k_table = nullptr, *v_table = nullptr;  // of CudaMeanTables(); v_table null: no correction
  float *k_mean = nullptr, *v_mean = nullptr;   // what they are made of

  static LayerMeans Take(const CudaPolicyShape& shape, int64_t num_tokens, bool corrects,
                         PolicyMemory* from) {
    const int64_t row = int64_t{shape.num_kv_heads} * shape.head_dim;
    const int64_t tables = CudaMeanTableRows(num_tokens) * row, means = CudaStatsBlocks(num_tokens) * row;
    LayerMeans m;
    m.k_table = from->Take<uint16_t>(tables);
    m.k_mean = from->Take<float>(means);
    if (corrects) {
      m.v_table = from->Take<uint16_t>(tables);
      m.v_mean = from->Take<float>(means);
    }
    return m;
  }

  CudaBlockStats stats() const {
    CudaBlockStats stats;
    stats.k_mean = k_mean;
    stats.v_mean = v_mean;
    return stats;
  }

  Status Make(const CudaPolicyShape& shape, int64_t num_tokens, const CudaPolicyLayer& layer,
              cudaStream_t stream) const {
    HW_KERNELS_RETURN_IF_ERROR(CudaBlockStatistics(
        {layer.k, layer.v, num_tokens, shape.num_kv_heads, shape.head_dim, 0, stats()}, stream));
    return MakeTables(shape, num_tokens, stream);
  }

  // Of means that are there.
  Status MakeTables(const CudaPolicyShape& shape, int64_t num_tokens, cudaStream_t stream) const {
    return CudaMeanTables({k_mean, v_mean, k_table, v_table, num_tokens, shape.num_kv_heads, shape.head_dim},
                          stream);
  }

  CudaMeanCorrection correction() const {
    return v_table == nullptr ? CudaMeanCorrection{} : CudaMeanCorrection{k_table, v_table};
  }
};

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_LAYER_MEANS_H_
