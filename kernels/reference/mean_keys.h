// Which means stand for what a tile does not list (CudaMeanCorrection of cuda/attention.h), by the rule
// alone.
#ifndef HW_KERNELS_REFERENCE_MEAN_KEYS_H_
#define HW_KERNELS_REFERENCE_MEAN_KEYS_H_

#include <cstdint>
#include <vector>

namespace headwater::kernels::reference {

struct MeanKey {
  int64_t table_row;  // of the tables that CudaMeanTables() makes
  int64_t tokens;     // that it stands for
};

// listed: the tile's blocks; complete: blocks that every row of the tile sees whole.
std::vector<MeanKey> MeanKeys(const std::vector<int32_t>& listed, int64_t complete, int64_t total_k);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_MEAN_KEYS_H_
