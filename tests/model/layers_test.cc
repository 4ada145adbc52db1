// The layer functions themselves: chunks, positions, threads, errors.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "model/model.h"
#include "model/rope.h"
#include "tests/model/dense_forward.h"

namespace headwater {
namespace {

using kernels::DType;
using ::testing::HasSubstr;
using testing::ReadGolden;
using testing::RelativeError;
using ::testing::StartsWith;

std::unique_ptr<Model> LoadGolden(const std::string& name, DType compute = DType::kF32) {
  auto model = Model::Load({ReadGolden(name).directory, compute, 0});
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

std::vector<float> RandomValues(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

struct Projected {
  std::vector<float> q, k, v;
};

absl::StatusOr<Projected> Project(const Model& model, int32_t layer, absl::Span<const float> hidden,
                                  int64_t begin) {
  const ModelConfig& config = model.config();
  const size_t count = hidden.size() / config.hidden_size;
  Projected out;
  out.q.resize(count * config.num_q_heads * config.head_dim);
  out.k.resize(count * config.num_kv_heads * config.head_dim);
  out.v.resize(out.k.size());
  const absl::Status status = model.BeforeAttention(layer, hidden.data(), static_cast<int64_t>(count), begin,
                                                    out.q.data(), out.k.data(), out.v.data());
  if (!status.ok()) return status;
  return out;
}

TEST(Embed, RefusesTokensOutsideTheVocabulary) {
  const auto model = LoadGolden("llama");
  std::vector<float> hidden(3 * 64);
  for (const int32_t bad :
       {256, -1, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    const absl::Status status = model->Embed(std::vector<int32_t>{0, 255, bad}, hidden.data());
    EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("token 2 has id ", bad)));
    EXPECT_THAT(std::string(status.message()), HasSubstr("256"));
  }
  EXPECT_TRUE(model->Embed(std::vector<int32_t>{0, 255, 7}, hidden.data()).ok());
  EXPECT_TRUE(model->Embed({}, nullptr).ok());
}

TEST(BeforeAttention, DoesNotDependOnHowTokensAreCut) {
  const auto model = LoadGolden("qwen3");
  const int64_t width = model->config().hidden_size;
  const int64_t count = model->chunk_tokens() + 37;
  const std::vector<float> hidden = RandomValues(count * width, 5);
  const auto whole = Project(*model, 1, hidden, 100);
  ASSERT_TRUE(whole.ok()) << whole.status();
  Projected joined;
  for (int64_t done = 0; done < count; done += 91) {
    const int64_t size = std::min<int64_t>(91, count - done);
    const auto part =
        Project(*model, 1, absl::MakeSpan(hidden).subspan(done * width, size * width), 100 + done);
    ASSERT_TRUE(part.ok()) << part.status();
    joined.q.insert(joined.q.end(), part->q.begin(), part->q.end());
    joined.k.insert(joined.k.end(), part->k.begin(), part->k.end());
    joined.v.insert(joined.v.end(), part->v.begin(), part->v.end());
  }
  EXPECT_LE(RelativeError(joined.q, whole->q), 1e-6);
  EXPECT_LE(RelativeError(joined.k, whole->k), 1e-6);
  EXPECT_LE(RelativeError(joined.v, whole->v), 1e-6);
}

// Rotating what position 0 gives (no rotation, but yarn's factor) by angles in long double must give what a
// far position gives.
TEST(BeforeAttention, RotatesExactlyAtFarPositions) {
  for (const char* name : {"llama", "qwen2", "qwen3_yarn"}) {
    const auto model = LoadGolden(name);
    const ModelConfig& config = model->config();
    const int half = config.head_dim / 2;
    const std::vector<float> hidden = RandomValues(config.hidden_size, 6);
    const auto origin = Project(*model, 0, hidden, 0);
    for (const int64_t position : {int64_t{1} << 20, int64_t{1} << 22, (int64_t{1} << 22) - 1}) {
      const auto far = Project(*model, 0, hidden, position);
      ASSERT_TRUE(origin.ok() && far.ok());
      std::vector<float> expected(far->k.size());
      for (size_t at = 0; at < expected.size(); at += config.head_dim) {
        for (int i = 0; i < half; ++i) {
          const long double angle = static_cast<long double>(config.rope.inverse[i]) * position;
          const long double a = origin->k[at + i];
          const long double b = origin->k[at + i + half];
          expected[at + i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
          expected[at + i + half] = static_cast<float>(b * std::cos(angle) + a * std::sin(angle));
        }
      }
      EXPECT_LE(RelativeError(far->k, expected), 1e-6) << name << " " << position;
      EXPECT_EQ(far->v, origin->v);
    }
  }
}

TEST(AfterAttention, DoesNotDependOnHowTokensAreCut) {
  const auto model = LoadGolden("llama");
  const int64_t width = model->config().hidden_size;
  const int64_t count = 2 * model->chunk_tokens() + 5;
  const std::vector<float> attention = RandomValues(count * width, 7);
  const std::vector<float> before = RandomValues(count * width, 8);
  std::vector<float> whole = before;
  ASSERT_TRUE(model->AfterAttention(2, attention.data(), count, whole.data()).ok());
  EXPECT_NE(whole, before);
  std::vector<float> parts = before;
  for (int64_t done = 0; done < count; done += 300) {
    ASSERT_TRUE(model
                    ->AfterAttention(2, attention.data() + done * width, std::min<int64_t>(300, count - done),
                                     parts.data() + done * width)
                    .ok());
  }
  EXPECT_LE(RelativeError(parts, whole), 1e-6);
}

TEST(AfterAttention, NamesLayerAndRowOfAValueThatIsNotFinite) {
  for (const DType compute : {DType::kF32, DType::kBF16}) {
    const auto model = LoadGolden("llama", compute);
    const int64_t width = model->config().hidden_size;
    const int64_t row = model->chunk_tokens() + 38;
    const int64_t count = row + 50;
    const std::vector<float> attention(count * width, 0.5f);
    std::vector<float> hidden(count * width, 0.5f);
    hidden[row * width + 3] = std::numeric_limits<float>::quiet_NaN();
    const absl::Status status = model->AfterAttention(1, attention.data(), count, hidden.data());
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(status.message()), StartsWith("non-finite"));
    EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("row ", row)));
  }
}

TEST(Logits, RefusesWhatIsNotFinite) {
  const auto model = LoadGolden("llama");
  std::vector<float> row(64, 1);
  std::vector<float> logits(256);
  EXPECT_TRUE(model->Logits(row.data(), logits.data()).ok());
  row[9] = std::numeric_limits<float>::infinity();
  const absl::Status status = model->Logits(row.data(), logits.data());
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), StartsWith("non-finite"));
}

