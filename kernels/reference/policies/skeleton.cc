#include "kernels/reference/policies/skeleton.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "kernels/reference/policies/common.h"
#include "kernels/reference/policies/skeleton_mask.h"

namespace headwater::kernels::reference {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

using Rows = std::vector<std::vector<double>>;  // [num_tokens][head_dim]

double Dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

std::vector<double> Minus(const std::vector<double>& x, const std::vector<double>& y) {
  std::vector<double> difference(x);
  for (size_t i = 0; i < x.size(); ++i) difference[i] -= y[i];
  return difference;
}

double Logit(const PolicyProblem& p, int64_t query, int64_t key, int32_t head) {
  const float *q = p.Q(query, head), *k = p.K(key, head);
  double dot = 0;
  for (int32_t i = 0; i < p.head_dim; ++i) dot += static_cast<double>(q[i]) * k[i];
  return dot * p.softmax_scale;
}

std::vector<double> Frequencies(const SkeletonParameters& a, int32_t dim) {
  if (!a.frequencies.empty()) return a.frequencies;
  std::vector<double> theta;
  for (int32_t m = 0; m < dim / 2; ++m) theta.push_back(std::pow(a.rope_base, -2.0 * m / dim));
  return theta;
}

// r_-D for every distance D.
Rows DistanceFeatures(const std::vector<double>& theta, int64_t num_tokens) {
  Rows features;
  for (int64_t distance = 0; distance < num_tokens; ++distance) {
    std::vector<double> row;
    for (const double t : theta) row.push_back(std::cos(static_cast<double>(-distance) * t));
    for (const double t : theta) row.push_back(std::sin(static_cast<double>(-distance) * t));
    features.push_back(std::move(row));
  }
  return features;
}

// Keys of the head that query head `head` reads, rotated back.
Rows KeysBeforeRotation(const PolicyProblem& p, const std::vector<double>& theta, int32_t head) {
  Rows keys;
  const size_t half = theta.size();
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const float* k = p.K(token, head);
    std::vector<double> row(2 * half);
    for (size_t m = 0; m < half; ++m) {
      const double c = std::cos(static_cast<double>(token) * theta[m]);
      const double s = std::sin(static_cast<double>(token) * theta[m]);
      row[m] = k[m] * c + k[m + half] * s;
      row[m + half] = k[m + half] * c - k[m] * s;
    }
    keys.push_back(std::move(row));
  }
  return keys;
}

// Row i: the mean of rows [first, i - skip]; empty where there are none.
Rows RunningMeans(const Rows& rows, int64_t first, int64_t skip) {
  Rows means(rows.size());
  std::vector<double> sum(rows[0].size(), 0);
  for (int64_t i = first + skip; i < static_cast<int64_t>(rows.size()); ++i) {
    const auto count = static_cast<double>(i - skip - first + 1);
    std::vector<double>& mean = means[static_cast<size_t>(i)];
    for (size_t m = 0; m < sum.size(); ++m) {
      sum[m] += rows[static_cast<size_t>(i - skip)][m];
      mean.push_back(sum[m] / count);
    }
  }
  return means;
}

// mu and sigma of each row's interior logits, from running sums of k and of k k^T.
void RowStatistics(const PolicyProblem& p, const SkeletonParameters& a, int32_t head, SkeletonHead* out) {
  const int32_t dim = p.head_dim;
  std::vector<double> sum(static_cast<size_t>(dim), 0), gram(static_cast<size_t>(dim) * dim, 0);
  out->mu.assign(static_cast<size_t>(p.num_tokens), 0);
  out->sigma = out->mu;
  for (int64_t i = a.sink_tokens + a.local_tokens; i < p.num_tokens; ++i) {
    const float *k = p.K(i - a.local_tokens, head), *q = p.Q(i, head);
    const auto count = static_cast<double>(i - a.local_tokens - a.sink_tokens + 1);
    double first = 0, second = 0;
    for (int32_t m = 0; m < dim; ++m) {
      sum[static_cast<size_t>(m)] += k[m];
      first += q[m] * sum[static_cast<size_t>(m)];
      for (int32_t n = 0; n < dim; ++n) {
        double& entry = gram[static_cast<size_t>(m) * dim + n];
        entry += static_cast<double>(k[m]) * k[n];
        second += static_cast<double>(q[m]) * q[n] * entry;
      }
    }
    const double mean = p.softmax_scale * first / count;
    const double square = p.softmax_scale * p.softmax_scale * second / count;
    out->mu[static_cast<size_t>(i)] = mean;
    out->sigma[static_cast<size_t>(i)] = std::sqrt(std::max(0.0, square - mean * mean));
  }
}

