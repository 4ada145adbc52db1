// What the layer operations refuse before they touch a device: runs without a GPU.
#include "kernels/cuda/layer_ops.h"

#include <cmath>
#include <functional>
#include <type_traits>

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

constexpr auto kUnknown = StatusCode::kUnimplemented;

float* const kFloats = static_cast<float*>(kAligned);

CudaEmbedTokensArgs ValidEmbed() {
  return {kAligned, static_cast<const int32_t*>(kAligned), kAligned, DType::kBF16, 100, 1000, 64};
}

CudaRmsNormArgs ValidNorm() {
  return {kAligned, DType::kF32, kAligned, kAligned, DType::kBF16, kAligned, 1e-5f, 100, 64};
}

CudaRopeTableArgs ValidRope() {
  CudaRopeTableArgs args;
  args.head_dim = 128;
  args.num_tokens = 100;
  args.cos = args.sin = kFloats;
  return args;
}

CudaSplitQkvArgs ValidSplit() {
  CudaSplitQkvArgs args;
  args.qkv = args.q = args.k = args.v = kAligned;
  args.num_tokens = 100;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.cos = args.sin = kFloats;
  return args;
}

CudaSiluMulArgs ValidSilu() { return {kAligned, kAligned, 100, 64}; }

CudaFirstNonFiniteRowArgs ValidFinite() {
  return {kAligned, DType::kF32, 100, 64, static_cast<int64_t*>(kAligned)};
}

CudaPackKvArgs ValidPack() {
  CudaPackKvArgs args;
  args.k = args.v = args.k_destination = args.v_destination = kAligned;
  args.num_tokens = 100;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.destination_bytes = 1 << 20;
  args.runs = static_cast<const CudaTokenRun*>(kAligned);
  args.num_runs = 3;
  return args;
}

template <typename Args>
Refusal Make(const char* name, Args valid, Status (*call)(const Args&, cudaStream_t),
             std::type_identity_t<std::function<void(Args*)>> change, const char* says,
             StatusCode code = StatusCode::kInvalidArgument) {
  change(&valid);
  return {name, [=] { return call(valid, nullptr); }, code, says};
}

#define EMBED ValidEmbed(), CudaEmbedTokens
#define NORM ValidNorm(), CudaRmsNorm
#define ROPE ValidRope(), CudaRopeTable
#define SPLIT ValidSplit(), CudaSplitQkv
#define SILU ValidSilu(), CudaSiluMul
#define FINITE ValidFinite(), CudaFirstNonFiniteRow
#define PACK ValidPack(), CudaPackKv

