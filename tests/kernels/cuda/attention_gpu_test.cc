// The sm_90a attention kernel against the double-precision reference.
#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "kernels/cuda/attention.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {
namespace {

// bf16 rounding of P and of the output: 2.2e-3 seen, 4e-3 stated.
constexpr double kRelativeError = 4e-3;
constexpr double kLseError = 1e-4;

enum class Lists { kNone, kPerKvHead, kPerQueryHead };

struct Case {
  const char* name;
  int q_heads, kv_heads, head_dim, q_len, kv_len;
  int q_position = CudaAttentionArgs::kBottomRightAligned;
  Lists lists = Lists::kNone;
  bool f32 = false;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Inputs, outputs and reference of one sequence.
struct Problem {
  Case c;
  int position, pack;
  std::vector<float> q, k, v;
  BlockIndex index;
  std::vector<int32_t> counts, blocks;
  std::vector<int64_t> offsets;

  Problem(const Case& test_case, uint32_t seed) : c(test_case) {
    position = c.q_position == CudaAttentionArgs::kBottomRightAligned ? c.kv_len - c.q_len : c.q_position;
    q = RandomBf16(static_cast<size_t>(c.q_len) * c.q_heads * c.head_dim, seed);
    k = RandomBf16(static_cast<size_t>(c.kv_len) * c.kv_heads * c.head_dim, seed + 1);
    v = RandomBf16(k.size(), seed + 2);
    pack = c.lists == Lists::kPerQueryHead ? 1 : c.q_heads / c.kv_heads;
    if (c.lists != Lists::kNone) MakeLists(seed + 3);
  }

  int NumLists() const { return c.lists == Lists::kNone ? 0 : c.q_heads / pack; }
  int TilePositions() const { return 128 / pack; }

  // Random lists; among them dense and empty ones, and the longest possible.
  void MakeLists(uint32_t seed) {
    std::mt19937 generator(seed);
    const int tiles = (c.q_len + TilePositions() - 1) / TilePositions();
    for (int list = 0; list < NumLists(); ++list) {
      for (int tile = 0; tile < tiles; ++tile) {
        const int last_row = std::min((tile + 1) * TilePositions(), c.q_len) - 1;
        const int visible = (std::min(c.kv_len, last_row + position + 1) + 127) / 128;
        offsets.push_back(static_cast<int64_t>(blocks.size()));
        const uint32_t kind = generator() % 8;
        if (kind == 0) {
          counts.push_back(-1);
          continue;
        }
        int count = 0;
        for (int block = 0; block < visible && kind != 1; ++block) {
          if (kind == 2 || generator() % 3 == 0) {
            blocks.push_back(block);
            ++count;
          }
        }
        counts.push_back(count);
      }
    }
    blocks.push_back(0);  // never empty
  }

  bool Selected(int head, int row, int key) const {
    if (c.lists == Lists::kNone) return true;
    const int tiles = (c.q_len + TilePositions() - 1) / TilePositions();
    const size_t segment = static_cast<size_t>(head / pack) * tiles + row / TilePositions();
    if (counts[segment] == -1) return true;
    const auto begin = blocks.begin() + offsets[segment];
    return std::binary_search(begin, begin + counts[segment], key / 128);
  }