// Solves a x = b for a symmetric positive definite a [b.size()][b.size()], by Cholesky.
std::vector<double> Solve(Rows a, std::vector<double> b) {
  const size_t n = b.size();
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      double rest = a[i][j];
      for (size_t m = 0; m < j; ++m) rest -= a[i][m] * a[j][m];
      a[i][j] = i == j ? std::sqrt(rest) : rest / a[j][j];
    }
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t m = 0; m < i; ++m) b[i] -= a[i][m] * b[m];
    b[i] /= a[i][i];
  }
  for (size_t i = n; i-- > 0;) {
    for (size_t m = i + 1; m < n; ++m) b[i] -= a[m][i] * b[m];
    b[i] /= a[i][i];
  }
  return b;
}

struct Model {
  Rows features, feature_means;  // by distance; by row
  Rows keys, key_means;          // by token; by row
};

void Fit(const PolicyProblem& p, const SkeletonParameters& a, const Model& model, int32_t head,
         SkeletonHead* out) {
  const auto dim = static_cast<size_t>(p.head_dim);
  Rows gram(2 * dim, std::vector<double>(2 * dim, 0));
  std::vector<double> target(2 * dim, 0);
  for (int64_t n = 0; n < static_cast<int64_t>(a.samples_per_dim) * p.head_dim; ++n) {
    const SkeletonPair pair = SampleSkeletonPair(a, p.num_tokens, head, n);
    const auto i = static_cast<size_t>(pair.query), j = static_cast<size_t>(pair.key);
    std::vector<double> row = Minus(model.features[i - j], model.feature_means[i]);
    const std::vector<double> key = Minus(model.keys[j], model.key_means[i]);
    row.insert(row.end(), key.begin(), key.end());
    const double b = Logit(p, pair.query, pair.key, head) - out->mu[i];
    for (size_t m = 0; m < 2 * dim; ++m) {
      target[m] += row[m] * b;
      for (size_t l = 0; l < 2 * dim; ++l) gram[m][l] += row[m] * row[l];
    }
  }
  double squares = 0;
  for (size_t m = 0; m < 2 * dim; ++m) squares += gram[m][m];
  for (size_t m = 0; m < 2 * dim; ++m) gram[m][m] += a.ridge * a.ridge * squares / 4;
  // No pair differs from its row's mean: every row has one interior key.
  const std::vector<double> x = squares > 0 ? Solve(gram, target) : target;
  out->alpha.assign(x.begin(), x.begin() + p.head_dim);
  out->kappa.assign(x.begin() + p.head_dim, x.end());
}

void SlashAndVertical(const Model& model, const SkeletonParameters& a, SkeletonHead* out) {
  const size_t num_tokens = model.keys.size();
  for (size_t t = 0; t < num_tokens; ++t) {
    out->s.push_back(Dot(Minus(model.features[t], model.feature_means.back()), out->alpha));
    out->v.push_back(Dot(Minus(model.keys[t], model.key_means.back()), out->kappa));
  }
  out->delta.assign(num_tokens, 0);
  double sum = 0;
  for (int64_t i = a.sink_tokens + a.local_tokens; i < static_cast<int64_t>(num_tokens); ++i) {
    sum += out->s[static_cast<size_t>(i - a.sink_tokens)] + out->v[static_cast<size_t>(i - a.local_tokens)];
    out->delta[static_cast<size_t>(i)] = sum / static_cast<double>(i - a.sink_tokens - a.local_tokens + 1);
  }
}

void Horizontal(const PolicyProblem& p, const SkeletonParameters& a, int32_t head, SkeletonHead* out) {
  const int64_t sinks = a.sink_tokens, local = a.local_tokens, last = p.num_tokens - 1;
  double most = kNothing, sum = 0;
  for (int64_t j = sinks; j <= last - local; ++j) most = std::max(most, Logit(p, last, j, head));
  for (int64_t j = sinks; j <= last - local; ++j) sum += std::exp(Logit(p, last, j, head) - most);
  const auto interior = static_cast<double>(last - local - sinks + 1);
  out->zeta =
      out->mu.back() + out->sigma.back() * out->sigma.back() / 2 + std::log(interior) - most - std::log(sum);
  out->lambda.assign(static_cast<size_t>(p.num_tokens), 0);
  out->nu = out->lambda;
  out->h.assign(static_cast<size_t>(p.num_tokens), kNothing);
  for (int64_t row = sinks + local; row <= last; ++row) {
    const auto i = static_cast<size_t>(row);
    for (int64_t j = 0; j < sinks; ++j) out->lambda[i] += std::exp(Logit(p, row, j, head) - out->mu[i]);
    for (int64_t j = row - local + 1; j <= row; ++j) {
      out->lambda[i] += std::exp(Logit(p, row, j, head) - out->mu[i]);
    }
    const auto count = static_cast<double>(row - local - sinks + 1);
    out->nu[i] = std::log(out->lambda[i] + count * std::exp(out->sigma[i] * out->sigma[i] / 2 - out->zeta));
    out->h[i] = -out->delta[i] - out->nu[i];
  }
}

