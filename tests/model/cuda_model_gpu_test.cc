// A whole model on the GPU against the same checkpoint on the CPU.
#include "model/cuda/cuda_model.h"

#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/cuda/attention.h"
#include "kernels/dtype.h"
#include "model/cuda/cuda_weights.h"
#include "model/cuda/device_buffer.h"
#include "model/model.h"
#include "model/presets.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/model/random_checkpoint.h"

namespace headwater {
namespace {

using kernels::DeviceArray;
using testing::CheckpointShape;
using testing::DenseResult;
using testing::RandomTokens;
using testing::RelativeError;
using testing::TempDir;

// Both compute in bf16, rounded at other places.
constexpr double kTolerance = 2e-2;
// A product of fp8 is 3.7 % off, so K and V of layer 0; these shapes, computed in double but for the rounding
// to e4m3, come to 5.2 % in those of layer 1 and in the logits. No bf16 model is so far off.
constexpr double kFp8Tolerance = 7e-2;
constexpr double kLeastFp8Error = 2.5e-2;

// The whole prompt with dense attention, the model's chunks one after the other.
class Forward {
 public:
  Forward(CudaModel* model, const std::vector<int32_t>& tokens)
      : model_(model),
        config_(model->config()),
        count_(static_cast<int64_t>(tokens.size())),
        tokens_(tokens),
        hidden_(tokens.size() * static_cast<size_t>(config_.hidden_size)),
        q_(tokens.size() * static_cast<size_t>(config_.num_q_heads * config_.head_dim)),
        k_(tokens.size() * static_cast<size_t>(config_.num_kv_heads * config_.head_dim)),
        v_(k_.size()),
        logits_(static_cast<size_t>(config_.vocab_size)),
        bad_row_(1) {}

  // hidden_change: written into the first value of the hidden state before layer 1.
  void Run(DenseResult* result, float hidden_change = 0) {
    ASSERT_TRUE(ForChunks([&](int64_t begin, int64_t count) {
                  return model_->Embed(tokens_.data() + begin, count, Hidden(begin), nullptr);
                }).ok());
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      if (layer == 1 && hidden_change != 0) {
        ASSERT_EQ(cudaMemcpy(hidden_.data(), &hidden_change, sizeof(float), cudaMemcpyHostToDevice),
                  cudaSuccess);
      }
      const absl::Status before = ForChunks([&](int64_t begin, int64_t count) {
        return model_->BeforeAttention(layer, Hidden(begin), count, begin, nullptr, Q(begin), K(begin),
                                       V(begin), {}, nullptr);
      });
      ASSERT_TRUE(before.ok()) << before;
      Attend();
      const absl::Status after = ForChunks([&](int64_t begin, int64_t count) {
        return model_->AfterAttention(layer, Q(begin), count, Hidden(begin), bad_row_.data(), nullptr);
      });
      ASSERT_TRUE(after.ok()) << after;
      result->k.push_back(kernels::ToFloat(k_.Host()));
      result->v.push_back(kernels::ToFloat(v_.Host()));
      bad_rows.push_back(bad_row_.Host()[0]);
    }
    ASSERT_TRUE(model_->Logits(hidden_.data(), {count_ - 1}, logits_.data(), nullptr).ok());
    result->logits = logits_.Host();
    EXPECT_TRUE(hidden_.Intact() && q_.Intact() && k_.Intact() && v_.Intact() && logits_.Intact());
  }

  std::vector<int64_t> bad_rows;  // after each layer, of the last chunk