  // out and lse in double; a row without keys: 0 and -infinity.
  void Reference(std::vector<double>* out, std::vector<double>* lse) const {
    const int d = c.head_dim, group = c.q_heads / c.kv_heads;
    out->assign(q.size(), 0);
    lse->assign(static_cast<size_t>(c.q_len) * c.q_heads, -std::numeric_limits<double>::infinity());
    std::vector<double> score(c.kv_len);
#pragma omp parallel for firstprivate(score)
    for (int row = 0; row < c.q_len; ++row) {
      for (int head = 0; head < c.q_heads; ++head) {
        const float* query = &q[(static_cast<size_t>(row) * c.q_heads + head) * d];
        const int visible = std::max(0, std::min(c.kv_len, row + position + 1));
        double top = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int key = 0; key < visible; ++key) {
          const float* other = &k[(static_cast<size_t>(key) * c.kv_heads + head / group) * d];
          double dot = 0;
          for (int i = 0; i < d; ++i) dot += static_cast<double>(query[i]) * other[i];
          score[key] =
              Selected(head, row, key) ? dot / std::sqrt(d) : -std::numeric_limits<double>::infinity();
          top = std::max(top, score[key]);
        }
        if (std::isinf(top)) continue;
        double* result = &(*out)[(static_cast<size_t>(row) * c.q_heads + head) * d];
        for (int key = 0; key < visible; ++key) {
          const double weight = std::exp(score[key] - top);
          if (weight == 0) continue;
          sum += weight;
          const float* value = &v[(static_cast<size_t>(key) * c.kv_heads + head / group) * d];
          for (int i = 0; i < d; ++i) result[i] += weight * value[i];
        }
        for (int i = 0; i < d; ++i) result[i] /= sum;
        (*lse)[static_cast<size_t>(row) * c.q_heads + head] = top + std::log(sum);
      }
    }
  }
};

double RelativeError(const std::vector<float>& out, const std::vector<double>& wanted) {
  double error = 0, size = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double difference = out[i] - wanted[i];
    error += difference * difference;
    size += wanted[i] * wanted[i];
  }
  // All zero: every element must be.
  return size == 0 ? error : std::sqrt(error / size);
}

class CudaAttentionGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaAttentionGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Problem problem(GetParam(), 20261122);
  const Case& c = problem.c;
  DeviceArray<uint16_t> q(ToBf16(problem.q)), k(ToBf16(problem.k)), v(ToBf16(problem.v)),
      out(problem.q.size());
  DeviceArray<float> out_f32(problem.q.size()), lse(static_cast<size_t>(c.q_len) * c.q_heads);
  DeviceArray<int32_t> counts(problem.counts), blocks(problem.blocks);
  DeviceArray<int64_t> offsets(problem.offsets);
  CudaAttentionArgs args;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.out = c.f32 ? nullptr : out.data();
  args.out_f32 = c.f32 ? out_f32.data() : nullptr;
  args.lse_ln = lse.data();
  args.total_q = c.q_len;
  args.total_k = c.kv_len;
  args.num_q_heads = c.q_heads;
  args.num_kv_heads = c.kv_heads;
  args.head_dim = c.head_dim;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(c.head_dim));
  args.query_position = c.q_position;
  args.lists = {problem.NumLists(), counts.data(), offsets.data(), blocks.data()};
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));

  const Status status = CudaAttention(args, workspace.data(), workspace.size(), nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<double> wanted, wanted_lse;
  problem.Reference(&wanted, &wanted_lse);
  EXPECT_LE(RelativeError(c.f32 ? out_f32.Host() : ToFloat(out.Host()), wanted), kRelativeError);
  const std::vector<float> got_lse = lse.Host();
  for (size_t i = 0; i < got_lse.size(); ++i) {
    if (std::isinf(wanted_lse[i])) {
      ASSERT_EQ(got_lse[i], -std::numeric_limits<float>::infinity()) << "row " << i;
    } else {
      ASSERT_NEAR(got_lse[i], wanted_lse[i], kLseError) << "row " << i;
    }
  }
  EXPECT_TRUE(out.Intact() && out_f32.Intact() && lse.Intact() && workspace.Intact());
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaAttentionGpuTest,
    ::testing::Values(Case{"one_token", 8, 2, 128, 1, 1}, Case{"tile_minus_1", 8, 2, 128, 127, 127},
                      Case{"tile", 8, 2, 128, 128, 128}, Case{"tile_plus_1", 8, 2, 128, 129, 129},
                      Case{"ragged", 8, 2, 128, 1000, 1000}, Case{"chunk", 8, 2, 128, 300, 1000},
                      Case{"one_query", 8, 2, 128, 1, 700}, Case{"mha", 4, 4, 128, 333, 333},
                      Case{"gqa3", 9, 3, 128, 333, 401}, Case{"gqa5", 5, 1, 128, 333, 401},
                      Case{"gqa6", 6, 1, 128, 333, 401}, Case{"gqa7", 14, 2, 128, 333, 401},
                      Case{"gqa8", 8, 1, 128, 333, 401}, Case{"d64", 8, 2, 64, 1000, 1000},
                      Case{"d64_one", 8, 2, 64, 1, 1}, Case{"d64_gqa3", 9, 3, 64, 333, 401},
                      Case{"d64_mha", 4, 4, 64, 577, 700}),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Positions, CudaAttentionGpuTest,
    ::testing::Values(Case{"some_rows_see_nothing", 8, 2, 128, 300, 260, -5, Lists::kNone, true},
                      Case{"most_rows_see_nothing", 8, 2, 128, 300, 260, -200, Lists::kNone, true},
                      Case{"nobody_sees_anything", 8, 2, 128, 300, 260, -300, Lists::kNone, true},
                      Case{"unaligned", 8, 2, 128, 300, 260, 37, Lists::kNone, true},
                      Case{"everything_visible", 8, 2, 128, 300, 260, 100000, Lists::kNone, true},
                      Case{"d64_unaligned", 6, 2, 64, 300, 260, 37, Lists::kNone, true}),
    [](const auto& test) { return test.param.name; });

