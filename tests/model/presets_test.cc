#include "model/presets.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "model/weights.h"

namespace headwater {
namespace {

TEST(PresetConfig, EveryNameParses) {
  for (const std::string& name : PresetNames()) {
    const auto config = PresetConfig(name, 1 << 20);
    ASSERT_TRUE(config.ok()) << name << ": " << config.status();
    EXPECT_EQ(config->max_position, 1 << 20) << name;
  }
}

// Parameters that the models' cards state, in billions, times two bytes; the embedding table is not counted.
TEST(PresetConfig, HaveTheSizeOfTheModels) {
  struct Size {
    const char* name;
    double billions;
  };
  for (const Size& size : {Size{"llama-3-8b", 8.03}, Size{"qwen2.5-7b", 7.62}, Size{"qwen3-8b", 8.19},
                           Size{"qwen3-4b", 4.02}, Size{"smollm2-135m", 0.1345}}) {
    const auto config = PresetConfig(size.name, 0);
    ASSERT_TRUE(config.ok()) << config.status();
    double parameters = static_cast<double>(PlannedWeightBytes(*config, kernels::DType::kBF16)) / 2;
    if (!config->tied_embeddings) parameters += static_cast<double>(config->vocab_size) * config->hidden_size;
    EXPECT_NEAR(parameters / 1e9, size.billions, size.billions * 0.005) << size.name;
  }
}

TEST(PresetConfig, UnknownNamesListTheKnown) {
  const absl::Status status = PresetConfig("gpt-2", 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("llama-3-8b, llama-3.1-8b"));
}

}  // namespace
}  // namespace headwater
