// What ranks on GPUs hand over, which needs no GPU.
#include "worker/cuda/cuda_group.h"

#include <cstring>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "worker/cuda/cuda_policy_group.h"
#include "worker/inprocess_collectives.h"

namespace headwater {

bool operator==(const TokenRange& a, const TokenRange& b) { return a.begin == b.begin && a.end == b.end; }

namespace {

std::vector<TokenRange> RangesOf(const std::vector<CudaChunk>& chunks) {
  std::vector<TokenRange> ranges;
  for (const CudaChunk& chunk : chunks) ranges.push_back(chunk.tokens);
  return ranges;
}

TEST(ChunksOfTest, CoverTheRangesInOrderAndCrossNone) {
  const std::vector<CudaChunk> chunks = ChunksOf({{0, 600}, {1024, 1025}, {2048, 2560}}, 256);
  EXPECT_EQ(
      RangesOf(chunks),
      (std::vector<TokenRange>{{0, 256}, {256, 512}, {512, 600}, {1024, 1025}, {2048, 2304}, {2304, 2560}}));
  int64_t row = 0;
  for (const CudaChunk& chunk : chunks) {
    EXPECT_EQ(chunk.row, row);
    row += chunk.tokens.size();
  }
  EXPECT_TRUE(ChunksOf({}, 256).empty());
}

// Keeps what it is given.
class FakeGroup final : public DeviceGroup {
 public:
  FakeGroup(int rank, int world_size) : rank_(rank), world_size_(world_size) {}
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  absl::Status Exchange(absl::Span<const DeviceParts>, absl::Span<const DeviceParts>, absl::string_view,
                        cudaStream_t) override {
    return absl::OkStatus();
  }
  absl::Status Check() override { return absl::OkStatus(); }
  void Abort() override {}

 private:
  const int rank_, world_size_;
};

TEST(CudaKvExchangeTest, CountsWhatComesFromOthers) {
  // The last rank has no tokens.
  const std::vector<RankTokens> partition = {{{0, 256}, {768, 1000}}, {{256, 768}}, {}};
  const std::vector<SharedArray> to_all = {{nullptr, 10, 1, false}, {nullptr, 7, 128, false}},
                                 causal = {{nullptr, 10}};
  std::vector<uint64_t> all, seen;
  for (int rank = 0; rank < 3; ++rank) {
    FakeGroup group(rank, 3);
    const CudaKvExchange exchange(partition, 256, v1::STRATEGY_ALLGATHER, &group, nullptr);
    all.push_back(exchange.ReceivedBytes(to_all));
    seen.push_back(exchange.ReceivedBytes(causal));
  }
  // 488 tokens in blocks 0, 1, 6 and 7 (of 104 tokens), and 512 in four blocks.
  const uint64_t first = 488 * 10 + 4 * 7, second = 512 * 10 + 4 * 7;
  EXPECT_THAT(all, ::testing::ElementsAre(second, first, first + second));
  // No query of rank 1 sees a token from 768 on.
  EXPECT_THAT(seen, ::testing::ElementsAre(512 * 10u, 256 * 10u, 0u));
}

TEST(CudaKvExchangeTest, ARingPassesOnWhatOthersNeed) {
  // Rank 2's chunk is for nobody; rank 1's goes on to it, and rank 0's to both.
  const std::vector<RankTokens> partition = {{{0, 256}}, {{256, 512}}, {{512, 700}}};
  const std::vector<SharedArray> causal = {{nullptr, 10}}, to_all = {{nullptr, 10, 1, false}};
  std::vector<uint64_t> ring, direct, statistics;
  for (int rank = 0; rank < 3; ++rank) {
    FakeGroup group(rank, 3);
    const CudaKvExchange exchange(partition, 256, v1::STRATEGY_RING, &group, nullptr);
    ring.push_back(exchange.ReceivedBytes(causal));
    statistics.push_back(exchange.ReceivedBytes(to_all));
    direct.push_back(
        CudaKvExchange(partition, 256, v1::STRATEGY_ALLGATHER, &group, nullptr).ReceivedBytes(causal));
  }
  EXPECT_THAT(direct, ::testing::ElementsAre(0u, 2560u, 5120u));
  EXPECT_THAT(ring, ::testing::ElementsAre(0u, 2560u, 5120u));
  EXPECT_THAT(statistics, ::testing::ElementsAre(2560u + 1880, 2560u + 1880, 5120u));
}

TEST(CudaPolicyGroupTest, CountsOverAllRanks) {
  constexpr int64_t kTokens = 5000;
  constexpr int32_t kPositions = 32;
  const std::vector<int64_t> positions = {0, 127, 128, 2000, 2047, 4000, 4999};
  const CudaPolicyGroup alone(kTokens);
  EXPECT_TRUE(alone.alone());
  for (const v1::Partition partition :
       {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG, v1::PARTITION_STRIPED}) {
    const auto dealt = PartitionTokens(kTokens, 3, partition, 256);
    ASSERT_TRUE(dealt.ok());
    const auto collectives = MakeInProcessGroup(3, absl::Seconds(5));
    JobControl control;
    std::vector<int> times(positions.size());
    for (int rank = 0; rank < 3; ++rank) {
      const CudaPolicyGroup group(*dealt, nullptr, collectives[static_cast<size_t>(rank)].get(), &control);
      EXPECT_EQ(group.rank(), rank);
      EXPECT_EQ(group.world_size(), 3);
      EXPECT_EQ(group.PossibleBlocks(kPositions), alone.PossibleBlocks(kPositions));
      for (const int64_t last : {0, 1, 256, 300, 5000, 9000}) {
        EXPECT_EQ(group.TilesOfLast(last, kPositions), alone.TilesOfLast(last, kPositions)) << last;
      }
      for (const kernels::CudaQueryRange& range : group.ranges()) {
        const CudaPolicyGroup::Run run = CudaPolicyGroup::RunOf(range, positions);
        for (int64_t i = run.first; i < run.first + run.count; ++i) {
          const int64_t position = positions[static_cast<size_t>(i)];
          EXPECT_TRUE(position >= range.first && position < range.first + range.count);
          ++times[static_cast<size_t>(i)];
        }
      }
    }
    EXPECT_THAT(times, ::testing::Each(1));
  }
  // By hand: 157 tiles of 32 positions, the last one of 8; four see each of 39 blocks first, one the 40th.
  EXPECT_EQ(alone.PossibleBlocks(kPositions), 4 * (39 * 40 / 2) + 40);
  EXPECT_EQ(alone.TilesOfLast(256, kPositions), 9);
}

TEST(CudaPolicyGroupTest, AllRanksGetTheLeast) {
  const std::vector<RankTokens> partition = {{{0, 128}}, {{128, 256}}, {}};
  const auto collectives = MakeInProcessGroup(3, absl::Seconds(5));
  const double given[] = {0.5, 0.25, 0.75};
  double got[3] = {};
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < 3; ++rank) {
    threads.emplace_back([&, rank] {
      JobControl control;
      const CudaPolicyGroup group(partition, nullptr, collectives[rank].get(), &control);
      got[rank] = given[rank];
      EXPECT_TRUE(group.Least(&got[rank]).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(got, ::testing::Each(0.25));
}

}  // namespace
}  // namespace headwater
