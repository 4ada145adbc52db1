// Partial results merged on the GPU: against attention over all keys at once, and at the edges.
#include "kernels/cuda/merge.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/attention_problem.h"

namespace headwater::kernels {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

class CudaMergeGpuTest : public ::testing::TestWithParam<int> {};

// Keys [0, 700) and [700, 1000) of 300 queries, one result in the other's place.
TEST_P(CudaMergeGpuTest, TwoPartsEqualTheWhole) {
  HW_REQUIRE_SM90();
  constexpr int kCut = 700;
  const Problem problem({"", 6, 2, GetParam(), 300, 1000, kAligned, Lists::kNone, true}, 5);
  const int row = 2 * problem.c.head_dim;  // of K and V
  DeviceProblem near(problem), far(problem);
  far.args.total_k = kCut;
  far.args.query_position = problem.position;
  near.args.k = near.k.data() + kCut * row;
  near.args.v = near.v.data() + kCut * row;
  near.args.total_k = 1000 - kCut;
  near.args.query_position = problem.position - kCut;
  ASSERT_TRUE(near.Run().ok() && far.Run().ok());
  DeviceArray<uint16_t> rounded(problem.q.size());

  const Status status =
      CudaMergePartials({far.out_f32.data(), far.lse.data(), near.out_f32.data(), near.lse.data(),
                         far.out_f32.data(), rounded.data(), far.lse.data(), 300 * 6, problem.c.head_dim},
                        nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<double> wanted, wanted_lse;
  problem.Reference(&wanted, &wanted_lse);
  EXPECT_LE(RelativeError(far.Out(), wanted), kRelativeError);
  EXPECT_LE(RelativeError(ToFloat(rounded.Host()), wanted), kRelativeError);
  ExpectLse(far.lse.Host(), wanted_lse);
  EXPECT_TRUE(far.Intact() && near.Intact() && rounded.Intact());
}

INSTANTIATE_TEST_SUITE_P(HeadDims, CudaMergeGpuTest, ::testing::Values(64, 128));

TEST(CudaMergeGpuTest, RowsWithoutKeysAndNan) {
  HW_REQUIRE_SM90();
  constexpr int kRows = 5, kDim = 64;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Both; only a (b holds NaN, which does not count); only b; neither; a NaN.
  const std::vector<float> a_lse = {0, 1, kNothing, kNothing, nan}, b_lse = {0, kNothing, 2, kNothing, 0};
  std::vector<float> a, b;
  for (int row = 0; row < kRows; ++row) {
    a.insert(a.end(), kDim, row == 2 || row == 3 ? nan : 1.0f);
    b.insert(b.end(), kDim, row == 1 || row == 3 ? nan : 3.0f);
  }
  DeviceArray<float> da(a), db(b), dla(a_lse), dlb(b_lse), out(a.size()), lse(kRows);

  ASSERT_TRUE(CudaMergePartials({da.data(), dla.data(), db.data(), dlb.data(), out.data(), nullptr,
                                 lse.data(), kRows, kDim},
                                nullptr)
                  .ok());

  const std::vector<float> got = out.Host(), got_lse = lse.Host();
  EXPECT_FLOAT_EQ(got[0], 2);
  EXPECT_FLOAT_EQ(got_lse[0], std::log(2.0f));
  EXPECT_FLOAT_EQ(got[kDim], 1);
  EXPECT_FLOAT_EQ(got_lse[1], 1);
  EXPECT_FLOAT_EQ(got[2 * kDim], 3);
  EXPECT_FLOAT_EQ(got_lse[2], 2);
  EXPECT_EQ(got[3 * kDim], 0);
  EXPECT_EQ(got_lse[3], kNothing);
  EXPECT_TRUE(std::isnan(got[4 * kDim]) && std::isnan(got_lse[4]));
  EXPECT_TRUE(out.Intact() && lse.Intact());
}

}  // namespace
}  // namespace headwater::kernels