INSTANTIATE_TEST_SUITE_P(
    Embed, RefusalTest,
    ::testing::Values(
        Make(
            "table", EMBED, [](auto* a) { a->table = nullptr; }, "table is null"),
        Make(
            "ids", EMBED, [](auto* a) { a->ids = nullptr; }, "ids is null"),
        Make(
            "out", EMBED, [](auto* a) { a->out = kMisaligned; }, "out is not 16-byte"),
        Make(
            "vocab", EMBED, [](auto* a) { a->vocab = 0; }, "vocab is 0"),
        Make(
            "type", EMBED, [](auto* a) { a->out_dtype = DType::kF16; }, "out_dtype is f16", kUnknown),
        Make(
            "tokens", EMBED, [](auto* a) { a->num_tokens = int64_t{1} << 31; }, "num_tokens is 2147483648"),
        Make(
            "width", EMBED, [](auto* a) { a->width = 60; }, "width is 60; a multiple of 8")),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Norm, RefusalTest,
    ::testing::Values(
        Make(
            "x", NORM, [](auto* a) { a->x = nullptr; }, "x is null"),
        Make(
            "delta", NORM, [](auto* a) { a->delta = kMisaligned; }, "delta is not 16-byte"),
        Make(
            "weight", NORM, [](auto* a) { a->weight = nullptr; }, "weight is null"),
        Make(
            "out", NORM, [](auto* a) { a->out = nullptr; }, "out is null"),
        Make(
            "wide", NORM, [](auto* a) { a->width = 16392; }, "width is 16392; 1 to 16384"),
        Make(
            "narrow", NORM, [](auto* a) { a->width = 0; }, "width is 0"),
        Make(
            "type", NORM, [](auto* a) { a->x_dtype = DType::kF16; }, "x_dtype is f16", kUnknown),
        Make(
            "weight_type", NORM, [](auto* a) { a->weight_dtype = DType::kF16; }, "weight_dtype", kUnknown),
        Make(
            "scale", NORM, [](auto* a) { a->scale = static_cast<float*>(kMisaligned); },
            "scale is not 16-byte"),
        Make(
            "epsilon", NORM, [](auto* a) { a->epsilon = -1; }, "epsilon is -1"),
        Make(
            "nan_epsilon", NORM, [](auto* a) { a->epsilon = NAN; }, "epsilon is"),
        Make(
            "tokens", NORM, [](auto* a) { a->num_tokens = -1; }, "num_tokens is -1")),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Rope, RefusalTest,
    ::testing::Values(
        Make(
            "cos", ROPE, [](auto* a) { a->cos = nullptr; }, "cos is null"),
        Make(
            "odd", ROPE, [](auto* a) { a->head_dim = 65; }, "head_dim is 65; an even"),
        Make(
            "head_dim", ROPE, [](auto* a) { a->head_dim = 258; }, "head_dim is 258; 2 to 256"),
        Make(
            "begin", ROPE, [](auto* a) { a->begin = int64_t{1} << 53; }, "begin is 9007199254740992"),
        Make(
            "factor", ROPE, [](auto* a) { a->attention_factor = INFINITY; }, "attention_factor"),
        Make(
            "positions", ROPE,
            [](auto* a) {
              a->positions_i32 = static_cast<const int32_t*>(kAligned);
              a->positions_i64 = static_cast<const int64_t*>(kAligned);
            },
            "both given")),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Split, RefusalTest,
    ::testing::Values(
        Make(
            "qkv", SPLIT, [](auto* a) { a->qkv = nullptr; }, "qkv is null"),
        Make(
            "q", SPLIT, [](auto* a) { a->q = kMisaligned; }, "q is not 16-byte"),
        Make(
            "v", SPLIT, [](auto* a) { a->v = nullptr; }, "v is null"),
        Make(
            "sin", SPLIT, [](auto* a) { a->sin = nullptr; }, "sin is null"),
        Make(
            "q_norm", SPLIT, [](auto* a) { a->q_norm = kMisaligned; }, "q_norm is not 16-byte"),
        Make(
            "norm_type", SPLIT, [](auto* a) { a->norm_dtype = DType::kF16; }, "norm_dtype is f16", kUnknown),
        Make(
            "heads", SPLIT, [](auto* a) { a->num_q_heads = 0; }, "num_q_heads is 0"),
        Make(
            "head_dim", SPLIT, [](auto* a) { a->head_dim = 256; }, "head_dim is 256", kUnknown),
        Make(
            "tokens", SPLIT, [](auto* a) { a->num_tokens = int64_t{1} << 31; }, "num_tokens is 2147483648"),
        Make(
            "first_token", SPLIT, [](auto* a) { a->stats.k_mean = kFloats, a->first_token = 64; },
            "first_token is 64; a multiple of 128"),
        Make(
            "last_token", SPLIT, [](auto* a) { a->stats.v_mean = kFloats, a->first_token = INT32_MAX - 63; },
            "first_token is 2147483584; 0 to 2147483547"),
        Make(
            "one_bound", SPLIT, [](auto* a) { a->stats.k_max = kFloats; }, "one is null")),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Rest, RefusalTest,
    ::testing::Values(
        Make(
            "silu_in", SILU, [](auto* a) { a->gate_up = nullptr; }, "gate_up is null"),
        Make(
            "silu_out", SILU, [](auto* a) { a->out = kMisaligned; }, "out is not 16-byte"),
        Make(
            "silu_width", SILU, [](auto* a) { a->width = 4; }, "width is 4"),
        Make(
            "silu_scale", SILU, [](auto* a) { a->scale = static_cast<float*>(kMisaligned); },
            "scale is not 16-byte"),
        Make(
            "silu_wide", SILU, [](auto* a) { a->scale = kFloats, a->width = 32776; },
            "width is 32776; 1 to 32768"),
        Make(
            "silu_tokens", SILU, [](auto* a) { a->num_tokens = int64_t{1} << 31; }, "2147483648"),
        Make(
            "finite_x", FINITE, [](auto* a) { a->x = nullptr; }, "x is null"),
        Make(
            "finite_row", FINITE, [](auto* a) { a->row = nullptr; }, "row is null"),
        Make(
            "finite_type", FINITE, [](auto* a) { a->dtype = DType::kF16; }, "dtype is f16", kUnknown),
        Make(
            "pack_destination", PACK, [](auto* a) { a->k_destination = nullptr; }, "without its destination"),
        Make(
            "pack_source", PACK, [](auto* a) { a->v = nullptr; }, "without its source"),
        Make(
            "pack_k", PACK, [](auto* a) { a->k = kMisaligned; }, "k is not 16-byte"),
        Make(
            "pack_runs", PACK, [](auto* a) { a->runs = nullptr; }, "runs is null"),
        Make(
            "pack_width", PACK, [](auto* a) { a->num_kv_heads = 1, a->head_dim = 12; }, "is 12; a multiple"),
        Make(
            "pack_count", PACK, [](auto* a) { a->num_runs = -1; }, "num_runs is -1"),
        Make(
            "pack_bytes", PACK, [](auto* a) { a->destination_bytes = -1; }, "destination_bytes is -1")),
    [](const auto& test) { return test.param.name; });