TEST(Layers, RefuseLayersThatDoNotExistAndTakeNoTokens) {
  const auto model = LoadGolden("llama");
  std::vector<float> row(64, 1);
  std::vector<float> out(64);
  for (const int32_t layer : {-1, 3}) {
    EXPECT_EQ(model->AfterAttention(layer, row.data(), 1, row.data()).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(model->BeforeAttention(layer, row.data(), 1, 0, out.data(), out.data(), out.data()).code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(model->AfterAttention(0, nullptr, 0, nullptr).ok());
  EXPECT_TRUE(model->BeforeAttention(0, nullptr, 0, 0, nullptr, nullptr, nullptr).ok());
}

TEST(Layers, GiveTheSameFromSeveralThreads) {
  const auto model = LoadGolden("qwen2");
  const auto golden = ReadGolden("qwen2");
  const auto expected = testing::ForwardDense(*model, golden.tokens);
  ASSERT_TRUE(expected.ok());
  std::vector<double> errors(4, 1);
  std::vector<std::thread> threads;
  for (double& error : errors) {
    threads.emplace_back([&] {
      kernels::SetNumThreads(1);
      const auto result = testing::ForwardDense(*model, golden.tokens);
      if (result.ok()) error = RelativeError(result->logits, expected->logits);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double error : errors) EXPECT_LE(error, 1e-5);
}

}  // namespace
}  // namespace headwater