uint64_t SplitMix64(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

Status CheckAll(const PolicyProblem& p, const SkeletonParameters& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckSkeletonParameters(a));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyProblem(p));
  if (p.head_dim % 2 != 0) return InvalidArgument("head_dim " + std::to_string(p.head_dim) + " is odd");
  if (!a.frequencies.empty() && a.frequencies.size() != static_cast<size_t>(p.head_dim / 2)) {
    return InvalidArgument("frequencies has " + std::to_string(a.frequencies.size()) + " values, not " +
                           std::to_string(p.head_dim / 2) + ", half of head_dim");
  }
  return {};
}

}  // namespace

Status CheckSkeletonParameters(const SkeletonParameters& a) {
  constexpr int64_t kMost = 1 << 20;
  constexpr double kSmallest = std::numeric_limits<double>::min();
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_tokens", a.sink_tokens, 0, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("local_tokens", a.local_tokens, 1, kMost));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("samples_per_dim", a.samples_per_dim, 1, 1 << 16));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("ridge", a.ridge, 1e-9, 1));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("epsilon", a.epsilon, kSmallest, 1e6));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("budget_blocks", a.budget_blocks, 0, static_cast<double>(1LL << 40)));
  HW_KERNELS_RETURN_IF_ERROR(CheckReal("rope_base", a.rope_base, 1, 1e12));
  for (const double theta : a.frequencies) {
    HW_KERNELS_RETURN_IF_ERROR(CheckReal("a frequency", theta, 0, 1e3));
  }
  return {};
}

SkeletonPair SampleSkeletonPair(const SkeletonParameters& a, int64_t num_tokens, int32_t head, int64_t n) {
  const int64_t sinks = a.sink_tokens, local = a.local_tokens;
  const uint64_t state = a.seed + (static_cast<uint64_t>(head) << 40) + 2 * static_cast<uint64_t>(n);
  const auto draw = [&](uint64_t counter) {
    const auto range = static_cast<unsigned __int128>(num_tokens - sinks - local);
    return static_cast<int64_t>((SplitMix64(counter) * range) >> 64);
  };
  const int64_t x = draw(state), y = draw(state + 1);
  return {sinks + local + std::max(x, y), sinks + std::min(x, y)};
}

Status SkeletonSelect(const PolicyProblem& p, const SkeletonParameters& a, SkeletonTrace* trace,
                      BlockIndex* index) {
  HW_KERNELS_RETURN_IF_ERROR(CheckAll(p, a));
  SkeletonTrace stages;
  stages.dense = p.num_tokens <= static_cast<int64_t>(a.sink_tokens) + a.local_tokens;
  if (!stages.dense) {
    const std::vector<double> theta = Frequencies(a, p.head_dim);
    Model model;
    model.features = DistanceFeatures(theta, p.num_tokens);
    // Distances T to i - S.
    model.feature_means = RunningMeans(model.features, a.local_tokens, a.sink_tokens);
    for (int32_t head = 0; head < p.num_q_heads; ++head) {
      if (head % (p.num_q_heads / p.num_kv_heads) == 0) {
        model.keys = KeysBeforeRotation(p, theta, head);
        model.key_means = RunningMeans(model.keys, a.sink_tokens, a.local_tokens);
      }
      SkeletonHead out;
      RowStatistics(p, a, head, &out);
      Fit(p, a, model, head, &out);
      SlashAndVertical(model, a, &out);
      Horizontal(p, a, head, &out);
      SelectSkeletonBlocks(p.num_tokens, a, &out);
      stages.heads.push_back(std::move(out));
    }
  }
  if (index != nullptr) *index = SkeletonIndex(p, stages);
  if (trace != nullptr) *trace = std::move(stages);
  return {};
}

}  // namespace headwater::kernels::reference
