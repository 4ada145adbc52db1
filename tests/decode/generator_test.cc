#include "decode/generator.h"

#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/decode/decode_fixture.h"
#include "tests/model/dense_forward.h"

namespace headwater::testing {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 16 << 20;

// Generates `count` tokens of a session in one go.
std::vector<GeneratedToken> GenerateAll(Generator* generator, KvStore* store, const std::string& session_id,
                                        int count, GeneratedKvBudget* budget) {
  const auto kv = store->Acquire(session_id);
  EXPECT_TRUE(kv.ok()) << kv.status();
  const auto sequence = generator->Begin(**kv, budget);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  std::vector<GeneratedToken> tokens;
  for (int i = 0; i < count; ++i) {
    const auto token = generator->Next(**kv, sequence->get());
    EXPECT_TRUE(token.ok()) << token.status();
    if (!token.ok()) break;
    tokens.push_back(*token);
  }
  return tokens;
}

class GoldenGeneratorTest : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Models, GoldenGeneratorTest, ::testing::ValuesIn(GoldenNames()),
                         [](const auto& test) { return test.param; });

// Fewer than a tile, so that the generated tokens pass its edge.
constexpr size_t kPromptTokens = 120;
constexpr int kCount = 24;

std::vector<int32_t> GoldenPrompt(const Golden& golden) {
  return {golden.tokens.begin(), golden.tokens.begin() + kPromptTokens};
}

TEST_P(GoldenGeneratorTest, EqualsRecomputingTheTextForEveryTokenWhenTheCacheIsF32) {
  const Golden golden = ReadGolden(GetParam());
  const auto model = LoadModel(golden.directory);
  StoreWithCaches caches(*model);
  const PrefilledPrompt prompt = Prefill(*model, GoldenPrompt(golden));
  caches.Add("s", prompt, v1::KV_DTYPE_F32);
  GeneratedKvBudget budget(kBudget);
  const std::vector<ReferenceToken> expected = ContinueFromScratch(*model, prompt.tokens, kCount);

  const auto generator = Generator::Create(model.get());
  ASSERT_TRUE(generator.ok());
  const auto tokens = GenerateAll(generator->get(), caches.store(), "s", kCount, &budget);

  ASSERT_EQ(tokens.size(), expected.size());
  EXPECT_NEAR(tokens[0].top2_logit_gap, prompt.first_top2_gap, 1e-5);
  for (size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_EQ(tokens[i].token, expected[i].token) << "token " << i;
    EXPECT_EQ(tokens[i].position, static_cast<int64_t>(kPromptTokens + i));
    EXPECT_FALSE(tokens[i].is_last_position);
    EXPECT_NEAR(tokens[i].top2_logit_gap, expected[i].top2_logit_gap, 1e-3) << "token " << i;
  }
  EXPECT_EQ(budget.used_bytes(), 0u) << "the sequence is gone";
}

// A cache whose values the narrow type holds exactly must give the same in that type as in f32.
void ExpectReadsAsF32(const std::string& name, v1::KvDtype wire, kernels::DType dtype) {
  const Golden golden = ReadGolden(name);
  const auto model = LoadModel(golden.directory);
  StoreWithCaches caches(*model);
  PrefilledPrompt prompt = Prefill(*model, GoldenPrompt(golden));
  const PrefilledPrompt unrounded = prompt;
  for (auto* tensors : {&prompt.k, &prompt.v}) {
    for (auto& tensor : *tensors) {
      std::vector<uint16_t> narrow(tensor.size());
      kernels::Convert(tensor.data(), kernels::DType::kF32, narrow.data(), dtype, tensor.size());
      kernels::Convert(narrow.data(), dtype, tensor.data(), kernels::DType::kF32, tensor.size());
    }
  }
  ASSERT_NE(prompt.k, unrounded.k);
  caches.Add("wide", prompt, v1::KV_DTYPE_F32);
  caches.Add("narrow", prompt, wire);
  GeneratedKvBudget budget(kBudget);
  const auto generator = Generator::Create(model.get());
  ASSERT_TRUE(generator.ok());

  const auto wide = GenerateAll(generator->get(), caches.store(), "wide", kCount, &budget);
  const auto narrow = GenerateAll(generator->get(), caches.store(), "narrow", kCount, &budget);

  ASSERT_EQ(wide.size(), static_cast<size_t>(kCount));
  ASSERT_EQ(narrow.size(), wide.size());
  for (size_t i = 0; i < wide.size(); ++i) {
    EXPECT_EQ(narrow[i].token, wide[i].token) << "token " << i;
    EXPECT_NEAR(narrow[i].top2_logit_gap, wide[i].top2_logit_gap, 1e-3) << "token " << i;
  }
}

