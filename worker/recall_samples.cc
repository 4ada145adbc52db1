#include "worker/recall_samples.h"

#include <algorithm>
#include <cmath>

namespace headwater {
namespace {

constexpr int32_t kLeastRows = 8;
constexpr int32_t kPairsOfATile = 128;  // (row, head) that the measurement computes at once

// SplitMix64 (Steele et al., OOPSLA 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// FNV-1a.
uint64_t Hash(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace

std::vector<int64_t> SampleRows(const std::string& request_id, int32_t layer, int64_t num_tokens,
                                int32_t count) {
  const int64_t rows = std::min<int64_t>(count, num_tokens);
  const uint64_t seed = Mix(Hash(request_id) + static_cast<uint64_t>(layer));
  std::vector<int64_t> positions;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * num_tokens / rows, end = (row + 1) * num_tokens / rows;
    const uint64_t draw = Mix(seed + static_cast<uint64_t>(row));
    positions.push_back(begin + static_cast<int64_t>(draw % static_cast<uint64_t>(end - begin)));
  }
  return positions;
}

RecallEstimate EstimateRecall(absl::Span<const float> recalls, int32_t heads, int32_t first, int32_t count) {
  const size_t rows = recalls.size() / static_cast<size_t>(heads);
  if (rows == 0 || count == 0) return {};
  std::vector<float> values;
  double sum = 0, squares = 0;
  for (size_t row = 0; row < rows; ++row) {
    double of_row = 0;
    for (int32_t head = first; head < first + count; ++head) {
      const float recall = recalls[row * static_cast<size_t>(heads) + static_cast<size_t>(head)];
      values.push_back(recall);
      of_row += recall;
    }
    of_row /= count;
    sum += of_row;
    squares += of_row * of_row;
  }
  const auto n = static_cast<double>(rows);
  RecallEstimate estimate;
  estimate.mean = sum / n;
  estimate.p1 = FirstPercentile(std::move(values));
  if (rows > 1) {
    const double variance = std::max(0.0, (squares - sum * sum / n) / (n - 1));
    estimate.error = std::sqrt(variance / n);
  }
  return estimate;
}

double FirstPercentile(std::vector<float> values) {
  if (values.empty()) return 1;
  const auto rank = static_cast<int64_t>(std::ceil(0.01 * static_cast<double>(values.size()))) - 1;
  const auto at = values.begin() + std::max<int64_t>(0, rank);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

int32_t AffordableRows(int64_t num_tokens, double density, double share, int32_t pack, int32_t most) {
  // A tile of (row, head) pairs against all keys takes about as long as attention's tile does: twice the
  // average tile's time at density 1. Half a tile costs as much as a whole one.
  const double tiles = share * density * static_cast<double>(num_tokens) * pack / kPairsOfATile / 2;
  const int32_t rows_of_a_tile = std::max(1, kPairsOfATile / pack);
  const double rows = std::min(std::floor(tiles), 1e6) * rows_of_a_tile;
  const auto affordable = static_cast<int32_t>(std::min(rows, static_cast<double>(most)));
  return affordable < kLeastRows ? 0 : affordable;
}

}  // namespace headwater
