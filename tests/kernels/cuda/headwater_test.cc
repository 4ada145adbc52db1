// Policy headwater without a GPU: room of its lists, and what it refuses.
#include "kernels/cuda/policies/headwater.h"

#include <limits>
#include <memory>
#include <vector>

#include "gtest/gtest.h"

namespace headwater::kernels {
namespace {

constexpr CudaPolicyShape kShape{4, 32, 8, 128, 0.1f};

TEST(Headwater, ListsHaveRoomForAllThatTilesSeeWhereThatIsLittle) {
  for (const int64_t tokens : {1, 127, 129, 8192, 100000, 250000}) {
    const int64_t tiles = (tokens + 31) / 32;
    int64_t visible = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) visible += (std::min((tile + 1) * 32, tokens) + 127) / 128;
    const int64_t room = HeadwaterBlocksPerTile({}, kShape, tokens);
    EXPECT_GE(room * tiles, visible) << tokens;
    EXPECT_LE(room * tiles * 8, int64_t{80} << 20) << tokens;
  }
}

TEST(Headwater, LongPromptsHaveRoomForTheWindowAndAsManyAgain) {
  const int64_t tokens = int64_t{4} << 20;
  HeadwaterParameters parameters;
  EXPECT_EQ(HeadwaterBlocksPerTile(parameters, kShape, tokens), 128 + parameters.window_blocks);
  parameters.windows.assign(4 * 8, 10);
  for (int head = 0; head < 8; ++head)
    parameters.windows[8 + head] = 100 + head;  // layer 1: 103.5 on average
  EXPECT_EQ(HeadwaterBlocksPerTile(parameters, kShape, tokens), 128 + 104);
}

TEST(Headwater, RangesOfAPromptTakeNoMoreThanItsWhole) {
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaHeadwater({}, kShape, &policy).ok());
  for (const int64_t tokens : {int64_t{40000}, int64_t{250000}, int64_t{1} << 20}) {
    const auto whole = static_cast<int64_t>(policy->MemoryBytes(tokens));
    const int64_t quarter = tokens / 512 * 128;
    const auto zigzag = static_cast<int64_t>(
        policy->RangesMemoryBytes(tokens, {{0, quarter}, {3 * quarter, tokens - 3 * quarter}}));
    const auto inner = static_cast<int64_t>(policy->RangesMemoryBytes(tokens, {{quarter, 2 * quarter}}));
    EXPECT_LT(zigzag, whole) << tokens;
    EXPECT_LT(inner, whole) << tokens;
    // Means and scratch are each rank's own; lists are not.
    EXPECT_GT(zigzag + inner, whole) << tokens;
  }
}

TEST(Headwater, RefusesRangesThatOverlapOrStartWithinABlock) {
  std::unique_ptr<CudaPolicy> policy;
  ASSERT_TRUE(MakeCudaHeadwater({}, kShape, &policy).ok());
  const auto said = [&](const std::vector<CudaQueryRange>& ranges) {
    const Status status = policy->BeginRanges(40000, ranges, nullptr, 0, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_NE(said({{64, 128}}).find("from 64 on"), std::string::npos);
  EXPECT_NE(said({{0, 256}, {128, 128}}).find("from 128 on, behind 256"), std::string::npos);
  EXPECT_NE(said({{0, 0}}).find("a range of 0 queries"), std::string::npos);
  EXPECT_NE(said({{39936, 128}}).find("128 from 39936 on; some of 40000"), std::string::npos);
  // What is right is asked for its memory next.
  EXPECT_NE(said({{0, 128}, {39936, 64}}).find("a policy's memory has 0 bytes"), std::string::npos);
}

TEST(Headwater, RefusesByNameAndValue) {
  const auto said = [](const HeadwaterParameters& parameters) {
    std::unique_ptr<CudaPolicy> policy;
    const Status status = MakeCudaHeadwater(parameters, kShape, &policy);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(policy, nullptr);
    return status.message();
  };
  HeadwaterParameters p;
  p.threshold = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NE(said(p).find("threshold is nan"), std::string::npos);
  p = {};
  p.window_blocks = 0;
  EXPECT_NE(said(p).find("window_blocks is 0"), std::string::npos);
  p = {};
  p.thresholds.assign(31, 0.1f);
  EXPECT_NE(said(p).find("31 thresholds or windows; 32"), std::string::npos);
  p = {};
  p.windows.assign(32, 4);
  p.windows[7] = 0;
  EXPECT_NE(said(p).find("window 7 is 0 blocks"), std::string::npos);
  p = {};
  p.thresholds.assign(32, 0.5f);
  p.thresholds[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(said(p).find("threshold 3 is nan"), std::string::npos);
  p = {};
  p.windows.assign(33, 4);
  EXPECT_NE(said(p).find("33 thresholds or windows; 32"), std::string::npos);
}

}  // namespace
}  // namespace headwater::kernels
