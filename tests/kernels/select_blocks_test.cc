// The reference of the pattern search on scores that can be read off.
#include "kernels/reference/select_blocks.h"

#include <cmath>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kKeys = 10 * 128;
constexpr double kNear = 1e-6;

// Ten blocks of one key value each and the last 128 positions as queries: all rows see nine blocks whole.
// Head h has all queries `signs[h]`, so a block's score in nats is signs[h] * value.
struct Problem {
  explicit Problem(const std::vector<float>& values, const std::vector<float>& signs = {1}) {
    for (const float value : values) k.insert(k.end(), 128, value);
    for (int token = 0; token < 128; ++token) q.insert(q.end(), signs.begin(), signs.end());
    args.q = q.data();
    args.k = k.data();
    args.total_q = 128;
    args.total_k = kKeys;
    args.num_q_heads = static_cast<int32_t>(signs.size());
    args.num_kv_heads = 1;
    args.head_dim = 1;
    args.softmax_scale = 1;
    args.query_position = kKeys - 128;
    args.sink_blocks = 1;
    args.window_blocks = 2;
  }

  // Of the last tile.
  SelectedBlocks Select(double density, double near = kNear) {
    args.forced_density = density;
    return SelectBlocks(args, near).back();
  }

  std::vector<float> q, k;
  SelectBlocksArgs args;
};

const std::vector<float> kValues = {5, 1, 8, 3, 9, 2, 7, 4, 6, 0};

TEST(SelectBlocksTest, ThresholdListsWhatIsWorthAShareOfTheBest) {
  Problem problem(kValues);
  problem.args.threshold = std::exp(-1.5);

  EXPECT_THAT(problem.Select(0).blocks, ElementsAre(0, 2, 4, 8, 9));
}

TEST(SelectBlocksTest, ForcedDensityListsTheBestAndCountsSinksAndWindow) {
  EXPECT_THAT(Problem(kValues).Select(0.5).blocks, ElementsAre(0, 2, 4, 8, 9));
  EXPECT_THAT(Problem(kValues).Select(0.6).blocks, ElementsAre(0, 2, 4, 6, 8, 9));
}

TEST(SelectBlocksTest, ForcedDensityRoundsUp) {
  EXPECT_THAT(Problem(kValues).Select(0.41).blocks, ElementsAre(0, 2, 4, 8, 9));
}

TEST(SelectBlocksTest, ForcedDensityBelowSinksAndWindowListsThoseAlone) {
  const SelectedBlocks selected = Problem(kValues).Select(0.2);

  EXPECT_THAT(selected.blocks, ElementsAre(0, 8, 9));
  EXPECT_THAT(selected.undecided, IsEmpty());
}

TEST(SelectBlocksTest, ForcedDensityOneListsEverything) {
  EXPECT_EQ(Problem(kValues).Select(1).blocks.size(), 10u);
}

TEST(SelectBlocksTest, OfEqualScoresTheHigherNumbersAreListed) {
  EXPECT_THAT(Problem(std::vector<float>(10, 3.0f)).Select(0.5).blocks, ElementsAre(0, 6, 7, 8, 9));
}

// Block 4 is the first head's best, block 1 the second's.
TEST(SelectBlocksTest, EachHeadHasASay) {
  EXPECT_THAT(Problem(kValues, {1, -1}).Select(0.5).blocks, ElementsAre(0, 1, 4, 8, 9));
}

TEST(SelectBlocksTest, UndecidedAreThoseNearTheLastListed) {
  EXPECT_THAT(Problem(kValues).Select(0.5).undecided, ElementsAre(2));
  EXPECT_THAT(Problem(kValues).Select(0.5, 1.1 / std::log(2.0)).undecided, ElementsAre(2, 4, 6));
}

TEST(SelectBlocksTest, LastTilesAreDense) {
  Problem problem(kValues);
  problem.args.dense_last_tokens = 1;

  EXPECT_TRUE(problem.Select(0.5).dense);
}

}  // namespace
}  // namespace headwater::kernels::reference
