#include "kernels/reference/mean_keys.h"

#include <set>

namespace headwater::kernels::reference {

std::vector<MeanKey> MeanKeys(const std::vector<int32_t>& listed, int64_t complete, int64_t total_k,
                              bool superblocks) {
  constexpr int64_t kTokens = 128, kBlocks = 8;  // of a block; of a superblock
  const int64_t first_coarse = (total_k + kTokens * kBlocks - 1) / (kTokens * kBlocks) * kBlocks;
  const std::set<int64_t> blocks(listed.begin(), listed.end());
  std::vector<MeanKey> keys;
  for (int64_t superblock = 0; superblock * kBlocks < complete; ++superblock) {
    const int64_t begin = superblock * kBlocks;
    bool alone =
        superblocks && begin + kBlocks <= complete;  // nothing of it is listed, and all of it is seen
    for (int64_t block = begin; block < begin + kBlocks; ++block) alone = alone && blocks.count(block) == 0;
    if (alone) keys.push_back({first_coarse + superblock, kTokens * kBlocks});
    for (int64_t block = begin; block < begin + kBlocks && block < complete && !alone; ++block) {
      if (blocks.count(block) == 0) keys.push_back({block, kTokens});
    }
  }
  return keys;
}

}  // namespace headwater::kernels::reference