 private:
  template <typename Work>
  absl::Status ForChunks(const Work& work) {
    for (int64_t begin = 0; begin < count_; begin += model_->chunk_tokens()) {
      absl::Status status = work(begin, std::min(model_->chunk_tokens(), count_ - begin));
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // In place: the output takes Q's memory.
  void Attend() {
    kernels::CudaAttentionArgs args;
    args.q = q_.data();
    args.k = k_.data();
    args.v = v_.data();
    args.out = q_.data();
    args.total_q = args.total_k = count_;
    args.num_q_heads = config_.num_q_heads;
    args.num_kv_heads = config_.num_kv_heads;
    args.head_dim = config_.head_dim;
    args.softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(config_.head_dim)));
    DeviceArray<unsigned char> workspace(kernels::CudaAttentionWorkspaceBytes(args));
    const kernels::Status status = kernels::CudaAttention(args, workspace.data(), workspace.size(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  float* Hidden(int64_t row) const { return hidden_.data() + row * config_.hidden_size; }
  uint16_t* Q(int64_t row) const { return q_.data() + row * config_.num_q_heads * config_.head_dim; }
  uint16_t* K(int64_t row) const { return k_.data() + row * config_.num_kv_heads * config_.head_dim; }
  uint16_t* V(int64_t row) const { return v_.data() + row * config_.num_kv_heads * config_.head_dim; }

  CudaModel* const model_;
  const ModelConfig& config_;
  const int64_t count_;
  const DeviceArray<int32_t> tokens_;
  const DeviceArray<float> hidden_;
  const DeviceArray<uint16_t> q_, k_, v_;
  const DeviceArray<float> logits_;
  const DeviceArray<int64_t> bad_row_;
};

struct Case {
  const char* name;
  CheckpointShape shape;
  int tokens;
  int64_t chunk_tokens;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

class CudaModelGpuTest : public ::testing::TestWithParam<Case> {};

// K, V of every layer and the logits of one checkpoint on the device, and as the CPU computes them in f32.
struct Comparison {
  DenseResult got, wanted;
  uint64_t weight_bytes = 0, planned_weight_bytes = 0;
};

void Compare(const Case& c, LinearType linear, Comparison* comparison) {
  const TempDir folder;
  testing::WriteRandomCheckpoint(folder.path(), c.shape, 3);
  const auto host = Model::Load({folder.path(), kernels::DType::kF32, 0});
  ASSERT_TRUE(host.ok()) << host.status();
  const auto device = CudaModel::Load({folder.path(), 0, 3, 0, c.chunk_tokens, linear});
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ((*device)->fingerprint(), (*host)->fingerprint());
  comparison->weight_bytes = (*device)->weight_bytes();
  comparison->planned_weight_bytes = CudaWeightBytes((*device)->config(), linear);
  const std::vector<int32_t> tokens = RandomTokens(c.tokens, c.shape.vocab_size);
  auto wanted = testing::ForwardDense(**host, tokens);
  ASSERT_TRUE(wanted.ok()) << wanted.status();
  comparison->wanted = *std::move(wanted);
  Forward forward(device->get(), tokens);
  forward.Run(&comparison->got);
  ASSERT_EQ(comparison->got.k.size(), comparison->wanted.k.size());
  EXPECT_THAT(forward.bad_rows, ::testing::Each(-1));
}

void ExpectWithin(const Comparison& c, double tolerance) {
  for (size_t layer = 0; layer < c.got.k.size(); ++layer) {
    EXPECT_LE(RelativeError(c.got.k[layer], c.wanted.k[layer]), tolerance) << "K of layer " << layer;
    EXPECT_LE(RelativeError(c.got.v[layer], c.wanted.v[layer]), tolerance) << "V of layer " << layer;
  }
  EXPECT_LE(RelativeError(c.got.logits, c.wanted.logits), tolerance);
}

TEST_P(CudaModelGpuTest, EqualsTheCpu) {
  HW_REQUIRE_SM90();
  Comparison comparison;
  ASSERT_NO_FATAL_FAILURE(Compare(GetParam(), LinearType::kBF16, &comparison));
  ExpectWithin(comparison, kTolerance);
  EXPECT_EQ(comparison.weight_bytes, comparison.planned_weight_bytes);
}

CheckpointShape Llama() { return {}; }
CheckpointShape Biased() {
  CheckpointShape shape;
  shape.biases = true;
  return shape;
}
CheckpointShape Qwen2() {
  CheckpointShape shape;
  shape.model_type = "qwen2";
  shape.num_q_heads = 7;
  shape.num_kv_heads = 1;
  shape.head_dim = 128;
  shape.tied_embeddings = true;
  shape.dtype = kernels::DType::kF32;
  return shape;
}
CheckpointShape Qwen3() {
  CheckpointShape shape;
  shape.model_type = "qwen3";
  shape.num_q_heads = 9;
  shape.num_kv_heads = 3;
  shape.dtype = kernels::DType::kF16;
  return shape;
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaModelGpuTest,
    ::testing::Values(Case{"llama", Llama(), 300, 8192}, Case{"one_token", Llama(), 1, 8192},
                      Case{"chunks", Llama(), 700, 128}, Case{"biases", Biased(), 300, 256},
                      Case{"qwen2", Qwen2(), 300, 256}, Case{"qwen3", Qwen3(), 300, 256}),
    [](const auto& test) { return test.param.name; });

class CudaModelFp8GpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaModelFp8GpuTest, IsAsFarFromTheCpuAsFp8Makes) {
  HW_REQUIRE_SM90();
  Comparison comparison;
  ASSERT_NO_FATAL_FAILURE(Compare(GetParam(), LinearType::kFP8, &comparison));
  ExpectWithin(comparison, kFp8Tolerance);
  for (size_t layer = 0; layer < comparison.got.v.size(); ++layer) {
    EXPECT_GE(RelativeError(comparison.got.v[layer], comparison.wanted.v[layer]), kLeastFp8Error)
        << "V of layer " << layer;
  }
  EXPECT_EQ(comparison.weight_bytes, comparison.planned_weight_bytes);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaModelFp8GpuTest,
                         ::testing::Values(Case{"llama", Llama(), 300, 8192},
                                           Case{"chunks", Llama(), 700, 128},
                                           Case{"biases", Biased(), 300, 256},
                                           Case{"qwen2", Qwen2(), 300, 256},
                                           Case{"qwen3", Qwen3(), 300, 256}),
                         [](const auto& test) { return test.param.name; });

// Equal runs give equal bits. Chunks ask cuBLASLt for other kernels, whose sums have another order.
TEST(CudaModelFp8GpuTest, EqualRunsAreEqualAndChunksChangeLittle) {
  HW_REQUIRE_SM90();
  const TempDir folder;
  testing::WriteRandomCheckpoint(folder.path(), {}, 3);
  const std::vector<int32_t> tokens = RandomTokens(300, 512);
  std::vector<DenseResult> results(3);
  for (size_t i = 0; i < results.size(); ++i) {
    const auto device = CudaModel::Load({folder.path(), 0, 3, 0, i == 2 ? 128 : 8192, LinearType::kFP8});
    ASSERT_TRUE(device.ok()) << device.status();
    Forward(device->get(), tokens).Run(&results[i]);
  }
  ASSERT_EQ(results[0].k.size(), 2u);
  EXPECT_EQ(results[0].k, results[1].k);
  EXPECT_EQ(results[0].logits, results[1].logits);
  EXPECT_LE(RelativeError(results[2].k[0], results[0].k[0]), 5e-3);
  EXPECT_LE(RelativeError(results[2].logits, results[0].logits), kTolerance);
}

TEST(CudaModelFp8GpuTest, NonFiniteRowsAreFound) {
  HW_REQUIRE_SM90();
  const TempDir folder;
  testing::WriteRandomCheckpoint(folder.path(), {}, 3);
  const auto device = CudaModel::Load({folder.path(), 0, 3, 0, 8192, LinearType::kFP8});
  ASSERT_TRUE(device.ok()) << device.status();
  DenseResult got;
  Forward forward(device->get(), RandomTokens(200, 512));
  forward.Run(&got, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(forward.bad_rows, ::testing::ElementsAre(-1, 0));
}

// Equal seeds give the same weights in both types, so that V of layer 0 differs by fp8's error alone.
TEST(CudaModelFp8GpuTest, RandomWeightsAreThoseOfBf16Quantized) {
  HW_REQUIRE_SM90();
  auto config = PresetConfig("smollm2-135m", 0);
  ASSERT_TRUE(config.ok()) << config.status();
  config->num_layers = 1;
  const std::vector<int32_t> tokens = RandomTokens(300, config->vocab_size);
  DenseResult results[2];
  uint64_t bytes[2] = {};
  for (const int i : {0, 1}) {
    CudaModelOptions options;
    options.linear = i == 1 ? LinearType::kFP8 : LinearType::kBF16;
    const auto device = CudaModel::Random(*config, options, 1);
    ASSERT_TRUE(device.ok()) << device.status();
    bytes[i] = (*device)->weight_bytes();
    EXPECT_EQ(bytes[i], CudaWeightBytes(*config, options.linear));
    Forward(device->get(), tokens).Run(&results[i]);
  }
  EXPECT_LT(bytes[1], bytes[0]);
  const double error = RelativeError(results[1].v[0], results[0].v[0]);
  EXPECT_GE(error, kLeastFp8Error);
  EXPECT_LE(error, 4.5e-2);
}

TEST(CudaModelGpuTest, EqualsTransformers) {
  HW_REQUIRE_SM90();
  for (const char* name : {"llama_d128", "qwen3_d64", "qwen3_yarn"}) {
    const testing::Golden golden = testing::ReadGolden(name);
    const auto device = CudaModel::Load({golden.directory});
    ASSERT_TRUE(device.ok()) << name << ": " << device.status();
    DenseResult got;
    Forward forward(device->get(), golden.tokens);
    forward.Run(&got);
    for (size_t layer = 0; layer < golden.expected.k.size(); ++layer) {
      EXPECT_LE(RelativeError(got.k[layer], golden.expected.k[layer]), kTolerance)
          << name << ", K of layer " << layer;
      EXPECT_LE(RelativeError(got.v[layer], golden.expected.v[layer]), kTolerance)
          << name << ", V of layer " << layer;
    }
    EXPECT_LE(RelativeError(got.logits, golden.expected.logits), kTolerance) << name;
  }
}

TEST(CudaModelGpuTest, NonFiniteRowsAreFound) {
  HW_REQUIRE_SM90();
  const TempDir folder;
  testing::WriteRandomCheckpoint(folder.path(), {}, 3);
  const auto device = CudaModel::Load({folder.path()});
  ASSERT_TRUE(device.ok()) << device.status();
  const std::vector<int32_t> tokens = RandomTokens(200, 512);
  DenseResult got;
  Forward forward(device->get(), tokens);
  forward.Run(&got, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(forward.bad_rows, ::testing::ElementsAre(-1, 0));
}

TEST(CudaModelGpuTest, RandomWeightsGiveFiniteValuesOfOrdinarySize) {
  HW_REQUIRE_SM90();
  auto config = PresetConfig("smollm2-135m", 0);
  ASSERT_TRUE(config.ok()) << config.status();
  config->num_layers = 3;
  const auto device = CudaModel::Random(*config, {}, 1);
  ASSERT_TRUE(device.ok()) << device.status();
  DenseResult got;
  Forward forward(device->get(), RandomTokens(300, config->vocab_size));
  forward.Run(&got);
  EXPECT_THAT(forward.bad_rows, ::testing::Each(-1));
  double squares = 0;
  for (const float value : got.k[2]) squares += static_cast<double>(value) * value;
  const double size = std::sqrt(squares / static_cast<double>(got.k[2].size()));
  EXPECT_GT(size, 0.3);
  EXPECT_LT(size, 3);
}

TEST(CudaModelGpuTest, BudgetIsHeld) {
  HW_REQUIRE_SM90();
  const TempDir folder;
  testing::WriteRandomCheckpoint(folder.path(), {}, 3);
  CudaModelOptions options;
  options.directory = folder.path();
  options.budget_bytes = 32 << 20;  // cuBLASLt's workspace alone
  const absl::Status status = CudaModel::Load(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("33554432"));
}

}  // namespace
}  // namespace headwater
