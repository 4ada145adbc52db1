// SparseSkeleton's reference: logits that are sums come back, and each stage against its definition.
#include "kernels/reference/policies/skeleton.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kernels/reference/policies/skeleton_mask.h"
#include "tests/kernels/policies/flash_cases.h"

namespace headwater::kernels::reference {
namespace {

using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

double Logit(const PolicyProblem& p, int64_t i, int64_t j, int32_t head) {
  double dot = 0;
  for (int32_t m = 0; m < p.head_dim; ++m) dot += static_cast<double>(p.Q(i, head)[m]) * p.K(j, head)[m];
  return dot * p.softmax_scale;
}

SkeletonTrace Trace(const FlashCase& c, const SkeletonParameters& parameters, BlockIndex* index = nullptr) {
  SkeletonTrace trace;
  const Status status = SkeletonSelect(c.problem, parameters, &trace, index);
  EXPECT_TRUE(status.ok()) << status.message();
  return trace;
}

// Logits that are sums: q . k = slash(i - j) + vertical(j) + shift(i). Dimensions of frequency 0 carry
// vertical and shift, the others constant vectors, whose product turns with the distance.
struct Additive {
  static constexpr int32_t kDim = 16, kHalf = 8;
  Additive(int64_t tokens, int32_t q_heads, int32_t kv_heads, float strength = 1)
      : c(tokens, q_heads, kv_heads, kDim) {
    parameters.sink_tokens = 40;
    parameters.local_tokens = 50;
    parameters.frequencies = {0.3, 0.05, 0.011, 0.004, 0, 0, 0, 0};
    parameters.ridge = 1e-7;
    std::mt19937 generator(17);
    std::normal_distribution<float> normal;
    for (int32_t head = 0; head < kv_heads; ++head) {
      const auto turned = Draw(4, [&] { return std::complex<double>(0.5 * normal(generator), 0.5); });
      for (int64_t token = 0; token < tokens; ++token) {
        std::vector<std::complex<double>> row = turned;
        row.push_back({strength * normal(generator), strength * normal(generator)});
        row.push_back({normal(generator), 0});
        row.push_back({1, 0});
        row.push_back({0, 0});
        SetK(token, head, row);
      }
    }
    for (int32_t head = 0; head < q_heads; ++head) {
      const auto fixed = Draw(5, [&] { return std::complex<double>(0.4 * normal(generator), 0.3); });
      for (int64_t token = 0; token < tokens; ++token) {
        std::vector<std::complex<double>> row = fixed;
        row.push_back({0, 3});
        row.push_back({normal(generator), 1});  // the shift of row `token`
        row.push_back({1, 1});
        SetQ(token, head, row);
      }
    }
  }

  static std::vector<std::complex<double>> Draw(int count,
                                                const std::function<std::complex<double>()>& draw) {
    std::vector<std::complex<double>> values;
    for (int i = 0; i < count; ++i) values.push_back(draw());
    return values;
  }
  std::complex<double> Turned(std::complex<double> value, int64_t token, size_t m) const {
    return value * std::polar(1.0, static_cast<double>(token) * parameters.frequencies[m]);
  }
  void SetK(int64_t token, int32_t head, const std::vector<std::complex<double>>& row) {
    for (size_t m = 0; m < row.size(); ++m) {
      const std::complex<double> x = Turned(row[m], token, m);
      c.SetK(token, token + 1, head, static_cast<int32_t>(m), static_cast<float>(x.real()));
      c.SetK(token, token + 1, head, static_cast<int32_t>(m) + kHalf, static_cast<float>(x.imag()));
    }
  }
  void SetQ(int64_t token, int32_t head, const std::vector<std::complex<double>>& row) {
    for (size_t m = 0; m < row.size(); ++m) {
      const std::complex<double> x = Turned(row[m], token, m);
      c.SetQ(token, head, static_cast<int32_t>(m), static_cast<float>(x.real()));
      c.SetQ(token, head, static_cast<int32_t>(m) + kHalf, static_cast<float>(x.imag()));
    }
  }
  // Parts of the logit that the turning dimensions carry, and the others.
  double Part(int64_t i, int64_t j, int32_t head, bool turning) const {
    double dot = 0;
    for (int32_t m = 0; m < kDim; ++m) {
      if ((m % kHalf < 4) == turning) {
        dot += static_cast<double>(c.problem.Q(i, head)[m]) * c.problem.K(j, head)[m];
      }
    }
    return dot;
  }

