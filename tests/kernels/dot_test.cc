#include "kernels/reference/dot.h"

#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace headwater::kernels::reference {
namespace {

TEST(DotTest, RowsEqualSingleProductsToTheBit) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const int64_t count : {1, 15, 16, 48, 64, 100, 128}) {
    std::vector<float> x(kDotRows * count), y(count);
    for (float& value : x) value = normal(random);
    for (float& value : y) value = 1000 * normal(random);
    double rows[kDotRows];
    DotRows(std::vector<double>(x.begin(), x.end()).data(), y.data(), count, rows);

    for (int64_t row = 0; row < kDotRows; ++row) {
      double wanted = 0;
      for (int64_t i = 0; i < count; ++i) {
        wanted += static_cast<double>(x[row * count + i]) * static_cast<double>(y[i]);
      }
      EXPECT_EQ(rows[row], Dot(x.data() + row * count, y.data(), count)) << count << " " << row;
      EXPECT_NEAR(rows[row], wanted, 1e-9) << count << " " << row;
    }
  }
}

}  // namespace
}  // namespace headwater::kernels::reference
