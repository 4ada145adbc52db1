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

// listed: the tile's blocks; complete: blocks that every row of the tile sees whole. Without superblocks each
// complete block that is not listed is a key, as in FlashPrefill V2 (arXiv:2608.19758), which counts as
// complete what ends before the tile's first position; that is the same where the first position's block is
// listed.
std::vector<MeanKey> MeanKeys(const std::vector<int32_t>& listed, int64_t complete, int64_t total_k,
                              bool superblocks = true);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_MEAN_KEYS_H_