  FlashCase c;
  SkeletonParameters parameters;
};

TEST(SkeletonTest, SumsComeBack) {
  const Additive sums(700, 4, 2);
  const SkeletonTrace trace = Trace(sums.c, sums.parameters);

  ASSERT_EQ(trace.heads.size(), 4u);
  for (int32_t head = 0; head < 4; ++head) {
    const SkeletonHead& got = trace.heads[static_cast<size_t>(head)];
    double slash = 0, vertical = 0;
    for (int64_t j = 40; j <= 649; ++j) {
      slash += sums.Part(699, j, head, true) / 610;
      vertical += sums.Part(699, j, head, false) / 610;
    }
    for (int64_t j = 40; j <= 649; ++j) {
      EXPECT_NEAR(got.s[static_cast<size_t>(699 - j)], sums.Part(699, j, head, true) - slash, 1e-4) << j;
      EXPECT_NEAR(got.v[static_cast<size_t>(j)], sums.Part(699, j, head, false) - vertical, 1e-4) << j;
    }
    for (int64_t i = 90; i < 700; i += 7) {
      for (int64_t j = 40; j <= i - 50; ++j) {
        const double model = got.s[static_cast<size_t>(i - j)] + got.v[static_cast<size_t>(j)] -
                             got.delta[static_cast<size_t>(i)];
        ASSERT_NEAR(model, Logit(sums.c.problem, i, j, head) - got.mu[static_cast<size_t>(i)], 1e-4)
            << head << " " << i << " " << j;
      }
    }
  }
}

// exp(s + v + h) of the interior and the exact rest make 1: exactly in the last row, nearly where the logits
// are not quite normal.
TEST(SkeletonTest, RowsSumToOne) {
  const Additive sums(700, 2, 1);
  const SkeletonTrace trace = Trace(sums.c, sums.parameters);

  for (int32_t head = 0; head < 2; ++head) {
    const SkeletonHead& got = trace.heads[static_cast<size_t>(head)];
    for (size_t i = 200; i < 700; ++i) {
      const auto row = static_cast<int64_t>(i);
      double sum = 0;
      for (int64_t j = 0; j <= row; ++j) {
        const bool interior = j >= 40 && j <= row - 50;
        const auto key = static_cast<size_t>(j);
        sum += interior ? std::exp(got.s[i - key] + got.v[key] + got.h[i])
                        : std::exp(Logit(sums.c.problem, row, j, head) - got.mu[i] - got.nu[i]);
      }
      EXPECT_NEAR(sum, 1, i == 699 ? 1e-4 : 0.2) << head << " " << i;
    }
  }
}

// Random inputs, any frequencies: every stage by its formula, with means taken row by row.
class SkeletonStagesTest : public ::testing::Test {
 protected:
  SkeletonStagesTest() : c(300, 2, 1, 8) {
    c.Randomize(23);
    parameters.sink_tokens = 13;
    parameters.local_tokens = 30;
    parameters.rope_base = 1000;
    trace = Trace(c, parameters);
    for (int64_t i = 0; i < 300; ++i) {
      std::vector<std::complex<double>> row;
      for (int m = 0; m < 4; ++m) {
        const std::complex<double> k(c.problem.K(i, 0)[m], c.problem.K(i, 0)[m + 4]);
        row.push_back(k * std::polar(1.0, -static_cast<double>(i) * std::pow(1000.0, -m / 4.0)));
      }
      khat.push_back(row);
    }
  }
  // r_(j-i), then khat_j.
  std::vector<double> Feature(int64_t i, int64_t j) const {
    std::vector<double> row(16);
    for (int m = 0; m < 4; ++m) {
      const auto turn = std::polar(1.0, static_cast<double>(j - i) * std::pow(1000.0, -m / 4.0));
      const auto at = static_cast<size_t>(m);
      row[at] = turn.real(), row[at + 4] = turn.imag();
      row[at + 8] = khat[static_cast<size_t>(j)][at].real(),
               row[at + 12] = khat[static_cast<size_t>(j)][at].imag();
    }
    return row;
  }
  std::vector<double> Centred(int64_t i, int64_t j, int64_t mean_row) const {
    std::vector<double> row = Feature(i, j);
    const auto count = static_cast<double>(mean_row - 30 - 13 + 1);
    for (int64_t l = 13; l <= mean_row - 30; ++l) {
      const std::vector<double> other = Feature(mean_row, l);
      for (size_t m = 0; m < 16; ++m) row[m] -= other[m] / count;
    }
    return row;
  }

