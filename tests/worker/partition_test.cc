#include "worker/partition.h"

#include <algorithm>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/planner.h"
#include "worker/ring.h"

namespace headwater {
namespace {

using testing::HasSubstr;

std::vector<TokenRange> Sorted(const std::vector<RankTokens>& ranks) {
  std::vector<TokenRange> all;
  for (const RankTokens& tokens : ranks) all.insert(all.end(), tokens.begin(), tokens.end());
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  return all;
}

constexpr v1::Partition kKinds[] = {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED};

size_t MostRanges(v1::Partition kind) {
  if (kind == v1::PARTITION_STRIPED) return kMaxRanges;
  return kind == v1::PARTITION_ZIGZAG ? 2 : 1;
}

// All rules of the header, for one set of arguments.
void ExpectGoodPartition(int64_t tokens, int world, v1::Partition kind, int64_t block) {
  SCOPED_TRACE(testing::Message() << tokens << " tokens, " << world << " ranks, kind " << kind << ", block "
                                  << block);
  const auto ranks = PartitionTokens(tokens, world, kind, block);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  ASSERT_EQ(ranks->size(), static_cast<size_t>(world));

  int64_t next = 0;
  for (const TokenRange& range : Sorted(*ranks)) {
    EXPECT_EQ(range.begin, next);
    EXPECT_GT(range.size(), 0);
    EXPECT_EQ(range.begin % block, 0);
    EXPECT_TRUE(range.end % block == 0 || range.end == tokens);
    next = range.end;
  }
  EXPECT_EQ(next, tokens);

  int64_t least = tokens;
  int64_t most = 0;
  for (const RankTokens& rank : *ranks) {
    EXPECT_LE(rank.size(), MostRanges(kind));
    for (size_t i = 1; i < rank.size(); ++i) EXPECT_LT(rank[i - 1].end, rank[i].begin);
    int64_t blocks = 0;
    for (const TokenRange& range : rank) blocks += (range.size() + block - 1) / block;
    least = std::min(least, blocks);
    most = std::max(most, blocks);
  }
  const int64_t stripe = ((tokens + block - 1) / block + kMaxRanges * world - 1) / (kMaxRanges * world);
  EXPECT_LE(most - least, kind == v1::PARTITION_STRIPED ? stripe : 1);
}

TEST(PartitionTest, CoversEveryTokenOnceInAscendingWholeBlocksAndBalances) {
  for (const auto kind : kKinds) {
    for (const int64_t block : {1, 3, 16}) {
      for (int world = 1; world <= 9; ++world) {
        for (int64_t tokens = 1; tokens <= 24 * block; ++tokens)
          ExpectGoodPartition(tokens, world, kind, block);
        // More blocks than a rank has stripes.
        for (int64_t tokens = 63 * block; tokens <= 700 * block; tokens += 13 * block + 1)
          ExpectGoodPartition(tokens, world, kind, block);
      }
    }
  }
}

TEST(PartitionTest, HandlesLargePrompts) {
  for (const auto kind : kKinds) {
    ExpectGoodPartition(int64_t{1} << 40, 64, kind, 256);
    ExpectGoodPartition((int64_t{1} << 24) - 7, 5, kind, 4096);
  }
}

TEST(PartitionTest, ZigzagPairsChunksFromBothEnds) {
  const auto ranks = PartitionTokens(64, 2, v1::PARTITION_ZIGZAG, 16);

  ASSERT_TRUE(ranks.ok());
  ASSERT_EQ((*ranks)[0].size(), 2u);
  EXPECT_EQ((*ranks)[0][0].begin, 0);
  EXPECT_EQ((*ranks)[0][1].begin, 48);
  // Neighbouring chunks are one range.
  ASSERT_EQ((*ranks)[1].size(), 1u);
  EXPECT_EQ((*ranks)[1][0].begin, 16);
  EXPECT_EQ((*ranks)[1][0].end, 48);
}

TEST(PartitionTest, StripesGoRoundTheRanks) {
  // 130 blocks, 128 stripes at most: stripes of two blocks.
  const auto ranks = PartitionTokens(130 * 16 - 3, 2, v1::PARTITION_STRIPED, 16);

  ASSERT_TRUE(ranks.ok());
  ASSERT_EQ((*ranks)[0].size(), 33u);
  ASSERT_EQ((*ranks)[1].size(), 32u);
  for (int64_t stripe = 0; stripe < 65; ++stripe) {
    const TokenRange& range = (*ranks)[stripe % 2][stripe / 2];
    EXPECT_EQ(range.begin, stripe * 32);
    EXPECT_EQ(range.end, std::min<int64_t>((stripe + 1) * 32, 130 * 16 - 3));
  }
  // One block each where they are few, and one range on one rank.
  EXPECT_EQ((*PartitionTokens(128 * 16, 2, v1::PARTITION_STRIPED, 16))[1].size(), 64u);
  EXPECT_EQ((*PartitionTokens(5000, 1, v1::PARTITION_STRIPED, 16))[0].size(), 1u);
}

// The coordinator plans by a formula of its own.
TEST(PartitionTest, NoRankGetsMoreThanThePlannerCountsOn) {
  for (const auto kind : kKinds) {
    for (uint32_t world = 1; world <= 9; ++world) {
      for (int64_t tokens = 1; tokens <= 20'000; tokens = tokens * 9 / 8 + 1) {
        const auto ranks = PartitionTokens(tokens, static_cast<int>(world), kind, 16);
        ASSERT_TRUE(ranks.ok());
        const auto most =
            static_cast<int64_t>(MaxLocalTokens(static_cast<uint64_t>(tokens), world, kind, 16));
        for (const RankTokens& rank : *ranks) EXPECT_LE(NumTokens(rank), most) << tokens << " over " << world;
      }
    }
  }
}

TEST(PartitionTest, LeavesRanksEmptyWhenBlocksAreFew) {
  const auto ranks = PartitionTokens(20, 4, v1::PARTITION_CONTIGUOUS, 16);

  ASSERT_TRUE(ranks.ok());
  EXPECT_EQ(NumTokens((*ranks)[0]), 16);
  EXPECT_EQ(NumTokens((*ranks)[1]), 4);
  EXPECT_TRUE((*ranks)[2].empty());
  EXPECT_TRUE((*ranks)[3].empty());
}

TEST(PartitionTest, RefusesArgumentsOutOfRangeByNameAndValue) {
  const auto message = [](int64_t tokens, int world, int kind, int64_t block) {
    const auto ranks = PartitionTokens(tokens, world, static_cast<v1::Partition>(kind), block);
    EXPECT_EQ(ranks.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(ranks.status().message());
  };
  EXPECT_THAT(message(0, 1, 1, 16), HasSubstr("num_tokens 0"));
  EXPECT_THAT(message((int64_t{1} << 40) + 1, 1, 1, 16), HasSubstr("num_tokens"));
  EXPECT_THAT(message(1, 0, 1, 16), HasSubstr("world_size 0"));
  EXPECT_THAT(message(1, 4097, 1, 16), HasSubstr("world_size 4097"));
  EXPECT_THAT(message(1, 1, 1, 0), HasSubstr("block_tokens 0"));
  EXPECT_THAT(message(1, 1, 0, 16), HasSubstr("partition 0"));
  EXPECT_THAT(message(1, 1, 7, 16), HasSubstr("partition 7"));
}

// Follows every chunk around the ring by the schedule alone.
void ExpectScheduleDelivers(const std::vector<RankTokens>& keys, const std::vector<RankTokens>& queries) {
  const RingSchedule schedule(keys, queries);
  const int world = schedule.world_size();
  for (int rank = 0; rank < world; ++rank) {
    for (int step = 0; step < world; ++step) {
      const int owner = schedule.Owner(rank, step);
      bool in_hand = step == 0;
      if (step > 0) in_hand = schedule.Receives(rank, step - 1);
      EXPECT_TRUE(in_hand || !schedule.Needs(rank, owner)) << "rank " << rank << " lacks chunk " << owner;
      if (step + 1 < world) {
        EXPECT_EQ(schedule.Receives((rank + 1) % world, step), schedule.Sends(rank, step));
        EXPECT_TRUE(in_hand || !schedule.Sends(rank, step)) << "rank " << rank << " sends what it has not";
      }
    }
  }
}

TEST(RingScheduleTest, BringsEveryNeededChunkAndSendsOnlyWhatIsInHand) {
  for (const auto kind : kKinds) {
    for (int world = 1; world <= 6; ++world) {
      for (int64_t tokens = 1; tokens <= 200; tokens += 7) {
        const auto ranks = PartitionTokens(tokens, world, kind, 16);
        ASSERT_TRUE(ranks.ok());
        ExpectScheduleDelivers(*ranks, *ranks);
        for (int last = 0; last < world; ++last) {
          std::vector<RankTokens> queries(ranks->size());
          queries[last] = {{tokens - 1, tokens}};
          ExpectScheduleDelivers(*ranks, queries);
        }
      }
    }
  }
}

TEST(RingScheduleTest, SendsNothingBackwardsWhenRanksHoldContiguousTokens) {
  const auto ranks = PartitionTokens(64, 4, v1::PARTITION_CONTIGUOUS, 16);
  ASSERT_TRUE(ranks.ok());
  const RingSchedule schedule(*ranks, *ranks);

  int sends = 0;
  for (int rank = 0; rank < 4; ++rank) {
    for (int step = 0; step < 3; ++step) sends += schedule.Sends(rank, step) ? 1 : 0;
  }

  // Chunk r goes to the 3 - r ranks after it.
  EXPECT_EQ(sends, 3 + 2 + 1);
}

}  // namespace
}  // namespace headwater
