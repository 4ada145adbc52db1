// CudaTopShareRule in obvious steps, for tests.
#ifndef HW_TESTS_KERNELS_CUDA_TOP_SHARE_H_
#define HW_TESTS_KERNELS_CUDA_TOP_SHARE_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cuda/top_share.h"

namespace headwater::kernels {

struct TopShare {
  std::vector<bool> kept;
  // Blocks that rounding may decide either way: their score is within `near` of the last kept one's, or of
  // one that the mass before it puts within `near` of the wanted mass. Both `near` are shares of the total.
  std::vector<bool> undecided;
};

// `scores` are a row's up to its own block.
inline TopShare TopShareOf(const std::vector<double>& scores, double share, CudaTopShareRule rule,
                           double near = 0) {
  const bool ends = rule == CudaTopShareRule::kWithFirstAndOwn;
  const auto size = static_cast<int32_t>(scores.size());
  const double total = std::accumulate(scores.begin(), scores.end(), 0.0), margin = near * total;
  const double wanted = ends ? share * total : share;
  TopShare top{std::vector<bool>(size), std::vector<bool>(size)};
  std::vector<int32_t> others;
  double mass = 0;
  for (int32_t i = 0; i < size; ++i) {
    if (ends && (i == 0 || i == size - 1)) {
      top.kept[i] = true;
      mass += scores[i];
    } else {
      others.push_back(i);
    }
  }
  std::stable_sort(others.begin(), others.end(), [&](int32_t x, int32_t y) { return scores[x] > scores[y]; });
  double least = std::numeric_limits<double>::infinity(), most = -least;
  const auto boundary = [&](double score) {
    least = std::min(least, score);
    most = std::max(most, score);
  };
  double last = -1;
  for (const int32_t i : others) {
    if (near > 0 && std::abs(mass - wanted) <= margin) boundary(scores[i]);
    if (mass < wanted) {
      top.kept[i] = true;
      last = scores[i];
    }
    mass += scores[i];
  }
  if (last >= 0) boundary(last);
  for (const int32_t i : others) {
    top.undecided[i] = near > 0 && scores[i] >= least - margin && scores[i] <= most + margin;
  }
  return top;
}

// Whether bit `block` of a row's words is set.
inline bool BitOf(const std::vector<uint32_t>& words, size_t first_word, int64_t block) {
  return (words[first_word + block / 32] >> block % 32 & 1) != 0;
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_TOP_SHARE_H_