constexpr int kAligned = CudaAttentionArgs::kBottomRightAligned;
INSTANTIATE_TEST_SUITE_P(
    Lists, CudaAttentionGpuTest,
    ::testing::Values(Case{"kv_heads", 8, 2, 128, 1500, 1500, kAligned, Lists::kPerKvHead},
                      Case{"query_heads", 8, 2, 128, 1500, 1500, kAligned, Lists::kPerQueryHead},
                      Case{"chunk_kv_heads", 8, 2, 128, 700, 1900, kAligned, Lists::kPerKvHead},
                      Case{"chunk_query_heads", 8, 2, 128, 700, 1901, kAligned, Lists::kPerQueryHead},
                      Case{"gqa3_kv_heads", 9, 3, 128, 700, 1900, kAligned, Lists::kPerKvHead},
                      Case{"d64_kv_heads", 8, 2, 64, 700, 1900, kAligned, Lists::kPerKvHead},
                      Case{"d64_query_heads", 8, 2, 64, 700, 1900, kAligned, Lists::kPerQueryHead}),
    [](const auto& test) { return test.param.name; });

// Several sequences in one call; the last key row of sequence `poisoned` holds NaN.
TEST(CudaAttentionGpuTest, SequencesDoNotTouchEachOther) {
  HW_REQUIRE_SM90();
  const std::vector<int> q_lens = {1, 127, 128, 129, 400, 0, 33}, kv_lens = {1, 127, 300, 129, 511, 50, 33};
  constexpr int kPoisoned = 2, kQHeads = 8, kKvHeads = 2, kDim = 128;
  std::vector<int32_t> cu_q = {0}, cu_k = {0};
  std::vector<float> q, k, v;
  std::vector<std::unique_ptr<Problem>> problems;
  for (size_t i = 0; i < q_lens.size(); ++i) {
    problems.push_back(std::make_unique<Problem>(Case{"", kQHeads, kKvHeads, kDim, q_lens[i], kv_lens[i]},
                                                 static_cast<uint32_t>(i)));
    const auto append = [](std::vector<float>* to, const std::vector<float>& from) {
      to->insert(to->end(), from.begin(), from.end());
    };
    append(&q, problems[i]->q);
    append(&k, problems[i]->k);
    append(&v, problems[i]->v);
    cu_q.push_back(cu_q.back() + q_lens[i]);
    cu_k.push_back(cu_k.back() + kv_lens[i]);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(v.begin() + int64_t{cu_k[kPoisoned]} * kKvHeads * kDim, kKvHeads * kDim, nan);
  DeviceArray<uint16_t> dq(ToBf16(q)), dk(ToBf16(k)), dv(ToBf16(v)), out(q.size());
  DeviceArray<int32_t> dcu_q(cu_q), dcu_k(cu_k);
  CudaAttentionArgs args;
  args.q = dq.data();
  args.k = dk.data();
  args.v = dv.data();
  args.out = out.data();
  args.total_q = cu_q.back();
  args.total_k = cu_k.back();
  args.num_q_heads = kQHeads;
  args.num_kv_heads = kKvHeads;
  args.head_dim = kDim;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(kDim));
  args.num_sequences = static_cast<int32_t>(q_lens.size());
  args.cu_seqlens_q = dcu_q.data();
  args.cu_seqlens_k = dcu_k.data();
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));

  const Status status = CudaAttention(args, workspace.data(), workspace.size(), nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<float> got = ToFloat(out.Host());
  for (size_t i = 0; i < q_lens.size(); ++i) {
    if (i == kPoisoned || q_lens[i] == 0) continue;
    std::vector<double> wanted, lse;
    problems[i]->Reference(&wanted, &lse);
    const auto begin = got.begin() + int64_t{cu_q[i]} * kQHeads * kDim;
    EXPECT_LE(RelativeError({begin, begin + static_cast<int64_t>(wanted.size())}, wanted), kRelativeError)
        << "sequence " << i;
  }
  EXPECT_TRUE(out.Intact());
}

