// CudaCover() against the reference that sorts.
#include "kernels/cuda/policies/cover.h"

#include <cmath>
#include <limits>
#include <random>

#include "gtest/gtest.h"

#include "kernels/reference/policies/flex.h"
#include "tests/kernels/cuda/flex_problem.h"

namespace headwater::kernels {
namespace {

using reference::flex::Cover;

std::vector<int64_t> CoversOf(const std::vector<float>& x, int rows, double share, double most_sum) {
  DeviceArray<float> dx(x);
  DeviceArray<int64_t> counts(static_cast<size_t>(rows));
  CudaCoverArgs args{dx.data(), static_cast<int64_t>(x.size()) / rows, rows, share, most_sum, counts.data()};
  DeviceArray<unsigned char> workspace(CudaCoverWorkspaceBytes(args));
  const Status status = CudaCover(args, workspace.data(), workspace.size(), nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(counts.Intact() && workspace.Intact());
  return counts.Host();
}

// Rows that sum to about 1: even ones of one size, odd ones over all exponents.
std::vector<float> Rows(int rows, int length) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(0, 1);
  std::vector<float> x;
  for (int row = 0; row < rows; ++row) {
    std::vector<double> values(length);
    double sum = 0;
    for (double& value : values) {
      value = row % 2 == 0 ? uniform(random) : std::exp(-60.0 * uniform(random));
      sum += value;
    }
    for (const double value : values) x.push_back(static_cast<float>(value / sum));
  }
  return x;
}

TEST(CudaCoverGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  constexpr int kRows = 6;
  for (const int length : {1, 2, 31, 1000, 16384, 16385, 200'003}) {
    const std::vector<float> x = Rows(kRows, length);
    for (const double share : {0.0, 0.1, 0.5, 0.9, 0.999}) {
      const std::vector<int64_t> got = CoversOf(x, kRows, share, 1), again = CoversOf(x, kRows, share, 1);
      EXPECT_EQ(got, again);
      for (int row = 0; row < kRows; ++row) {
        const std::vector<double> entries = Doubles(x, row, length);
        // The reference's own sum is rounded, after every entry.
        EXPECT_GE(got[row], Cover(entries, share - 1e-12)) << length << " " << share << " row " << row;
        EXPECT_LE(got[row], Cover(entries, share + 1e-12)) << length << " " << share << " row " << row;
      }
    }
  }
}

TEST(CudaCoverGpuTest, EqualEntriesAndZeros) {
  HW_REQUIRE_SM90();
  std::vector<float> x(3 * 2048, 0.0f);
  for (int i = 0; i < 1024; ++i) x[2 * i] = 0x1p-10f;       // every other entry
  for (int i = 0; i < 4; ++i) x[2048 + 500 * i] = 0x1p-2f;  // the third row has none

  EXPECT_EQ(CoversOf(x, 3, 0.5, 1), (std::vector<int64_t>{513, 3, 2049}));
  EXPECT_EQ(CoversOf(x, 3, 0.75, 4), (std::vector<int64_t>{769, 4, 2049}));
  EXPECT_EQ(CoversOf(x, 3, 1, 1), (std::vector<int64_t>{2049, 2049, 2049}));
}

TEST(CudaCoverGpuTest, SumsOverOne) {
  HW_REQUIRE_SM90();
  std::vector<float> x = Rows(2, 5000);
  for (float& value : x) value *= 64;

  const std::vector<int64_t> got = CoversOf(x, 2, 57.6, 64);

  for (int row = 0; row < 2; ++row) {
    EXPECT_GE(got[row], Cover(Doubles(x, row, 5000), 57.6 - 1e-10));
    EXPECT_LE(got[row], Cover(Doubles(x, row, 5000), 57.6 + 1e-10));
  }
}

TEST(CudaCoverGpuTest, BadEntriesCountAsZeroOr128) {
  HW_REQUIRE_SM90();
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> x(3 * 1000, std::nanf(""));
  std::fill(x.begin() + 1000, x.begin() + 2000, inf);
  x[2000] = 0.5f;
  x[2001] = -inf;

  const std::vector<int64_t> got = CoversOf(x, 3, 0.9, 1);

  EXPECT_EQ(got[0], 1001);
  EXPECT_EQ(got[1], 1);
  EXPECT_EQ(got[2], 1001);
}

}  // namespace
}  // namespace headwater::kernels