TEST_P(GoldenGeneratorTest, ReadsF16CachesInPlace) {
  ExpectReadsAsF32(GetParam(), v1::KV_DTYPE_F16, kernels::DType::kF16);
}
TEST_P(GoldenGeneratorTest, ReadsBf16CachesInPlace) {
  ExpectReadsAsF32(GetParam(), v1::KV_DTYPE_BF16, kernels::DType::kBF16);
}

// bf16 moves the logits of the qwens, which are large, by up to half a unit, and the llamas' by up to 0.07;
// wider choices must not change.
TEST_P(GoldenGeneratorTest, MakesTheSameClearChoicesInBf16) {
  const float margin = GetParam().starts_with("llama") ? 0.1f : 1.0f;
  const Golden golden = ReadGolden(GetParam());
  const auto exact = LoadModel(golden.directory);
  const auto model = LoadModel(golden.directory, kernels::DType::kBF16);
  StoreWithCaches caches(*model);
  const PrefilledPrompt prompt = Prefill(*exact, GoldenPrompt(golden));
  caches.Add("s", prompt, v1::KV_DTYPE_BF16);
  caches.Add("exact", prompt, v1::KV_DTYPE_F32);
  GeneratedKvBudget budget(kBudget);
  const auto exact_generator = Generator::Create(exact.get());
  const auto generator = Generator::Create(model.get());
  const auto expected = GenerateAll(exact_generator->get(), caches.store(), "exact", kCount, &budget);

  const auto tokens = GenerateAll(generator->get(), caches.store(), "s", kCount, &budget);

  ASSERT_EQ(tokens.size(), expected.size());
  size_t clear = 0;
  while (clear < expected.size() && (clear == 0 || expected[clear].top2_logit_gap >= margin)) {
    EXPECT_EQ(tokens[clear].token, expected[clear].token) << "token " << clear;
    EXPECT_NEAR(tokens[clear].top2_logit_gap, expected[clear].top2_logit_gap, margin) << "token " << clear;
    ++clear;
  }
  EXPECT_GE(clear, 2u) << "no choice is clear enough to compare";
}

TEST(GeneratorTest, EndsAtTheModelsLastPosition) {
  const TinyModelFiles files(/*max_position=*/40);
  const auto model = LoadModel(files.directory());
  StoreWithCaches caches(*model);
  const PrefilledPrompt prompt = Prefill(*model, RandomPrompt(*model, 37, 1));
  caches.Add("s", prompt, v1::KV_DTYPE_F32);
  GeneratedKvBudget budget(kBudget);
  const auto generator = Generator::Create(model.get());
  const auto kv = caches.store()->Acquire("s");
  const auto sequence = (*generator)->Begin(**kv, &budget);
  ASSERT_TRUE(sequence.ok());

  std::vector<bool> last;
  for (int i = 0; i < 3; ++i) {
    const auto token = (*generator)->Next(**kv, sequence->get());
    ASSERT_TRUE(token.ok()) << token.status();
    last.push_back(token->is_last_position);
  }
  const auto after = (*generator)->Next(**kv, sequence->get());

  EXPECT_THAT(last, ::testing::ElementsAre(false, false, true));
  EXPECT_EQ(after.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(after.status()), v1::ERROR_REASON_CONTEXT_FULL);
  EXPECT_THAT(std::string(after.status().message()), HasSubstr("40"));
}