TEST(CudaAttentionGpuTest, NanInAQueryStaysInItsRow) {
  HW_REQUIRE_SM90();
  Problem problem({"", 8, 2, 128, 200, 200}, 7);
  constexpr size_t kRow = 150 * 8 + 3;
  std::vector<double> wanted, lse;
  problem.Reference(&wanted, &lse);
  std::fill_n(problem.q.begin() + kRow * 128, 128, std::numeric_limits<float>::quiet_NaN());
  DeviceArray<uint16_t> q(ToBf16(problem.q)), k(ToBf16(problem.k)), v(ToBf16(problem.v)),
      out(problem.q.size());
  CudaAttentionArgs args;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.out = out.data();
  args.total_q = args.total_k = 200;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(128));
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));

  ASSERT_TRUE(CudaAttention(args, workspace.data(), workspace.size(), nullptr).ok());

  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<float> got = ToFloat(out.Host());
  for (size_t i = 0; i < 128; ++i) {
    EXPECT_TRUE(std::isnan(got[kRow * 128 + i]));
    got[kRow * 128 + i] = 0;
    wanted[kRow * 128 + i] = 0;
  }
  EXPECT_LE(RelativeError(got, wanted), kRelativeError);
}

TEST(CudaAttentionGpuTest, EqualCallsGiveEqualBits) {
  HW_REQUIRE_SM90();
  const Problem problem({"", 8, 2, 128, 3000, 3000, kAligned, Lists::kPerKvHead}, 9);
  DeviceArray<uint16_t> q(ToBf16(problem.q)), k(ToBf16(problem.k)), v(ToBf16(problem.v)),
      out(problem.q.size());
  DeviceArray<int32_t> counts(problem.counts), blocks(problem.blocks);
  DeviceArray<int64_t> offsets(problem.offsets);
  CudaAttentionArgs args;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.out = out.data();
  args.total_q = args.total_k = 3000;
  args.num_q_heads = 8;
  args.num_kv_heads = 2;
  args.head_dim = 128;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(128));
  args.lists = {2, counts.data(), offsets.data(), blocks.data()};
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));
  std::vector<uint16_t> first;
  for (int i = 0; i < 200; ++i) {
    ASSERT_TRUE(CudaAttention(args, workspace.data(), workspace.size(), nullptr).ok());
    const std::vector<uint16_t> now = out.Host();
    if (i == 0) first = now;
    ASSERT_EQ(now, first) << "run " << i;
  }
}

}  // namespace
}  // namespace headwater::kernels
