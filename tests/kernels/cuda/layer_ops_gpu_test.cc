// The layer operations on the GPU against double-precision references; CudaSplitQkv has a test of its own.
#include "kernels/cuda/layer_ops.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/reference/layer_ops.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"

namespace headwater::kernels {
namespace {

const float kNan = std::nanf("");
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Elements of bf16 or f32 in device memory, seen as f32 by the host.
class Tensor {
 public:
  Tensor(DType dtype, size_t count) : dtype_(dtype), bytes_(count * SizeOf(dtype)), count_(count) {}
  Tensor(DType dtype, const std::vector<float>& values) : Tensor(dtype, values.size()) {
    std::vector<unsigned char> bytes(bytes_.size());
    Convert(values.data(), DType::kF32, bytes.data(), dtype, values.size());
    EXPECT_EQ(cudaMemcpy(bytes_.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice), cudaSuccess);
  }
  unsigned char* data() const { return bytes_.data(); }
  unsigned char* At(int64_t element) const { return data() + element * static_cast<int64_t>(SizeOf(dtype_)); }
  bool Intact() const { return bytes_.Intact(); }
  std::vector<float> Host() const { return Host(0, count_); }
  std::vector<float> Host(int64_t begin, size_t count) const {
    std::vector<unsigned char> bytes(count * SizeOf(dtype_));
    EXPECT_EQ(cudaMemcpy(bytes.data(), At(begin), bytes.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    std::vector<float> values(count);
    Convert(bytes.data(), dtype_, values.data(), DType::kF32, count);
    return values;
  }
  void Put(int64_t begin, const std::vector<float>& values) const {
    const Tensor from(dtype_, values);
    EXPECT_EQ(cudaMemcpy(At(begin), from.data(), from.bytes_.size(), cudaMemcpyDeviceToDevice), cudaSuccess);
  }

 private:
  DType dtype_;
  DeviceArray<unsigned char> bytes_;
  size_t count_;
};

void ExpectOk(const Status& status) {
  EXPECT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

// --- embedding ---

TEST(CudaEmbedTokensGpuTest, CopiesRowsAndMarksUnknownIds) {
  HW_REQUIRE_SM90();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int width : {8, 96, 4096}) {
      const std::vector<float> values = RandomBf16(size_t{11} * width, 1);
      const Tensor table(DType::kBF16, values);
      const std::vector<int32_t> ids = {10, 0, -1, 3, 11, 3, INT32_MIN, INT32_MAX};
      const DeviceArray<int32_t> dids(ids);
      const Tensor out(dtype, ids.size() * width);
      ExpectOk(CudaEmbedTokens(
          {table.data(), dids.data(), out.data(), dtype, static_cast<int64_t>(ids.size()), 11, width},
          nullptr));
      const std::vector<float> got = out.Host();
      for (size_t i = 0; i < ids.size(); ++i) {
        for (int j = 0; j < width; ++j) {
          const float value = got[i * width + j];
          if (ids[i] < 0 || ids[i] > 10) {
            ASSERT_TRUE(std::isnan(value)) << i;
          } else {
            ASSERT_EQ(value, values[static_cast<size_t>(ids[i]) * width + j]) << i;
          }
        }
      }
      EXPECT_TRUE(out.Intact());
    }
  }
}

// --- RMS norm ---

struct NormCase {
  const char* name;
  int tokens, width;
};

std::ostream& operator<<(std::ostream& out, const NormCase& c) { return out << c.name; }

class CudaRmsNormGpuTest : public ::testing::TestWithParam<NormCase> {};

TEST_P(CudaRmsNormGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const auto [name, tokens, width] = GetParam();
  const size_t count = static_cast<size_t>(tokens) * width;
  const std::vector<float> more = RandomBf16(count, 2), weight = RandomBf16(width, 3);
  const Tensor delta(DType::kBF16, more);
  for (const DType x_dtype : {DType::kBF16, DType::kF32}) {
    for (const DType weight_dtype : {DType::kBF16, DType::kF32}) {
      for (const bool with_delta : {false, true}) {
        std::vector<float> hidden = RandomBf16(count, 1);
        const Tensor x(x_dtype, hidden), w(weight_dtype, weight), out(DType::kBF16, count);
        ExpectOk(CudaRmsNorm({x.data(), x_dtype, with_delta ? delta.data() : nullptr, w.data(), weight_dtype,
                              out.data(), 1e-5f, tokens, width},
                             nullptr));
        if (with_delta) {
          for (size_t i = 0; i < count; ++i) hidden[i] += more[i];
          if (x_dtype == DType::kBF16) hidden = ToFloat(ToBf16(hidden));
        }
        EXPECT_TRUE(SameBits(x.Host(), hidden));
        EXPECT_LE(WorstError(out.Host(),
                             reference::RmsNorm(hidden.data(), weight.data(), 1e-5f, tokens, width), 1e-3),
                  kBf16Error);
        EXPECT_TRUE(x.Intact() && out.Intact());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaRmsNormGpuTest,
                         ::testing::Values(NormCase{"one_chunk", 3, 8}, NormCase{"one_token", 1, 576},
                                           NormCase{"one_warp", 129, 256}, NormCase{"odd_warps", 127, 2056},
                                           NormCase{"llama", 300, 4096}, NormCase{"two_chunks", 5, 4104},
                                           NormCase{"four_chunks", 5, 8192}, NormCase{"widest", 5, 16384},
                                           NormCase{"many", 8191, 64}),
                         [](const auto& test) { return test.param.name; });

TEST(CudaRmsNormGpuTest, NanStaysInItsRow) {
  HW_REQUIRE_SM90();
  std::vector<float> hidden = RandomBf16(size_t{9} * 1024, 1);
  const std::vector<float> weight = RandomBf16(1024, 2);
  hidden[4 * 1024 + 1000] = kNan;
  hidden[6 * 1024] = kInfinity;
  const Tensor x(DType::kBF16, hidden), w(DType::kBF16, weight), out(DType::kBF16, hidden.size());
  CudaRmsNormArgs args{x.data(), DType::kBF16, nullptr, w.data(), DType::kBF16, out.data(), 1e-5f, 9, 1024};
  ExpectOk(CudaRmsNorm(args, nullptr));
  const std::vector<float> got = out.Host();
  EXPECT_TRUE(std::isnan(got[4 * 1024]) && std::isnan(got[4 * 1024 + 1023]) && std::isnan(got[6 * 1024]));
  for (size_t i = 0; i < got.size(); ++i) {
    if (i / 1024 != 4 && i / 1024 != 6) {
      ASSERT_TRUE(std::isfinite(got[i])) << i;
    }
  }
}

// --- rotary table ---

std::vector<double> Frequencies(int half) {
  std::vector<double> inverse;
  for (int i = 0; i < half; ++i) inverse.push_back(std::pow(500000.0, -static_cast<double>(i) / half));
  return inverse;
}

CudaRopeTableArgs RopeArgs(const std::vector<double>& inverse, int64_t tokens, const Tensor& cos,
                           const Tensor& sin) {
  CudaRopeTableArgs args;
  std::copy(inverse.begin(), inverse.end(), args.inverse);
  args.head_dim = static_cast<int32_t>(2 * inverse.size());
  args.num_tokens = tokens;
  args.cos = reinterpret_cast<float*>(cos.data());
  args.sin = reinterpret_cast<float*>(sin.data());
  return args;
}

// Half a unit of f32 below 1, and what double leaves.
constexpr double kAngleError = 0x1p-25 + 1e-9;

void ExpectTable(const std::vector<float>& got, const std::vector<double>& want, double factor) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(got[i]), want[i], kAngleError * factor) << i;
  }
}

TEST(CudaRopeTableGpuTest, IsExactToF32AtLargePositions) {
  HW_REQUIRE_SM90();
  for (const int half : {1, 32, 64, 128}) {
    const std::vector<double> inverse = Frequencies(half);
    const DeviceArray<double> device_inverse(inverse);
    for (const int64_t begin : {int64_t{0}, int64_t{1} << 20, (int64_t{1} << 31) - 70, -int64_t{100}}) {
      for (const int tokens : {1, 127, 129}) {
        const size_t count = static_cast<size_t>(tokens) * half;
        const Tensor cos(DType::kF32, count), sin(DType::kF32, count), again(DType::kF32, count);
        CudaRopeTableArgs args = RopeArgs(inverse, tokens, cos, sin);
        args.begin = begin;
        args.attention_factor = half == 64 ? 1 : 1.25;
        ExpectOk(CudaRopeTable(args, nullptr));
        std::vector<int64_t> positions;
        for (int i = 0; i < tokens; ++i) positions.push_back(begin + i);
        const auto want = reference::RopeTable(positions, inverse, args.attention_factor);
        // Values of up to 1.25 are rounded to units of twice the size.
        ExpectTable(cos.Host(), want.cos, args.attention_factor > 1 ? 2 : 1);
        ExpectTable(sin.Host(), want.sin, args.attention_factor > 1 ? 2 : 1);
        EXPECT_TRUE(cos.Intact() && sin.Intact());
        // Frequencies in device memory, positions from an array: the same bits.
        const DeviceArray<int64_t> device_positions(positions);
        std::fill(std::begin(args.inverse), std::end(args.inverse), 0.0);
        args.inverse_device = device_inverse.data();
        args.positions_i64 = device_positions.data();
        args.begin = 0;
        args.cos = reinterpret_cast<float*>(again.data());
        ExpectOk(CudaRopeTable(args, nullptr));
        EXPECT_TRUE(SameBits(again.Host(), cos.Host()));
      }
    }
  }
}

TEST(CudaRopeTableGpuTest, TakesPositionsInAnyOrder) {
  HW_REQUIRE_SM90();
  const std::vector<int32_t> positions = {7, 0, INT32_MAX, 0, INT32_MAX - 1, 1 << 30, 3, -5};
  const std::vector<double> inverse = Frequencies(64);
  const DeviceArray<int32_t> device_positions(positions);
  const Tensor cos(DType::kF32, positions.size() * 64), sin(DType::kF32, positions.size() * 64);
  CudaRopeTableArgs args = RopeArgs(inverse, static_cast<int64_t>(positions.size()), cos, sin);
  args.begin = 1000;
  args.positions_i32 = device_positions.data();
  ExpectOk(CudaRopeTable(args, nullptr));
  const auto want = reference::RopeTable({positions.begin(), positions.end()}, inverse, 1);
  ExpectTable(cos.Host(), want.cos, 1);
  ExpectTable(sin.Host(), want.sin, 1);
}

TEST(CudaRopeTableGpuTest, KeepsTheWholeProductAtHugePositions) {
  HW_REQUIRE_SM90();
  const int64_t position = (int64_t{1} << 53) - 1;
  const Tensor cos(DType::kF32, 1), sin(DType::kF32, 1);
  CudaRopeTableArgs args = RopeArgs({1.0 / 3.0}, 1, cos, sin);
  args.begin = position;
  ExpectOk(CudaRopeTable(args, nullptr));
  // position * inverse has 106 bits; the whole number and the rest are exact in long double.
  const __int128 numerator =
      static_cast<__int128>(position) * static_cast<__int128>(std::ldexp(1.0 / 3.0, 54));
  const auto whole = static_cast<long double>(static_cast<int64_t>(numerator >> 54));
  const auto part =
      static_cast<long double>(static_cast<int64_t>(numerator & ((int64_t{1} << 54) - 1))) / 0x1p54L;
  const long double want_cos = std::cos(whole) * std::cos(part) - std::sin(whole) * std::sin(part);
  const long double want_sin = std::sin(whole) * std::cos(part) + std::cos(whole) * std::sin(part);
  EXPECT_NEAR(static_cast<double>(cos.Host()[0]), static_cast<double>(want_cos), 1e-7);
  EXPECT_NEAR(static_cast<double>(sin.Host()[0]), static_cast<double>(want_sin), 1e-7);
}

// --- gated activation ---

TEST(CudaSiluMulGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  for (const auto& [tokens, width] : {std::pair(1, 8), std::pair(3, 1536), std::pair(129, 2048),
                                      std::pair(127, 8200), std::pair(5, 28672), std::pair(8191, 16)}) {
    std::vector<float> values = RandomBf16(size_t{2} * tokens * width, 1);
    for (size_t i = 0; i < values.size(); i += 3) values[i] *= 16;
    const std::vector<float> in = values;
    const Tensor gate_up(DType::kBF16, in), out(DType::kBF16, static_cast<size_t>(tokens) * width);
    ExpectOk(CudaSiluMul({gate_up.data(), out.data(), tokens, width}, nullptr));
    EXPECT_LE(WorstError(out.Host(), reference::SiluMul(in.data(), tokens, width), 1e-6), kBf16Error)
        << tokens << " x " << width;
    EXPECT_TRUE(out.Intact());
  }
}

TEST(CudaSiluMulGpuTest, SpecialValuesStayInTheirElement) {
  HW_REQUIRE_SM90();
  std::vector<float> in(64, 1);
  in[3] = kNan;
  in[5] = kInfinity;
  in[6] = -kInfinity;
  in[7] = -300;
  in[32 + 9] = kNan;
  in[32 + 10] = kInfinity;
  const Tensor gate_up(DType::kBF16, in), out(DType::kBF16, 32);
  ExpectOk(CudaSiluMul({gate_up.data(), out.data(), 1, 32}, nullptr));
  EXPECT_LE(WorstError(out.Host(), reference::SiluMul(in.data(), 1, 32), 1e-6), kBf16Error);
}

// --- finiteness ---

TEST(CudaFirstNonFiniteRowGpuTest, FindsTheFirst) {
  HW_REQUIRE_SM90();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const DeviceArray<int64_t> row(1);
    for (const int width : {8, 264, 4096}) {
      constexpr int kTokens = 301;
      const std::vector<float> clean = RandomBf16(size_t{kTokens} * width, 1);
      const auto find = [&](const std::vector<std::pair<int, float>>& bad) {
        std::vector<float> values = clean;
        for (const auto& [at, value] : bad) values[static_cast<size_t>(at) * width + at % width] = value;
        const Tensor x(dtype, values);
        ExpectOk(CudaFirstNonFiniteRow({x.data(), dtype, kTokens, width, row.data()}, nullptr));
        return row.Host()[0];
      };
      EXPECT_EQ(find({}), -1);
      EXPECT_EQ(find({{0, kNan}}), 0);
      EXPECT_EQ(find({{300, kInfinity}}), 300);
      EXPECT_EQ(find({{299, kNan}, {17, -kInfinity}, {18, kNan}}), 17);
      EXPECT_EQ(find({{300, kNan}, {1, -kNan}}), 1);
    }
    const Tensor all_nan(dtype, size_t{1000} * 4096);
    ExpectOk(CudaFirstNonFiniteRow({all_nan.data(), dtype, 1000, 4096, row.data()}, nullptr));
    EXPECT_EQ(row.Host()[0], 0);
    ExpectOk(CudaFirstNonFiniteRow({nullptr, dtype, 0, 4096, row.data()}, nullptr));
    EXPECT_EQ(row.Host()[0], -1);
    EXPECT_TRUE(row.Intact());
  }
}

// --- packing of K and V ---

struct Packed {
  std::vector<unsigned char> k, v;
  uint32_t problems;
};

// Both arrays through the same runs, into 100 tokens of room, 0xFF where nothing was written.
Packed Pack(const std::vector<float>& k, const std::vector<float>& v, int heads, int dim, DType wire,
            const std::vector<CudaTokenRun>& runs) {
  const size_t row = static_cast<size_t>(heads) * dim, bytes = 100 * row * SizeOf(wire);
  const Tensor dk(DType::kBF16, k), dv(DType::kBF16, v);
  const DeviceArray<unsigned char> to_k(bytes), to_v(bytes);
  const DeviceArray<CudaTokenRun> device_runs(runs);
  const DeviceArray<uint32_t> problems(std::vector<uint32_t>{0});
  CudaPackKvArgs args;
  args.k = dk.data();
  args.v = dv.data();
  args.num_tokens = static_cast<int64_t>(k.size() / row);
  args.num_kv_heads = heads;
  args.head_dim = dim;
  args.k_destination = to_k.data();
  args.v_destination = to_v.data();
  args.destination_bytes = static_cast<int64_t>(bytes);
  args.wire_dtype = wire;
  args.runs = device_runs.data();
  args.num_runs = static_cast<int32_t>(runs.size());
  args.problems = problems.data();
  ExpectOk(CudaPackKv(args, nullptr));
  EXPECT_TRUE(to_k.Intact() && to_v.Intact() && problems.Intact());
  return {to_k.Host(), to_v.Host(), problems.Host()[0]};
}

// What the wire holds of finite values in f16's range.
void Expect(const std::vector<unsigned char>& got, const std::vector<float>& from, size_t row, DType wire,
            const std::vector<CudaTokenRun>& runs) {
  std::vector<unsigned char> want(got.size(), 0xFF);
  for (const CudaTokenRun& run : runs) {
    Convert(from.data() + run.source_token * row, DType::kF32, want.data() + run.destination_offset, wire,
            run.count * row);
  }
  EXPECT_TRUE(got == want);
}

TEST(CudaPackKvGpuTest, GathersAndConverts) {
  HW_REQUIRE_SM90();
  for (const auto& [heads, dim] : {std::pair(8, 128), std::pair(3, 64), std::pair(1, 8)}) {
    const size_t row = static_cast<size_t>(heads) * dim;
    const std::vector<float> k = RandomBf16(300 * row, 1), v = RandomBf16(300 * row, 2);
    for (const DType wire : {DType::kBF16, DType::kF16, DType::kF32}) {
      const auto at = [&](int token) { return token * static_cast<int64_t>(row * SizeOf(wire)); };
      const std::vector<CudaTokenRun> runs = {
          {200, 50, at(0)}, {0, 1, at(60)}, {299, 1, at(50)}, {7, 0, at(99)}, {5, 39, at(61)}};
      const Packed got = Pack(k, v, heads, dim, wire, runs);
      Expect(got.k, k, row, wire, runs);
      Expect(got.v, v, row, wire, runs);
      EXPECT_EQ(got.problems, 0u);
    }
  }
}

TEST(CudaPackKvGpuTest, F16SaturatesAndKeepsWhatIsNotFinite) {
  HW_REQUIRE_SM90();
  const std::vector<float> v = RandomBf16(8, 1),
                           k = {1e5f, -1e30f, kInfinity, -kInfinity, kNan, 65280, 1, 6e-8f};
  for (const DType wire : {DType::kBF16, DType::kF16, DType::kF32}) {
    const Packed got = Pack(k, v, 1, 8, wire, {{0, 1, 0}});
    std::vector<float> values(8);
    Convert(got.k.data(), wire, values.data(), DType::kF32, 8);
    EXPECT_EQ(values[0], wire == DType::kF16 ? 65504 : ToFloat(ToBf16(k))[0]);
    EXPECT_EQ(values[1], wire == DType::kF16 ? -65504 : ToFloat(ToBf16(k))[1]);
    EXPECT_EQ(values[2], kInfinity);
    EXPECT_EQ(values[3], -kInfinity);
    EXPECT_TRUE(std::isnan(values[4]));
    EXPECT_EQ(values[5], 65280);
    EXPECT_NEAR(values[7], 6e-8, 3e-8);
    EXPECT_EQ(got.problems, CudaPackKvArgs::kNotRepresentable);
  }
  // Out of range alone counts in f16 only.
  EXPECT_EQ(Pack({1e5f, 1, 1, 1, 1, 1, 1, 1}, v, 1, 8, DType::kF16, {{0, 1, 0}}).problems, 1u);
  EXPECT_EQ(Pack({1e5f, 1, 1, 1, 1, 1, 1, 1}, v, 1, 8, DType::kBF16, {{0, 1, 0}}).problems, 0u);
}

TEST(CudaPackKvGpuTest, RunsThatLeaveTheArraysAreLeftOut) {
  HW_REQUIRE_SM90();
  const std::vector<float> k = RandomBf16(size_t{300} * 64, 1);
  const int64_t row = 64 * 2;
  const std::vector<CudaTokenRun> good = {{0, 2, 10 * row}}, bad[] = {{{-1, 2, 0}},
                                                                      {{299, 2, 0}},
                                                                      {{0, -1, 0}},
                                                                      {{0, 1, 8}},
                                                                      {{0, 1, -16}},
                                                                      {{0, 2, 99 * row}},
                                                                      {{0, 1, 99 * row + 16}},
                                                                      {{0, INT64_MAX, 0}},
                                                                      {{INT64_MAX, 1, 0}},
                                                                      {{0, 1, INT64_MAX - 15}}};
  for (const auto& run : bad) {
    const Packed got = Pack(k, k, 1, 64, DType::kBF16, {run[0], good[0]});
    Expect(got.k, k, 64, DType::kBF16, good);
    EXPECT_EQ(got.problems, CudaPackKvArgs::kBadRun);
  }
}

TEST(CudaPackKvGpuTest, WritesPinnedHostMemoryAndOneArrayAlone) {
  HW_REQUIRE_SM90();
  const std::vector<float> v = RandomBf16(size_t{64} * 1024, 1);
  const Tensor dv(DType::kBF16, v);
  const DeviceArray<CudaTokenRun> runs(std::vector<CudaTokenRun>{{0, 64, 0}});
  void* pinned = nullptr;
  ASSERT_EQ(cudaHostAlloc(&pinned, v.size() * 2, cudaHostAllocMapped), cudaSuccess);
  CudaPackKvArgs args;
  args.v = dv.data();
  args.num_tokens = 64;
  args.num_kv_heads = 8;
  args.head_dim = 128;
  args.v_destination = pinned;
  args.destination_bytes = static_cast<int64_t>(v.size()) * 2;
  args.runs = runs.data();
  args.num_runs = 1;
  ExpectOk(CudaPackKv(args, nullptr));
  EXPECT_EQ(std::memcmp(pinned, ToBf16(v).data(), v.size() * 2), 0);
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

// --- over 2^31 elements: the first and last rows, NaN patterns between them ---

TEST(CudaLayerOpsGpuTest, LargeSiluMul) {
  HW_REQUIRE_SM90();
  constexpr int64_t kTokens = 160'001, kWidth = 14336;
  static_assert(kTokens * kWidth > int64_t{1} << 31);
  const std::vector<float> rows = RandomBf16(size_t{2} * 2 * kWidth, 1);
  const Tensor gate_up(DType::kBF16, size_t{2} * kTokens * kWidth),
      out(DType::kBF16, size_t{kTokens} * kWidth);
  for (const int64_t token : {int64_t{0}, kTokens - 2}) gate_up.Put(token * 2 * kWidth, rows);
  ExpectOk(CudaSiluMul({gate_up.data(), out.data(), kTokens, kWidth}, nullptr));
  const std::vector<double> want = reference::SiluMul(rows.data(), 2, kWidth);
  for (const int64_t token : {int64_t{0}, kTokens - 2}) {
    EXPECT_LE(WorstError(out.Host(token * kWidth, 2 * kWidth), want, 1e-6), kBf16Error) << token;
  }
  EXPECT_TRUE(std::isnan(out.Host((kTokens - 3) * kWidth, 1)[0]));
  EXPECT_TRUE(out.Intact());
}

TEST(CudaLayerOpsGpuTest, LargeEmbeddingNormAndSearchForNan) {
  HW_REQUIRE_SM90();
  constexpr int64_t kTokens = 140'001, kWidth = 16384;
  static_assert(kTokens * kWidth > int64_t{1} << 31);
  const std::vector<float> row = RandomBf16(kWidth, 1), weight = RandomBf16(kWidth, 2);
  // The hidden states are zeros, but for the last row; they are a table, too.
  const Tensor x(DType::kBF16, size_t{kTokens} * kWidth), w(DType::kBF16, weight);
  ASSERT_EQ(cudaMemset(x.data(), 0, size_t{2} * kTokens * kWidth), cudaSuccess);
  x.Put((kTokens - 1) * kWidth, row);
  {
    const DeviceArray<int32_t> id(std::vector<int32_t>{static_cast<int32_t>(kTokens - 1)});
    const Tensor out(DType::kBF16, kWidth);
    ExpectOk(CudaEmbedTokens({x.data(), id.data(), out.data(), DType::kBF16, 1, kTokens, kWidth}, nullptr));
    EXPECT_TRUE(SameBits(out.Host(), row));
  }
  {
    const Tensor out(DType::kBF16, size_t{kTokens} * kWidth);
    ExpectOk(CudaRmsNorm(
        {x.data(), DType::kBF16, nullptr, w.data(), DType::kBF16, out.data(), 1e-5f, kTokens, kWidth},
        nullptr));
    EXPECT_LE(WorstError(out.Host((kTokens - 1) * kWidth, kWidth),
                         reference::RmsNorm(row.data(), weight.data(), 1e-5f, 1, kWidth), 1e-3),
              kBf16Error);
    EXPECT_EQ(out.Host((kTokens - 2) * kWidth, 1)[0], 0);
    EXPECT_TRUE(out.Intact());
  }
  const DeviceArray<int64_t> found(1);
  const CudaFirstNonFiniteRowArgs find{x.data(), DType::kBF16, kTokens, kWidth, found.data()};
  ExpectOk(CudaFirstNonFiniteRow(find, nullptr));
  EXPECT_EQ(found.Host()[0], -1);
  x.Put(kTokens * kWidth - 1, {kNan});
  ExpectOk(CudaFirstNonFiniteRow(find, nullptr));
  EXPECT_EQ(found.Host()[0], kTokens - 1);
}

}  // namespace
}  // namespace headwater::kernels
