#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "kernels/ops/linear.h"
#include "model/model.h"
#include "tests/model/dense_forward.h"

namespace headwater {
namespace {

using testing::DenseResult;
using testing::ForwardDense;
using testing::Golden;
using testing::ReadGolden;
using testing::RelativeError;

class GoldenModel : public ::testing::TestWithParam<std::string> {};

void ExpectNear(const DenseResult& result, const DenseResult& expected, double most) {
  ASSERT_EQ(result.k.size(), expected.k.size());
  for (size_t layer = 0; layer < expected.k.size(); ++layer) {
    EXPECT_LE(RelativeError(result.k[layer], expected.k[layer]), most) << "k." << layer;
    EXPECT_LE(RelativeError(result.v[layer], expected.v[layer]), most) << "v." << layer;
  }
  EXPECT_LE(RelativeError(result.logits, expected.logits), most) << "logits";
}

TEST_P(GoldenModel, AgreesWithTransformersInF32) {
  const Golden golden = ReadGolden(GetParam());
  const auto model = Model::Load({golden.directory, kernels::DType::kF32, 0});
  ASSERT_TRUE(model.ok()) << model.status();
  const auto result = ForwardDense(**model, golden.tokens);
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectNear(*result, golden.expected, 1e-4);
  EXPECT_EQ(TopTokens(result->logits, 1)[0].token, TopTokens(golden.expected.logits, 1)[0].token);
}

TEST_P(GoldenModel, AgreesWithTransformersInBf16UpToItsRounding) {
  const Golden golden = ReadGolden(GetParam());
  const auto model = Model::Load({golden.directory, kernels::DType::kBF16, 0});
  ASSERT_TRUE(model.ok()) << model.status();
  const auto result = ForwardDense(**model, golden.tokens);
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectNear(*result, golden.expected, 3e-2);
}

TEST_P(GoldenModel, GivesTheSameBitsTwice) {
  const Golden golden = ReadGolden(GetParam());
  const auto model = Model::Load({golden.directory, kernels::DType::kF32, 0});
  ASSERT_TRUE(model.ok()) << model.status();
  const auto first = ForwardDense(**model, golden.tokens);
  const auto second = ForwardDense(**model, golden.tokens);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(first->k, second->k);
  EXPECT_EQ(first->v, second->v);
  EXPECT_EQ(first->logits, second->logits);
}

INSTANTIATE_TEST_SUITE_P(All, GoldenModel, ::testing::ValuesIn(testing::GoldenNames()),
                         [](const auto& row) { return row.param; });

}  // namespace
}  // namespace headwater
