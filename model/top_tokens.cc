#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "model/model.h"

namespace headwater {
namespace {

// Ranks NaN below everything: a comparison that is not an order would break the sort.
float RankOf(float logit) { return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit; }

}  // namespace

std::vector<TokenScore> TopTokens(absl::Span<const float> logits, int count) {
  const size_t wanted = std::min(logits.size(), static_cast<size_t>(std::max(count, 0)));
  if (wanted == 0) return {};
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto better = [logits](int32_t a, int32_t b) {
    const float rank_a = RankOf(logits[static_cast<size_t>(a)]);
    const float rank_b = RankOf(logits[static_cast<size_t>(b)]);
    return rank_a != rank_b ? rank_a > rank_b : a < b;
  };
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(wanted), order.end(), better);

  const double most = logits[static_cast<size_t>(order.front())];
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - most);
  const double log_sum = std::log(sum);
  std::vector<TokenScore> best;
  for (size_t i = 0; i < wanted; ++i) {
    const float logit = logits[static_cast<size_t>(order[i])];
    best.push_back({order[i], logit, static_cast<float>(logit - most - log_sum)});
  }
  return best;
}

}  // namespace headwater
