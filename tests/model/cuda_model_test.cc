// What a GPU model refuses before it looks for a GPU.
#include "model/cuda/cuda_model.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "model/cuda/cuda_weights.h"
#include "model/presets.h"
#include "model/weights.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/model/random_checkpoint.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using ::testing::HasSubstr;
using testing::TempDir;

absl::Status LoadStatus(const CudaModelOptions& options) { return CudaModel::Load(options).status(); }

TEST(CudaModelLoad, NamesWhatTheKernelsDoNotTake) {
  const TempDir folder;
  struct Change {
    int CheckpointShape::*field;
    int value;
    const char* says;
  };
  for (const Change& change : {Change{&CheckpointShape::head_dim, 32, "head_dim is 32"},
                               Change{&CheckpointShape::num_q_heads, 18, "query heads per KV head is 9"},
                               Change{&CheckpointShape::hidden_size, 100, "hidden_size is 100"},
                               Change{&CheckpointShape::intermediate_size, 100, "intermediate_size is 100"},
                               Change{&CheckpointShape::vocab_size, 500, "vocab_size is 500"}}) {
    CheckpointShape shape;
    shape.*change.field = change.value;
    testing::WriteRandomCheckpoint(folder.path(), shape, 1);
    const absl::Status status = LoadStatus({folder.path()});
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(change.says));
  }
}

TEST(CudaModelLoad, NamesWhatFp8LayersDoNotTake) {
  const TempDir folder;
  CheckpointShape shape;
  CudaModelOptions options;
  options.directory = folder.path();
  options.linear = LinearType::kFP8;
  const auto expect = [&](const char* says) {
    testing::WriteRandomCheckpoint(folder.path(), shape, 1);
    const absl::Status status = LoadStatus(options);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  };
  shape.hidden_size = 264;
  expect("hidden_size is 264; fp8 linear layers take multiples of 16 up to 32768");
  shape.hidden_size = 64;
  shape.intermediate_size = 32784;
  expect("intermediate_size is 32784");
}

TEST(CudaModelLoad, RefusesChunksThatAreNoMultipleOfABlock) {
  const absl::Status status = LoadStatus({"/nowhere", 0, 4, 0, 100});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("chunk_tokens is 100"));
}

TEST(CudaModelLoad, MissingFolder) {
  EXPECT_EQ(LoadStatus({"/nowhere"}).code(), absl::StatusCode::kNotFound);
}

// As the host's plan, which does not count the embedding table: it stays mapped.
TEST(CudaWeightBytes, FollowFromTheConfig) {
  for (const bool tied : {false, true}) {
    const TempDir folder;
    CheckpointShape shape;
    shape.tied_embeddings = tied;
    shape.biases = true;
    testing::WriteRandomCheckpoint(folder.path(), shape, 1);
    const auto config = ReadModelConfig(folder.path());
    ASSERT_TRUE(config.ok()) << config.status();
    const uint64_t embedding = tied ? 0 : 2ull * shape.vocab_size * shape.hidden_size;
    const uint64_t host = PlannedWeightBytes(*config, kernels::DType::kBF16) + embedding;
    // Biases of bf16 results are bf16 here and f32 there; parts are aligned to 256 bytes.
    EXPECT_NEAR(static_cast<double>(CudaWeightBytes(*config, LinearType::kBF16)), static_cast<double>(host),
                16'384);
  }
}

// A byte less for every weight of a layer, but for a scale a row; embedding and LM head stay.
TEST(CudaWeightBytes, Fp8HalvesTheLayers) {
  const auto config = PresetConfig("llama-3-8b", 0);
  ASSERT_TRUE(config.ok()) << config.status();
  const double bf16 = static_cast<double>(CudaWeightBytes(*config, LinearType::kBF16)),
               fp8 = static_cast<double>(CudaWeightBytes(*config, LinearType::kFP8));

  const double weights = 32.0 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096.0 * 14336),
               rows = 32 * (6144 + 4096 + 28672 + 4096);
  EXPECT_EQ(bf16 - fp8, weights - 4 * rows);
}

}  // namespace
}  // namespace headwater
