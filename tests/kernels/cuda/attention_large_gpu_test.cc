// Attention on arrays of more than 2^31 elements: offsets that need 64 bits. Answers are checked for rows at
// the ends.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/attention.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {
namespace {

constexpr int kDim = 128;
constexpr double kRelativeError = 4e-3;

// bf16 elements on the device: one random stretch over and over.
class Repeated {
 public:
  Repeated(int64_t count, uint32_t seed) : pattern_(RandomBf16(kPeriod, seed)), array_(count) {
    const std::vector<uint16_t> bits = ToBf16(pattern_);
    for (int64_t at = 0; at < count; at += kPeriod) {
      const size_t bytes = static_cast<size_t>(std::min<int64_t>(kPeriod, count - at)) * 2;
      EXPECT_EQ(cudaMemcpy(array_.data() + at, bits.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
    }
  }
  float At(int64_t i) const { return pattern_[static_cast<size_t>(i % kPeriod)]; }
  const void* data() const { return array_.data(); }
  bool Intact() const { return array_.Intact(); }

 private:
  static constexpr int64_t kPeriod = (int64_t{1} << 24) + 24;  // no multiple of a row
  std::vector<float> pattern_;
  DeviceArray<uint16_t> array_;
};

// One row over keys [begin, end).
std::vector<double> Attend(const Repeated& q, int64_t q_row, const Repeated& k, const Repeated& v,
                           int kv_heads, int kv_head, int64_t begin, int64_t end) {
  std::vector<double> score, out(kDim, 0);
  for (int64_t key = begin; key < end; ++key) {
    double dot = 0;
    for (int i = 0; i < kDim; ++i) {
      dot += static_cast<double>(q.At(q_row * kDim + i)) * k.At((key * kv_heads + kv_head) * kDim + i);
    }
    score.push_back(dot / std::sqrt(kDim));
  }
  const double top = *std::max_element(score.begin(), score.end());
  double sum = 0;
  for (int64_t key = begin; key < end; ++key) {
    const double weight = std::exp(score[static_cast<size_t>(key - begin)] - top);
    sum += weight;
    for (int i = 0; i < kDim; ++i) out[i] += weight * v.At((key * kv_heads + kv_head) * kDim + i);
  }
  for (double& x : out) x /= sum;
  return out;
}

void ExpectRow(const uint16_t* device_row, const std::vector<double>& wanted) {
  std::vector<uint16_t> bits(kDim);
  ASSERT_EQ(cudaMemcpy(bits.data(), device_row, kDim * 2, cudaMemcpyDeviceToHost), cudaSuccess);
  const std::vector<float> got = ToFloat(bits);
  double error = 0, size = 0;
  for (int i = 0; i < kDim; ++i) {
    error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    size += wanted[i] * wanted[i];
  }
  EXPECT_LE(std::sqrt(error / size), 2 * kRelativeError);  // of one row, not of all
}

CudaAttentionArgs Args(const Repeated& q, const Repeated& k, const Repeated& v, uint16_t* out) {
  CudaAttentionArgs args;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.out = out;
  args.head_dim = kDim;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(kDim));
  return args;
}

void RunAttention(const CudaAttentionArgs& args) {
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));
  const Status status = CudaAttention(args, workspace.data(), workspace.size(), nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(workspace.Intact());
}

// 2.2e9 elements of Q and of the output; every tile lists its last two blocks.
TEST(CudaAttentionLargeGpuTest, Queries) {
  HW_REQUIRE_SM90();
  constexpr int64_t kTokens = 540'000;
  constexpr int kQHeads = 32, kKvHeads = 4, kPositions = 16;
  constexpr int64_t kTiles = kTokens / kPositions;
  const Repeated q(kTokens * kQHeads * kDim, 1), k(kTokens * kKvHeads * kDim, 2),
      v(kTokens * kKvHeads * kDim, 3);
  DeviceArray<uint16_t> out(kTokens * kQHeads * kDim);
  std::vector<int32_t> counts, blocks;
  std::vector<int64_t> offsets;
  for (int64_t segment = 0; segment < kKvHeads * kTiles; ++segment) {
    const auto last = static_cast<int32_t>((segment % kTiles * kPositions + kPositions - 1) / 128);
    offsets.push_back(static_cast<int64_t>(blocks.size()));
    counts.push_back(std::min(2, last + 1));
    if (last > 0) blocks.push_back(last - 1);
    blocks.push_back(last);
  }
  const DeviceArray<int32_t> dcounts(counts), dblocks(blocks);
  const DeviceArray<int64_t> doffsets(offsets);
  CudaAttentionArgs args = Args(q, k, v, out.data());
  args.total_q = args.total_k = kTokens;
  args.num_q_heads = kQHeads;
  args.num_kv_heads = kKvHeads;
  args.lists = {kKvHeads, dcounts.data(), doffsets.data(), dblocks.data()};

  RunAttention(args);

  for (const int64_t token : {int64_t{0}, int64_t{524'287}, int64_t{524'288}, kTokens - 1}) {
    for (const int head : {0, kQHeads - 1}) {
      const int64_t row = token * kQHeads + head, block = token / 128;
      ExpectRow(out.data() + row * kDim,
                Attend(q, row, k, v, kKvHeads, head / 8, std::max<int64_t>(0, (block - 1) * 128), token + 1));
    }
  }
  EXPECT_TRUE(out.Intact());
}

// 2.3e9 elements of K and of V; a chunk of queries at their end, dense.
TEST(CudaAttentionLargeGpuTest, Keys) {
  HW_REQUIRE_SM90();
  constexpr int64_t kKeys = 2'230'001, kQueries = 130;
  constexpr int kHeads = 8;
  const Repeated q(kQueries * kHeads * kDim, 1), k(kKeys * kHeads * kDim, 2), v(kKeys * kHeads * kDim, 3);
  DeviceArray<uint16_t> out(kQueries * kHeads * kDim);
  CudaAttentionArgs args = Args(q, k, v, out.data());
  args.total_q = kQueries;
  args.total_k = kKeys;
  args.num_q_heads = args.num_kv_heads = kHeads;

  RunAttention(args);

  for (const int64_t row : {int64_t{0}, kQueries * kHeads - 1}) {
    ExpectRow(out.data() + row * kDim, Attend(q, row, k, v, kHeads, static_cast<int>(row % kHeads), 0,
                                              kKeys - kQueries + row / kHeads + 1));
  }
  EXPECT_TRUE(out.Intact());
}

}  // namespace
}  // namespace headwater::kernels
