// The block statistics of cuda/block_stats.h in obvious loops and double precision.
#ifndef HW_KERNELS_REFERENCE_BLOCK_STATS_H_
#define HW_KERNELS_REFERENCE_BLOCK_STATS_H_

#include <cstdint>
#include <vector>

namespace headwater::kernels::reference {

// Of blocks of 128 tokens, as CudaBlockStats. Bounds and norms are NaN where a value is.
struct BlockStats {
  std::vector<double> mean, min, max;         // [blocks, num_heads, head_dim]
  std::vector<double> mean_square, max_norm;  // [blocks, num_heads]
};

// x: [tokens, num_heads, head_dim].
BlockStats BlockStatistics(const float* x, int64_t tokens, int32_t num_heads, int32_t head_dim);

// As CudaMeanTables(), not rounded: [num_heads, rows, head_dim] of means [blocks, num_heads, head_dim].
std::vector<double> MeanTable(const float* mean, int64_t tokens, int32_t num_heads, int32_t head_dim);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_BLOCK_STATS_H_