template <typename Args>
void ExpectEmptyIsFine(Args args, Status (*call)(const Args&, cudaStream_t)) {
  args.num_tokens = 0;
  const Status status = call(args, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
}

// Empty tensors have null addresses.
TEST(CudaLayerOpsTest, NoTokensAreFine) {
  CudaRmsNormArgs norm = ValidNorm();
  norm.x = norm.out = nullptr;
  ExpectEmptyIsFine(norm, CudaRmsNorm);
  ExpectEmptyIsFine(ValidEmbed(), CudaEmbedTokens);
  ExpectEmptyIsFine(ValidRope(), CudaRopeTable);
  ExpectEmptyIsFine(ValidSilu(), CudaSiluMul);
  CudaSplitQkvArgs split = ValidSplit();
  split.qkv = split.q = split.k = split.v = nullptr;
  ExpectEmptyIsFine(split, CudaSplitQkv);
  CudaPackKvArgs pack = ValidPack();
  pack.num_runs = 0;
  EXPECT_TRUE(CudaPackKv(pack, nullptr).ok());
  EXPECT_TRUE(CudaStoreToHost(nullptr, nullptr, 0, nullptr).ok());
}

TEST(CudaStoreToHostTest, NamesWhatIsWrong) {
  EXPECT_EQ(CudaStoreToHost(kAligned, kAligned, 6, nullptr).message(), "bytes is 6, no multiple of 4");
  EXPECT_EQ(CudaStoreToHost(nullptr, kAligned, 4, nullptr).message(), "from is null or not 4-byte aligned");
  EXPECT_EQ(CudaStoreToHost(kAligned, static_cast<char*>(kAligned) + 2, 4, nullptr).message(),
            "to is null or not 4-byte aligned");
  EXPECT_FALSE(CudaStoreToHost(kAligned, kAligned, -4, nullptr).ok());
}

}  // namespace
}  // namespace headwater::kernels
