// SparseSkeleton on the GPU, stage by stage, against the double-precision reference.
#include "kernels/cuda/skeleton.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "kernels/cuda/policies/skeleton.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {
namespace {

using reference::SkeletonParameters;

struct Case {
  const char* name;
  int64_t tokens;
  int32_t q_heads, kv_heads, head_dim;
  int32_t sinks = 128, local = 128, samples_per_dim = 20;
  double budget_blocks = 0;
  std::vector<double> frequencies = {};

  SkeletonParameters Parameters() const {
    SkeletonParameters parameters;
    parameters.sink_tokens = sinks;
    parameters.local_tokens = local;
    parameters.samples_per_dim = samples_per_dim;
    parameters.budget_blocks = budget_blocks;
    parameters.frequencies = frequencies;
    return parameters;
  }
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Rows of a vector of their head and noise, turned by their position: logits with slashes and verticals.
std::vector<float> Turned(const Case& c, int32_t heads, uint32_t seed) {
  const int32_t half = c.head_dim / 2;
  std::vector<float> x = RandomBf16(static_cast<size_t>(c.tokens) * heads * c.head_dim, seed);
  const std::vector<float> mean = RandomBf16(static_cast<size_t>(heads) * c.head_dim, 77);
  for (int64_t token = 0; token < c.tokens; ++token) {
    for (int32_t head = 0; head < heads; ++head) {
      float* const row = x.data() + (token * heads + head) * c.head_dim;
      const float* const base = mean.data() + static_cast<size_t>(head) * c.head_dim;
      for (int32_t m = 0; m < half; ++m) {
        const double theta = c.frequencies.empty() ? std::pow(500000, -2.0 * m / c.head_dim)
                                                   : c.frequencies[static_cast<size_t>(m)];
        const double a = row[m] + base[m], b = row[m + half] + base[m + half];
        const double turn = theta * static_cast<double>(token);
        row[m] = static_cast<float>(a * std::cos(turn) - b * std::sin(turn));
        row[m + half] = static_cast<float>(a * std::sin(turn) + b * std::cos(turn));
      }
    }
  }
  return ToFloat(ToBf16(x));
}

struct Result {
  std::vector<float> mu, sigma, lambda, delta, h, s, v, tau, s_block, v_block, h_block;
  std::vector<double> constants;
  std::vector<uint32_t> words;
};

std::vector<float> Copied(const float* from, size_t count) {
  std::vector<float> values(count);
  EXPECT_EQ(cudaMemcpy(values.data(), from, 4 * count, cudaMemcpyDeviceToHost), cudaSuccess);
  return values;
}

Status Select(const Case& c, const std::vector<float>& q, const std::vector<float>& k, Result* result) {
  const SkeletonParameters parameters = c.Parameters();
  DeviceArray<uint16_t> dq(ToBf16(q)), dk(ToBf16(k));
  const CudaSkeletonArgs args{dq.data(),
                              dk.data(),
                              c.tokens,
                              c.q_heads,
                              c.kv_heads,
                              c.head_dim,
                              static_cast<float>(1 / std::sqrt(c.head_dim)),
                              &parameters};
  CudaBlockMasks masks{nullptr, c.tokens, c.q_heads, 128};
  DeviceArray<uint32_t> words(masks.bytes() / 4);
  masks.words = words.data();
  DeviceArray<unsigned char> workspace(CudaSkeletonWorkspaceBytes(args));
  HW_KERNELS_RETURN_IF_ERROR(CudaSkeletonTables(args, workspace.data(), workspace.size(), nullptr));
  const Status status = CudaSkeletonSelect(args, masks, workspace.data(), workspace.size(), nullptr);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(words.Intact() && workspace.Intact() && dq.Intact() && dk.Intact());
  const CudaSkeletonStages stages = CudaSkeletonStagesIn(args, workspace.data());
  const size_t heads = static_cast<size_t>(c.q_heads), rows = heads * static_cast<size_t>(c.tokens),
               blocks = heads * static_cast<size_t>((c.tokens + 63) / 64);
  *result = {Copied(stages.mu, rows),
             Copied(stages.sigma, rows),
             Copied(stages.lambda, rows),
             Copied(stages.delta, rows),
             Copied(stages.h, rows),
             Copied(stages.s, rows),
             Copied(stages.v, rows),
             Copied(stages.tau, heads),
             Copied(stages.s_block, blocks),
             Copied(stages.v_block, blocks),
             Copied(stages.h_block, blocks),
             std::vector<double>(3 * heads),
             words.Host()};
  EXPECT_EQ(cudaMemcpy(result->constants.data(), stages.constants, 24 * heads, cudaMemcpyDeviceToHost),
            cudaSuccess);
  return status;
}

reference::SkeletonTrace Reference(const Case& c, const std::vector<float>& q, const std::vector<float>& k) {
  reference::PolicyProblem problem;
  problem.q = q.data();
  problem.k = k.data();
  problem.num_tokens = c.tokens;
  problem.num_q_heads = c.q_heads;
  problem.num_kv_heads = c.kv_heads;
  problem.head_dim = c.head_dim;
  problem.softmax_scale = static_cast<float>(1 / std::sqrt(c.head_dim));
  reference::SkeletonTrace trace;
  const Status status = SkeletonSelect(problem, c.Parameters(), &trace, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  return trace;
}

// Largest difference from entry `first` on, of a head's part of `got`; infinite where one is not a number.
// `relative`: to the wanted value, where that is over 1.
double Worst(const std::vector<float>& got, size_t head, const std::vector<double>& want, size_t first,
             bool relative = false) {
  double worst = 0;
  for (size_t i = first; i < want.size(); ++i) {
    const double value = got[head * want.size() + i];
    if (value == want[i]) continue;
    const double error = std::fabs(value - want[i]) / (relative ? std::max(1.0, std::fabs(want[i])) : 1.0);
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
  }
  return worst;
}

template <typename T>
std::vector<T> Squares(std::vector<T> values) {
  for (T& value : values) value *= value;
  return values;
}

// f32 sums of bf16 products, sigma^2 also of products of 17 bits; what regression makes of them: its system's
// condition is 1e11.
constexpr double kStatistics = 2e-5, kSquares = 6e-5, kModel = 2e-3;

void ExpectNear(const char* name, size_t head, double error, double most) {
  EXPECT_LE(error, most) << name << " of head " << head;
}

// s + v + h of all interior pairs.
double WorstSum(const Case& c, const Result& got, size_t head, const reference::SkeletonHead& want) {
  const float *s = &got.s[head * want.s.size()], *v = &got.v[head * want.s.size()],
              *h = &got.h[head * want.s.size()];
  double worst = 0;
  for (int64_t i = c.sinks + c.local; i < c.tokens; ++i) {
    for (int64_t j = c.sinks; j <= i - c.local; ++j) {
      const double sum = double{s[i - j]} + v[j] + h[i];
      const auto row = static_cast<size_t>(i), key = static_cast<size_t>(j);
      const double error = std::fabs(sum - (want.s[row - key] + want.v[key] + want.h[row]));
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
  }
  return worst;
}

void ExpectStages(const Case& c, const Result& got, const reference::SkeletonTrace& want) {
  const auto first = static_cast<size_t>(c.sinks + c.local);
  for (size_t head = 0; head < want.heads.size(); ++head) {
    const reference::SkeletonHead& w = want.heads[head];
    ExpectNear("mu", head, Worst(got.mu, head, w.mu, first), kStatistics);
    ExpectNear("sigma^2", head, Worst(Squares(got.sigma), head, Squares(w.sigma), first, true), kSquares);
    ExpectNear("lambda", head, Worst(got.lambda, head, w.lambda, first, true), kStatistics);
    ExpectNear("zeta", head, std::fabs(got.constants[3 * head + 2] - w.zeta), kStatistics);
    if (got.tau[head] != static_cast<float>(w.tau)) {  // may be infinite
      ExpectNear("tau", head, std::fabs(got.tau[head] - w.tau), kModel);
    }
    // Fewer rows than unknowns leave directions open, which rounding decides, but not the sums.
    if (c.tokens - c.sinks - c.local < 4 * c.head_dim) {
      ExpectNear("s + v + h", head, WorstSum(c, got, head, w), kModel);
      continue;
    }
    ExpectNear("s", head, Worst(got.s, head, w.s, 0), kModel);
    ExpectNear("v", head, Worst(got.v, head, w.v, 0), kModel);
    ExpectNear("delta", head, Worst(got.delta, head, w.delta, first), kModel);
    ExpectNear("h", head, Worst(got.h, head, w.h, first), kModel);
    ExpectNear("s_block", head, Worst(got.s_block, head, w.s_block, 0), kModel);
    ExpectNear("v_block", head, Worst(got.v_block, head, w.v_block, 0), kModel);
    ExpectNear("h_block", head, Worst(got.h_block, head, w.h_block, 0), kModel);
  }
}

bool Bit(const Case& c, const Result& got, size_t head, size_t tile, size_t block) {
  const CudaBlockMasks masks{nullptr, c.tokens, c.q_heads, 128};
  const size_t row = head * static_cast<size_t>(masks.tiles()) + tile;
  return (got.words[row * static_cast<size_t>(masks.tile_words()) + block / 32] >> (block % 32) & 1) != 0;
}

void ExpectMasks(const Case& c, const Result& got, const reference::SkeletonTrace& want) {
  size_t undecided = 0, all = 0;
  for (size_t head = 0; head < want.heads.size(); ++head) {
    for (size_t tile = 0; tile < want.heads[head].kept.size(); ++tile) {
      const std::vector<int32_t>& keep = want.heads[head].kept[tile];
      const std::vector<int32_t>& either = want.heads[head].undecided[tile];
      for (size_t block = 0; block <= tile; ++block) {
        const auto number = static_cast<int32_t>(block);
        const bool wanted = std::binary_search(keep.begin(), keep.end(), number);
        ++all;
        if (std::binary_search(either.begin(), either.end(), number)) {
          ++undecided;
          continue;
        }
        ASSERT_EQ(Bit(c, got, head, tile, block), wanted)
            << "head " << head << ", tile " << tile << ", block " << block;
      }
    }
  }
  EXPECT_LT(undecided, all / 8 + 2);
}

class CudaSkeletonGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaSkeletonGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Case& c = GetParam();
  const std::vector<float> q = Turned(c, c.q_heads, 1), k = Turned(c, c.kv_heads, 2);
  Result got;

  const Status status = Select(c, q, k, &got);

  ASSERT_TRUE(status.ok()) << status.message();
  const reference::SkeletonTrace want = Reference(c, q, k);
  ASSERT_EQ(want.heads.size(), static_cast<size_t>(c.q_heads));
  ExpectStages(c, got, want);
  ExpectMasks(c, got, want);
}

std::vector<double> SomeFrequencies() {
  std::vector<double> theta;
  for (int m = 0; m < 32; ++m) theta.push_back(m < 4 ? 0.0 : m == 4 ? 7.1 : std::pow(1000, -m / 32.0));
  return theta;
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaSkeletonGpuTest,
    ::testing::Values(Case{"one_row", 257, 2, 1, 128}, Case{"two_rows", 258, 2, 1, 128},
                      Case{"two_tokens", 2, 2, 1, 64, 0, 1}, Case{"tokens127", 127, 2, 1, 128, 10, 20},
                      Case{"tokens128", 128, 2, 1, 128, 10, 20}, Case{"tokens129", 129, 2, 1, 128, 10, 20},
                      Case{"tokens129_d64", 129, 2, 1, 64, 10, 20}, Case{"no_sinks", 1000, 2, 2, 64, 0, 1},
                      Case{"gqa4", 3001, 8, 2, 128}, Case{"gqa4_d64", 3001, 8, 2, 64},
                      Case{"gqa3", 1500, 6, 2, 128}, Case{"gqa8", 2048, 8, 1, 64},
                      Case{"gqa5_d128", 2000, 5, 1, 128, 64, 64}, Case{"wide", 2500, 2, 1, 128, 300, 500},
                      Case{"odd_parts", 2777, 2, 1, 64, 77, 133},
                      Case{"published_samples", 4000, 1, 1, 128, 128, 128, 80},
                      Case{"many_samples", 1000, 2, 1, 64, 100, 100, 1500},
                      Case{"frequencies", 2000, 2, 1, 64, 128, 128, 80, 0, SomeFrequencies()},
                      Case{"tiles_of_a_chunk", 9000, 16, 8, 64},
                      Case{"tiles_of_a_chunk_d128", 9000, 8, 8, 128, 128, 128, 10},
                      Case{"long", 40000, 2, 1, 128, 128, 128, 80},
                      Case{"budget", 3001, 4, 1, 128, 128, 128, 20, 12},
                      Case{"budget_of_nothing", 2000, 1, 1, 64, 128, 128, 20, 1},
                      Case{"budget_of_everything", 2000, 1, 1, 64, 128, 128, 20, 100},
                      Case{"budget_all_forced", 300, 1, 1, 64, 128, 128, 20, 2}),
    [](const auto& test) { return test.param.name; });

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TEST(CudaSkeletonGpuTest, EqualCallsGiveEqualBits) {
  HW_REQUIRE_SM90();
  const Case c{"", 20000, 8, 2, 128};
  const std::vector<float> q = Turned(c, 8, 1), k = Turned(c, 2, 2);
  Result first, second;

  ASSERT_TRUE(Select(c, q, k, &first).ok());
  ASSERT_TRUE(Select(c, q, k, &second).ok());

  EXPECT_TRUE(SameBits(first.words, second.words));
  EXPECT_TRUE(SameBits(first.s, second.s) && SameBits(first.v, second.v));
  EXPECT_TRUE(SameBits(first.h_block, second.h_block) && SameBits(first.constants, second.constants));
}

// Whatever the numbers are, sinks and local blocks stay.
TEST(CudaSkeletonGpuTest, NansLeaveForcedBlocks) {
  HW_REQUIRE_SM90();
  const Case c{"", 2000, 4, 2, 128};
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    std::vector<float> q = Turned(c, 4, 1), k = Turned(c, 2, 2);
    for (size_t i = 0; i < 128; ++i) k[size_t{900} * 2 * 128 + i] = bad;
    q[size_t{1200} * 4 * 128 + 5] = bad;
    Result got;

    ASSERT_TRUE(Select(c, q, k, &got).ok());

    for (size_t head = 0; head < 4; ++head) {
      for (size_t tile = 0; tile < 16; ++tile) {
        EXPECT_TRUE(Bit(c, got, head, tile, 0) && Bit(c, got, head, tile, tile));
        EXPECT_TRUE(tile == 0 || Bit(c, got, head, tile, tile - 1));
      }
    }
  }
}

// The policy lists what the masks say, layer after layer and prompt after prompt.
TEST(CudaSkeletonGpuTest, PolicyListsTheMasks) {
  HW_REQUIRE_SM90();
  std::unique_ptr<CudaPolicy> policy;
  const Case longest{"", 3001, 4, 2, 128};
  ASSERT_TRUE(
      MakeCudaSkeleton(longest.Parameters(), {3, 4, 2, 128, static_cast<float>(1 / std::sqrt(128))}, &policy)
          .ok());
  DeviceArray<unsigned char> memory(policy->MemoryBytes(3001));
  for (const int64_t tokens : {3001, 200, 1500}) {
    Case c = longest;
    c.tokens = tokens;
    const std::vector<float> q = Turned(c, 4, 1), k = Turned(c, 2, 2);
    DeviceArray<uint16_t> dq(ToBf16(q)), dk(ToBf16(k));
    ASSERT_TRUE(policy->Begin(tokens, memory.data(), memory.size(), nullptr).ok());
    for (const int32_t layer : {0, 2}) {
      CudaSelection selection;
      ASSERT_TRUE(policy->Select({layer, dq.data(), dk.data(), dk.data()}, nullptr, &selection).ok());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      if (tokens == 200) {
        EXPECT_EQ(selection.lists.num_lists, 0);
        continue;
      }
      Result got;
      ASSERT_TRUE(Select(c, q, k, &got).ok());
      const size_t tiles = static_cast<size_t>((tokens + 127) / 128), segments = 4 * tiles;
      ASSERT_EQ(selection.lists.num_lists, 4);
      std::vector<int32_t> counts(segments), blocks;
      std::vector<int64_t> offsets(segments);
      EXPECT_EQ(cudaMemcpy(counts.data(), selection.lists.counts, 4 * segments, cudaMemcpyDeviceToHost),
                cudaSuccess);
      EXPECT_EQ(cudaMemcpy(offsets.data(), selection.lists.offsets, 8 * segments, cudaMemcpyDeviceToHost),
                cudaSuccess);
      for (size_t i = 0; i < segments; ++i) {
        std::vector<int32_t> want;
        for (size_t block = 0; block <= i % tiles; ++block) {
          if (Bit(c, got, i / tiles, i % tiles, block)) want.push_back(static_cast<int32_t>(block));
        }
        if (counts[i] < 0) {
          ASSERT_EQ(want.size(), i % tiles + 1) << i;
          continue;
        }
        blocks.assign(static_cast<size_t>(counts[i]), 0);
        EXPECT_EQ(cudaMemcpy(blocks.data(), selection.lists.blocks + offsets[i], 4 * blocks.size(),
                             cudaMemcpyDeviceToHost),
                  cudaSuccess);
        ASSERT_EQ(blocks, want) << i;
      }
    }
  }
  EXPECT_TRUE(memory.Intact());
}

// Prints what selections take; not a check.
TEST(CudaSkeletonGpuTest, Timing) {
  HW_REQUIRE_SM90();
  if (std::getenv("HW_TEST_TIMING") == nullptr) GTEST_SKIP() << "HW_TEST_TIMING is not set";
  for (const Case& c :
       {Case{"", 131072, 32, 8, 128, 128, 128, 80}, Case{"", 131072, 8, 1, 128, 128, 128, 80}}) {
    const SkeletonParameters parameters = c.Parameters();
    const std::vector<uint16_t> some = ToBf16(RandomBf16(size_t{1} << 22, 1));
    DeviceArray<uint16_t> q(static_cast<size_t>(c.tokens) * c.q_heads * 128),
        k(static_cast<size_t>(c.tokens) * c.kv_heads * 128);
    for (DeviceArray<uint16_t>* const array : {&q, &k}) {
      for (size_t at = 0; at < array->size(); at += some.size()) {
        const size_t count = std::min(some.size(), array->size() - at);
        ASSERT_EQ(cudaMemcpy(array->data() + at, some.data(), 2 * count, cudaMemcpyHostToDevice),
                  cudaSuccess);
      }
    }
    const CudaSkeletonArgs args{q.data(),   k.data(), c.tokens, c.q_heads,
                                c.kv_heads, 128,      0.0884f,  &parameters};
    CudaBlockMasks masks{nullptr, c.tokens, c.q_heads, 128};
    DeviceArray<uint32_t> words(masks.bytes() / 4);
    masks.words = words.data();
    DeviceArray<unsigned char> workspace(CudaSkeletonWorkspaceBytes(args));
    ASSERT_TRUE(CudaSkeletonTables(args, workspace.data(), workspace.size(), nullptr).ok());
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    float least = INFINITY;
    for (int i = 0; i < 6; ++i) {
      cudaEventRecord(begin);
      ASSERT_TRUE(CudaSkeletonSelect(args, masks, workspace.data(), workspace.size(), nullptr).ok());
      cudaEventRecord(end);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      float ms = 0;
      cudaEventElapsedTime(&ms, begin, end);
      least = std::min(least, ms);
    }
    std::printf("TIMING %lld tokens, %d of %d heads: %.3f ms, workspace %.0f MB\n",
                static_cast<long long>(c.tokens), c.q_heads, c.kv_heads, least,
                static_cast<double>(workspace.size()) / 1e6);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
}

}  // namespace
}  // namespace headwater::kernels