TEST(GeneratorTest, APromptThatFillsTheContextStillGivesThePrefillsToken) {
  const TinyModelFiles files(/*max_position=*/16);
  const auto model = LoadModel(files.directory());
  StoreWithCaches caches(*model);
  const PrefilledPrompt prompt = Prefill(*model, RandomPrompt(*model, 16, 1));
  caches.Add("s", prompt, v1::KV_DTYPE_F32);
  GeneratedKvBudget budget(0);
  const auto generator = Generator::Create(model.get());
  const auto kv = caches.store()->Acquire("s");
  const auto sequence = (*generator)->Begin(**kv, &budget);
  ASSERT_TRUE(sequence.ok());

  const auto first = (*generator)->Next(**kv, sequence->get());

  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->token, prompt.first_token);
  EXPECT_TRUE(first->is_last_position);
  EXPECT_FALSE((*generator)->Next(**kv, sequence->get()).ok());
}

TEST(GeneratorTest, GoesOnAfterTheBudgetHadNoRoom) {
  const TinyModelFiles files;
  const auto model = LoadModel(files.directory());
  StoreWithCaches caches(*model);
  const PrefilledPrompt prompt = Prefill(*model, RandomPrompt(*model, 20, 1));
  caches.Add("s", prompt, v1::KV_DTYPE_F32);
  const std::vector<ReferenceToken> expected = ContinueFromScratch(*model, prompt.tokens, 4);
  GeneratedKvBudget budget(1 << 20);
  ASSERT_TRUE(budget.Take(1 << 20).ok());
  const auto generator = Generator::Create(model.get());
  const auto kv = caches.store()->Acquire("s");
  const auto sequence = (*generator)->Begin(**kv, &budget);
  ASSERT_TRUE(sequence.ok());
  ASSERT_TRUE((*generator)->Next(**kv, sequence->get()).ok()) << "the prefill's token needs no room";

  const auto refused = (*generator)->Next(**kv, sequence->get());
  budget.Return(1 << 20);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 3; ++i) {
    const auto token = (*generator)->Next(**kv, sequence->get());
    ASSERT_TRUE(token.ok()) << token.status();
    tokens.push_back(token->token);
  }

  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(refused.status()), v1::ERROR_REASON_KV_MEMORY_FULL);
  EXPECT_THAT(tokens, ::testing::ElementsAre(expected[1].token, expected[2].token, expected[3].token));
}

TEST(GeneratorTest, RefusesTheCacheOfAnotherModel) {
  const TinyModelFiles files;
  const TinyModelFiles other_files(/*max_position=*/2048, /*seed=*/2);
  const auto model = LoadModel(files.directory());
  const auto other = LoadModel(other_files.directory());
  ASSERT_NE(model->fingerprint(), other->fingerprint());
  StoreWithCaches caches(*model);
  caches.Add("s", Prefill(*model, RandomPrompt(*model, 20, 1)), v1::KV_DTYPE_F32);
  GeneratedKvBudget budget(kBudget);
  const auto generator = Generator::Create(other.get());
  const auto kv = caches.store()->Acquire("s");

  const auto sequence = (*generator)->Begin(**kv, &budget);

  EXPECT_EQ(sequence.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(sequence.status()), v1::ERROR_REASON_MODEL_MISMATCH);
}

TEST(GeneratorTest, RefusesAFirstTokenOutsideTheVocabulary) {
  const TinyModelFiles files;
  const auto model = LoadModel(files.directory());
  StoreWithCaches caches(*model);
  PrefilledPrompt prompt = Prefill(*model, RandomPrompt(*model, 20, 1));
  prompt.first_token = model->config().vocab_size;
  caches.Add("s", prompt, v1::KV_DTYPE_F32);
  GeneratedKvBudget budget(kBudget);
  const auto generator = Generator::Create(model.get());
  const auto kv = caches.store()->Acquire("s");
  ASSERT_TRUE(kv.ok()) << kv.status();

  const auto sequence = (*generator)->Begin(**kv, &budget);

  EXPECT_EQ(ReasonOf(sequence.status()), v1::ERROR_REASON_MODEL_MISMATCH) << sequence.status();
}

}  // namespace
}  // namespace headwater::testing
