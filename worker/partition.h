// Which tokens each rank of a group holds.
#ifndef HW_WORKER_PARTITION_H_
#define HW_WORKER_PARTITION_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

#include "headwater/v1/types.pb.h"

namespace headwater {

// Tokens [begin, end).
struct TokenRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// Non-empty ranges of one rank, ascending. Contiguous gives one, zigzag up to two, striped up to kMaxRanges;
// a rank may have none.
using RankTokens = std::vector<TokenRange>;

inline constexpr int64_t kMaxRanges = 64;

// Deals whole blocks of `block_tokens` (the last may be short) as evenly as blocks allow, striped: as stripes
// do, of ceil(blocks / (kMaxRanges * world_size)) blocks each. Pure: every process that knows the arguments
// gets the same result. INVALID_ARGUMENT: an argument out of range.
absl::StatusOr<std::vector<RankTokens>> PartitionTokens(int64_t num_tokens, int world_size,
                                                        v1::Partition partition, int64_t block_tokens);

int64_t NumTokens(const RankTokens& tokens);
// Of the rank that has most.
int64_t MostTokens(const std::vector<RankTokens>& partition);
// Tokens whose rows a rank of this partition holds in one checkpoint, its own and its left neighbour's, the
// most of any rank: for plans.
int64_t MostCheckpointTokens(const std::vector<RankTokens>& partition);

}  // namespace headwater

#endif  // HW_WORKER_PARTITION_H_
