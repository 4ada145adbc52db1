#include "worker/partition.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace headwater {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 40;
constexpr int kMaxWorldSize = 4096;
constexpr int64_t kMaxBlockTokens = 1 << 20;

absl::Status CheckRange(absl::string_view name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " ", value, " is outside ", least, " to ", most, " (partition)"));
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunk `chunk` of `num_chunks`: the first num_blocks % num_chunks chunks get one block more.
TokenRange ChunkTokens(int64_t num_tokens, int64_t block_tokens, int64_t num_chunks, int64_t chunk) {
  const int64_t num_blocks = CeilDiv(num_tokens, block_tokens);
  const int64_t base = num_blocks / num_chunks;
  const int64_t extra = num_blocks % num_chunks;
  const int64_t first = chunk * base + std::min(chunk, extra);
  const int64_t last = first + base + (chunk < extra ? 1 : 0);
  return {std::min(first * block_tokens, num_tokens), std::min(last * block_tokens, num_tokens)};
}

void AppendRange(const TokenRange& range, RankTokens* tokens) {
  if (range.size() == 0) return;
  if (!tokens->empty() && tokens->back().end == range.begin) {
    tokens->back().end = range.end;
  } else {
    tokens->push_back(range);
  }
}

}  // namespace

absl::StatusOr<std::vector<RankTokens>> PartitionTokens(int64_t num_tokens, int world_size,
                                                        v1::Partition partition, int64_t block_tokens) {
  absl::Status checks = CheckRange("num_tokens", num_tokens, 1, kMaxTokens);
  checks.Update(CheckRange("world_size", world_size, 1, kMaxWorldSize));
  checks.Update(CheckRange("block_tokens", block_tokens, 1, kMaxBlockTokens));
  if (!checks.ok()) return checks;

  std::vector<RankTokens> ranks(static_cast<size_t>(world_size));
  if (partition == v1::PARTITION_CONTIGUOUS) {
    for (int rank = 0; rank < world_size; ++rank) {
      AppendRange(ChunkTokens(num_tokens, block_tokens, world_size, rank), &ranks[rank]);
    }
    return ranks;
  }
  if (partition == v1::PARTITION_ZIGZAG) {
    const int num_chunks = 2 * world_size;
    for (int rank = 0; rank < world_size; ++rank) {
      AppendRange(ChunkTokens(num_tokens, block_tokens, num_chunks, rank), &ranks[rank]);
      AppendRange(ChunkTokens(num_tokens, block_tokens, num_chunks, num_chunks - 1 - rank), &ranks[rank]);
    }
    return ranks;
  }
  if (partition == v1::PARTITION_STRIPED) {
    const int64_t num_blocks = CeilDiv(num_tokens, block_tokens);
    const int64_t stripe = CeilDiv(num_blocks, kMaxRanges * world_size) * block_tokens;
    size_t rank = 0;
    for (int64_t begin = 0; begin < num_tokens; begin += stripe) {
      AppendRange({begin, std::min(begin + stripe, num_tokens)}, &ranks[rank]);
      rank = (rank + 1) % ranks.size();
    }
    return ranks;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("partition ", static_cast<int>(partition),
                   " is unknown; known are contiguous (1), zigzag (2) and striped (3)"));
}

int64_t NumTokens(const RankTokens& tokens) {
  int64_t sum = 0;
  for (const TokenRange& range : tokens) sum += range.size();
  return sum;
}

int64_t MostTokens(const std::vector<RankTokens>& partition) {
  int64_t most = 0;
  for (const RankTokens& tokens : partition) most = std::max(most, NumTokens(tokens));
  return most;
}

int64_t MostCheckpointTokens(const std::vector<RankTokens>& partition) {
  int64_t most = 0;
  for (size_t rank = 0; rank < partition.size(); ++rank) {
    const size_t left = (rank + partition.size() - 1) % partition.size();
    most = std::max(most, NumTokens(partition[rank]) + NumTokens(partition[left]));
  }
  return most;
}

}  // namespace headwater