  FlashCase c;
  SkeletonParameters parameters;
  SkeletonTrace trace;
  std::vector<std::vector<std::complex<double>>> khat;
};

TEST_F(SkeletonStagesTest, MeanAndSpreadOfTheInterior) {
  for (int32_t head = 0; head < 2; ++head) {
    const SkeletonHead& got = trace.heads[static_cast<size_t>(head)];
    for (int64_t i = 43; i < 300; i += 3) {
      double sum = 0, squares = 0;
      const auto count = static_cast<double>(i - 42);
      for (int64_t j = 13; j <= i - 30; ++j) sum += Logit(c.problem, i, j, head);
      for (int64_t j = 13; j <= i - 30; ++j) {
        squares += std::pow(Logit(c.problem, i, j, head) - sum / count, 2);
      }
      EXPECT_NEAR(got.mu[static_cast<size_t>(i)], sum / count, 1e-9) << i;
      EXPECT_NEAR(got.sigma[static_cast<size_t>(i)], std::sqrt(squares / count), 1e-6) << i;
    }
    EXPECT_EQ(got.mu[42], 0);
    EXPECT_TRUE(std::isinf(got.h[42]) && std::isfinite(got.h[43]));
  }
}

// The minimum of |A x - b|^2 + lambda^2 |x|^2 has no slope.
TEST_F(SkeletonStagesTest, CoefficientsAreTheRidgeMinimum) {
  for (int32_t head = 0; head < 2; ++head) {
    const SkeletonHead& got = trace.heads[static_cast<size_t>(head)];
    std::vector<double> x = got.alpha;
    x.insert(x.end(), got.kappa.begin(), got.kappa.end());
    ASSERT_EQ(x.size(), 16u);
    std::vector<double> slope(16, 0), size(16, 0);
    double squares = 0;
    for (int64_t n = 0; n < 80 * 8; ++n) {
      const SkeletonPair pair = SampleSkeletonPair(parameters, 300, head, n);
      const std::vector<double> row = Centred(pair.query, pair.key, pair.query);
      double rest = got.mu[static_cast<size_t>(pair.query)] - Logit(c.problem, pair.query, pair.key, head);
      for (size_t m = 0; m < 16; ++m) rest += row[m] * x[m];
      for (size_t m = 0; m < 16; ++m) {
        slope[m] += row[m] * rest, size[m] += std::abs(row[m] * rest), squares += row[m] * row[m];
      }
    }
    for (size_t m = 0; m < 16; ++m) {
      EXPECT_NEAR(slope[m] + 1e-10 * squares / 4 * x[m], 0, 1e-9 * size[m]) << m;
    }
  }
}

TEST_F(SkeletonStagesTest, VectorsFollowTheirFormulas) {
  const SkeletonHead& got = trace.heads[1];
  for (int64_t j = 0; j < 300; j += 7) {
    const std::vector<double> row = Centred(299, j, 299);
    double s = 0, v = 0;
    for (size_t m = 0; m < 8; ++m) s += row[m] * got.alpha[m], v += row[m + 8] * got.kappa[m];
    EXPECT_NEAR(got.s[static_cast<size_t>(299 - j)], s, 1e-7);
    EXPECT_NEAR(got.v[static_cast<size_t>(j)], v, 1e-7);
  }
  long double last = 0;
  for (int64_t j = 13; j <= 269; ++j) last += std::exp(static_cast<long double>(Logit(c.problem, 299, j, 1)));
  const double zeta = got.mu[299] + got.sigma[299] * got.sigma[299] / 2 + std::log(257.0) -
                      static_cast<double>(std::log(last));
  EXPECT_NEAR(got.zeta, zeta, 1e-9);
  for (size_t i = 43; i < 300; i += 4) {
    const auto row = static_cast<int64_t>(i);
    double delta = 0, lambda = 0;
    for (int64_t j = 0; j <= row; ++j) {
      if (j < 13 || j > row - 30) {
        lambda += std::exp(Logit(c.problem, row, j, 1) - got.mu[i]);
      } else {
        delta += (got.s[i - static_cast<size_t>(j)] + got.v[static_cast<size_t>(j)]) /
                 static_cast<double>(row - 42);
      }
    }
    EXPECT_NEAR(got.delta[i], delta, 1e-7) << i;
    EXPECT_NEAR(got.lambda[i] / lambda, 1, 1e-12) << i;
    const double nu =
        std::log(lambda + static_cast<double>(row - 42) * std::exp(got.sigma[i] * got.sigma[i] / 2 - zeta));
    EXPECT_NEAR(got.nu[i], nu, 1e-8) << i;
    EXPECT_NEAR(got.h[i], -delta - nu, 1e-7) << i;
  }
}

TEST(SkeletonTest, SamplesAreUniformInTheInteriorAndOfTheSeed) {
  SkeletonParameters p;
  p.sink_tokens = 10;
  p.local_tokens = 20;
  double queries = 0, keys = 0;
  std::set<std::pair<int64_t, int64_t>> corners;
  for (int64_t n = 0; n < 20000; ++n) {
    const SkeletonPair pair = SampleSkeletonPair(p, 130, 0, n);
    ASSERT_TRUE(pair.key >= 10 && pair.key <= pair.query - 20 && pair.query < 130);
    queries += static_cast<double>(pair.query) / 20000, keys += static_cast<double>(pair.key) / 20000;
    corners.insert({pair.query, pair.key});
  }
  EXPECT_NEAR(queries, 30 + 200.0 / 3 - 0.5, 0.7);  // the larger of two draws
  EXPECT_NEAR(keys, 10 + 100.0 / 3 - 0.5, 0.7);
  EXPECT_THAT(corners, Contains(std::make_pair(30, 10)));
  const auto first = [&](int32_t head) {
    std::vector<int64_t> values;
    for (int64_t n = 0; n < 8; ++n) values.push_back(SampleSkeletonPair(p, 130, head, n).query);
    return values;
  };
  const auto before = first(0);
  EXPECT_EQ(first(0), before);
  EXPECT_NE(first(1), before);
  p.seed = 2;
  EXPECT_NE(first(0), before);
}

// s is 0 at distance 330 alone: pairs of 64 that are 5 or 6 apart hold it, so tiles of 128 two or three
// apart.
TEST(SkeletonMaskTest, ADiagonalIsFoundWhereItIs) {
  SkeletonParameters p;
  p.sink_tokens = 0;
  p.local_tokens = 1;
  p.epsilon = 1e-20;  // tau about -48.8; half of the diagonal's block is enough
  SkeletonHead head;
  head.s.assign(1024, -90);
  head.s[330] = 0;
  head.v.assign(1024, 0);
  head.h.assign(1024, 0);

  SelectSkeletonBlocks(1024, p, &head);

  EXPECT_EQ(head.s_block[4], -90);
  EXPECT_EQ(head.s_block[5], -45);
  EXPECT_EQ(head.s_block[6], -45);
  EXPECT_EQ(head.s_block[7], -90);
  EXPECT_THAT(head.kept[7], ElementsAre(4, 5, 7));
  EXPECT_THAT(head.kept[2], ElementsAre(0, 2));
  EXPECT_THAT(head.kept[1], ElementsAre(1));  // distance 1 is not local here
}

TEST(SkeletonMaskTest, TheBestElementOfABlockCounts) {
  SkeletonParameters p;
  p.sink_tokens = 65;  // two blocks of 64
  p.local_tokens = 64;
  p.epsilon = 1e-4;  // tau about -12
  SkeletonHead head;
  head.s.assign(1000, 0);
  head.v.assign(1000, -60);
  head.h.assign(1000, -10);
  head.v[400] = 0;
  head.h[900] = 47.99;  // its row of blocks passes but for the sink columns' -60: -12.01

  SelectSkeletonBlocks(1000, p, &head);

  EXPECT_NEAR(head.tau, std::log(1e-4 * 64 / 1000), 1e-12);
  EXPECT_THAT(head.kept[6], ElementsAre(0, 3, 5, 6));
  EXPECT_THAT(head.kept[7], Not(Contains(2)));
  head.h[900] = head.tau + 60.01;
  SelectSkeletonBlocks(1000, p, &head);
  EXPECT_THAT(head.kept[7], ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_THAT(head.undecided[7], ElementsAre(1, 2, 4, 5));
  head.h[900] = head.tau + 59.99;
  SelectSkeletonBlocks(1000, p, &head);
  EXPECT_THAT(head.kept[7], ElementsAre(0, 3, 6, 7));
  EXPECT_THAT(head.undecided[7], ElementsAre(1, 2, 4, 5));
}

// The threshold under which a share of the pairs of blocks lies, put back into equation 14.
TEST(SkeletonMaskTest, ThresholdsOfAShareGoBackThroughEquation14) {
  const SkeletonSpread spread{-9, 1.5};
  for (const double dropped : {1e-6, 0.1, 0.5, 0.9, 0.999}) {
    const double z = (ThresholdOfShare(spread, dropped) + 9) / 1.5;
    EXPECT_NEAR(std::pow(std::erfc(-z / std::sqrt(2.0)) / 2, 64), dropped, 1e-9 * std::max(dropped, 1e-3));
  }
  EXPECT_EQ(ThresholdOfShare(spread, 0), -std::numeric_limits<double>::infinity());
  EXPECT_EQ(ThresholdOfShare(spread, 1), std::numeric_limits<double>::infinity());
}

// By the multiplicities of equation 12 on the interior, and those of its squares one by one.
TEST(SkeletonMaskTest, SpreadCountsEachElementOfTheInterior) {
  SkeletonParameters p;
  p.sink_tokens = 3;
  p.local_tokens = 5;
  SkeletonHead head;
  std::mt19937 generator(4);
  std::normal_distribution<double> normal;
  for (int i = 0; i < 50; ++i) {
    head.s.push_back(normal(generator)), head.v.push_back(normal(generator)),
        head.h.push_back(normal(generator));
  }
  double sum = 0, count = 0, squares = 0;
  for (size_t d = 5; d <= 46; ++d) sum += static_cast<double>(47 - d) * head.s[d];
  for (size_t j = 3; j <= 44; ++j) sum += static_cast<double>(45 - j) * head.v[j];
  for (size_t i = 8; i < 50; ++i)
    sum += static_cast<double>(i - 7) * head.h[i], count += static_cast<double>(i - 7);
  for (size_t d = 5; d <= 46; ++d) {
    for (size_t j = 3; j + d < 50; ++j) squares += std::pow(head.s[d] + head.v[j] + head.h[j + d], 2);
  }

  const SkeletonSpread spread = SpreadOfSkeleton(50, p, head);

  EXPECT_NEAR(spread.mean, sum / count, 1e-12);
  EXPECT_NEAR(spread.deviation, std::sqrt(squares / count - std::pow(sum / count, 2)), 1e-12);
}

TEST(SkeletonTest, ABudgetOfBlocksSetsTheThreshold) {
  Additive sums(1500, 1, 1);
  sums.parameters.sink_tokens = 64;
  sums.parameters.local_tokens = 64;
  sums.parameters.epsilon = 1e6;  // not looked at
  const auto blocks = [&](double budget) {
    sums.parameters.budget_blocks = budget;
    BlockIndex index;
    Trace(sums.c, sums.parameters, &index);
    return index.blocks.size();
  };

  const size_t forced = blocks(0.5);
  EXPECT_EQ(forced, 1u + 2 + 10 * 3);  // sinks, the tile before, its own
  EXPECT_GT(blocks(6), forced + 5);
  EXPECT_LT(blocks(6), blocks(9));
  EXPECT_EQ(blocks(24), 78u);  // all of 12 tiles
}

// Tokens 300 to 303 of KV head 1 draw every query: their block is kept by the heads that read it, no other
// is.
TEST(SkeletonTest, FindsAPlantedColumnInTheHeadsThatReadIt) {
  Additive sums(1500, 4, 2, 0.1f);
  // Dimension 13 is 3 in every query and 0 in every key.
  sums.c.SetK(300, 304, 1, 5 + Additive::kHalf, 3);
  BlockIndex index;
  const SkeletonTrace trace = Trace(sums.c, sums.parameters, &index);

  ASSERT_TRUE(ValidateBlockIndex(index).ok()) << ValidateBlockIndex(index).message();
  ASSERT_EQ(index.num_lists, 4);
  for (int32_t tile = 4; tile < 12; ++tile) {
    for (int32_t head = 0; head < 4; ++head) {
      const std::vector<int32_t> kept = BlocksOf(index, head, tile);
      EXPECT_EQ(std::count(kept.begin(), kept.end(), 2), head >= 2) << head << " " << tile;
      EXPECT_THAT(kept, Contains(0));
      EXPECT_THAT(kept, Contains(tile));
      EXPECT_EQ(kept, trace.heads[static_cast<size_t>(head)].kept[static_cast<size_t>(tile)]);
    }
  }
}

TEST(SkeletonTest, PromptsWithoutAnInteriorAreDense) {
  for (const int64_t tokens : {1, 128, 256}) {
    FlashCase c(tokens, 2, 1, 4);
    c.Randomize(1);
    BlockIndex index;
    const SkeletonTrace trace = Trace(c, {}, &index);
    EXPECT_TRUE(trace.dense && trace.heads.empty());
    EXPECT_THAT(index.dense, Each(1));
    EXPECT_EQ(index.dense.size(), static_cast<size_t>(2 * ((tokens + 127) / 128)));
    EXPECT_TRUE(ValidateBlockIndex(index).ok());
  }
}

// One row with one interior key: nothing to fit, and the row is exact.
TEST(SkeletonTest, OneInteriorKey) {
  FlashCase c(257, 1, 1, 4);
  c.Randomize(1);
  BlockIndex index;
  const SkeletonTrace trace = Trace(c, {}, &index);

  ASSERT_FALSE(trace.dense);
  EXPECT_THAT(trace.heads[0].s, Each(0.0));
  EXPECT_TRUE(ValidateBlockIndex(index).ok());
  double sum = 0;
  for (int64_t j = 0; j < 257; ++j) sum += std::exp(Logit(c.problem, 256, j, 0));
  EXPECT_NEAR(trace.heads[0].h[256], Logit(c.problem, 256, 128, 0) - std::log(sum), 1e-9);
  EXPECT_THAT(BlocksOf(index, 0, 1), ElementsAre(0, 1));
}

TEST(SkeletonTest, RefusesWhatIsOutOfRange) {
  const auto refusal = [](void (*spoil)(SkeletonParameters*), int32_t dim = 4) {
    FlashCase c(300, 1, 1, dim);
    SkeletonParameters parameters;
    spoil(&parameters);
    const Status status = SkeletonSelect(c.problem, parameters, nullptr, nullptr);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  using P = SkeletonParameters;
  EXPECT_THAT(refusal([](P* p) { p->sink_tokens = -1; }), HasSubstr("sink_tokens -1"));
  EXPECT_THAT(refusal([](P* p) { p->local_tokens = 0; }), HasSubstr("local_tokens 0"));
  EXPECT_THAT(refusal([](P* p) { p->samples_per_dim = 0; }), HasSubstr("samples_per_dim 0"));
  EXPECT_THAT(refusal([](P* p) { p->ridge = 0; }), HasSubstr("ridge 0"));
  EXPECT_THAT(refusal([](P* p) { p->ridge = std::nan(""); }), HasSubstr("ridge nan"));
  EXPECT_THAT(refusal([](P* p) { p->epsilon = 0; }), HasSubstr("epsilon 0"));
  EXPECT_THAT(refusal([](P* p) { p->budget_blocks = -1; }), HasSubstr("budget_blocks -1"));
  EXPECT_THAT(refusal([](P* p) { p->rope_base = 0.5; }), HasSubstr("rope_base 0.5"));
  EXPECT_THAT(refusal([](P* p) { p->frequencies = {1, -1}; }), HasSubstr("a frequency -1"));
  EXPECT_THAT(refusal([](P* p) { p->frequencies = {1}; }), HasSubstr("frequencies has 1 values, not 2"));
  EXPECT_THAT(refusal([](P*) {}, 5), HasSubstr("head_dim 5 is odd"));
}

}  // namespace
}  // namespace headwater::kernels::reference
