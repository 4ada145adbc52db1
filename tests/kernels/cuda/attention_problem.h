// A random attention problem of one sequence with its answer in double precision.
#ifndef HW_TESTS_KERNELS_CUDA_ATTENTION_PROBLEM_H_
#define HW_TESTS_KERNELS_CUDA_ATTENTION_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/attention.h"
#include "kernels/reference/block_stats.h"
#include "kernels/reference/mean_keys.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {

// bf16 rounding of P and of the output: 2.2e-3 seen, 4e-3 stated.
inline constexpr double kRelativeError = 4e-3;
inline constexpr double kLseError = 1e-4;
inline constexpr int kAligned = CudaAttentionArgs::kBottomRightAligned;

enum class Lists { kNone, kPerKvHead, kPerQueryHead };

struct Case {
  const char* name;
  int q_heads, kv_heads, head_dim, q_len, kv_len;
  int q_position = CudaAttentionArgs::kBottomRightAligned;
  Lists lists = Lists::kNone;
  bool f32 = false;
  bool corrected = false;  // by means
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Inputs, outputs and reference of one sequence.
struct Problem {
  Case c;
  int position, pack;
  std::vector<float> q, k, v;
  std::vector<int32_t> counts, blocks;
  std::vector<int64_t> offsets;
  std::vector<float> k_means, v_means;  // tables, with correction

  Problem(const Case& test_case, uint32_t seed) : c(test_case) {
    position = c.q_position == CudaAttentionArgs::kBottomRightAligned ? c.kv_len - c.q_len : c.q_position;
    q = RandomBf16(static_cast<size_t>(c.q_len) * c.q_heads * c.head_dim, seed);
    k = RandomBf16(static_cast<size_t>(c.kv_len) * c.kv_heads * c.head_dim, seed + 1);
    v = RandomBf16(k.size(), seed + 2);
    pack = c.lists == Lists::kPerQueryHead ? 1 : c.q_heads / c.kv_heads;
    if (c.lists != Lists::kNone) MakeLists(seed + 3);
    if (c.corrected) {
      k_means = Means(k);
      v_means = Means(v);
    }
  }

  std::vector<float> Means(const std::vector<float>& x) const {
    const std::vector<double> mean =
        reference::BlockStatistics(x.data(), c.kv_len, c.kv_heads, c.head_dim).mean;
    const std::vector<float> single(mean.begin(), mean.end());
    const std::vector<double> table = reference::MeanTable(single.data(), c.kv_len, c.kv_heads, c.head_dim);
    return ToFloat(ToBf16({table.begin(), table.end()}));
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
          if (kind == 2 || generator() % (c.corrected ? 12 : 3) == 0) {
            blocks.push_back(block);
            ++count;
          }
        }
        counts.push_back(count);
      }
    }
    blocks.push_back(0);  // never empty
  }

  size_t Segment(int head, int row) const {
    const int tiles = (c.q_len + TilePositions() - 1) / TilePositions();
    return static_cast<size_t>(head / pack) * tiles + row / TilePositions();
  }

  bool Selected(int head, int row, int key) const {
    if (c.lists == Lists::kNone) return true;
    const size_t segment = Segment(head, row);
    if (counts[segment] == -1) return true;
    const auto begin = blocks.begin() + offsets[segment];
    return std::binary_search(begin, begin + counts[segment], key / 128);
  }

  // What one row attends to: rows of k and v, and what is added to the score.
  struct Key {
    const float* k;
    const float* v;
    double gain;
  };

  std::vector<Key> Keys(int head, int row) const {
    const int d = c.head_dim, kv_head = head / (c.q_heads / c.kv_heads);
    const int visible = std::max(0, std::min(c.kv_len, row + position + 1));
    std::vector<Key> keys;
    for (int key = 0; key < visible; ++key) {
      const size_t at = (static_cast<size_t>(key) * c.kv_heads + kv_head) * d;
      if (Selected(head, row, key)) keys.push_back({&k[at], &v[at], 0});
    }
    if (!c.corrected || counts[Segment(head, row)] <= 0) return keys;
    const int first_row = row / TilePositions() * TilePositions();
    const int complete = std::max(0, std::min(c.kv_len, first_row + position + 1)) / 128;
    const auto begin = blocks.begin() + offsets[Segment(head, row)];
    const size_t rows = k_means.size() / (static_cast<size_t>(c.kv_heads) * d);
    for (const reference::MeanKey& mean :
         reference::MeanKeys({begin, begin + counts[Segment(head, row)]}, complete, c.kv_len)) {
      const size_t at = (static_cast<size_t>(kv_head) * rows + mean.table_row) * d;
      keys.push_back({&k_means[at], &v_means[at], std::log(static_cast<double>(mean.tokens))});
    }
    return keys;
  }

  // out and lse in double; a row without keys: 0 and -infinity.
  void Reference(std::vector<double>* out, std::vector<double>* lse) const {
    const int d = c.head_dim;
    out->assign(q.size(), 0);
    lse->assign(static_cast<size_t>(c.q_len) * c.q_heads, -std::numeric_limits<double>::infinity());
#pragma omp parallel for
    for (int row = 0; row < c.q_len; ++row) {
      for (int head = 0; head < c.q_heads; ++head) {
        const size_t at = static_cast<size_t>(row) * c.q_heads + head;
        const std::vector<Key> keys = Keys(head, row);
        if (!keys.empty()) (*lse)[at] = Attend(&q[at * d], keys, &(*out)[at * d]);
      }
    }
  }

  // The log of the sum.
  double Attend(const float* query, const std::vector<Key>& keys, double* out) const {
    const int d = c.head_dim;
    std::vector<double> score(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      double dot = 0;
      for (int j = 0; j < d; ++j) dot += static_cast<double>(query[j]) * keys[i].k[j];
      score[i] = dot / std::sqrt(d) + keys[i].gain;
    }
    const double top = *std::max_element(score.begin(), score.end());
    double sum = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      const double weight = std::exp(score[i] - top);
      sum += weight;
      for (int j = 0; j < d; ++j) out[j] += weight * keys[i].v[j];
    }
    for (int j = 0; j < d; ++j) out[j] /= sum;
    return top + std::log(sum);
  }
};

inline double RelativeError(const std::vector<float>& out, const std::vector<double>& wanted) {
  double error = 0, size = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double difference = out[i] - wanted[i];
    error += difference * difference;
    size += wanted[i] * wanted[i];
  }
  // All zero: every element must be.
  return size == 0 ? error : std::sqrt(error / size);
}

// A problem's arrays on the device, and the call that works on them.
struct DeviceProblem {
  DeviceArray<uint16_t> q, k, v, k_means, v_means, out;
  DeviceArray<float> out_f32, lse;
  DeviceArray<int32_t> counts, blocks;
  DeviceArray<int64_t> offsets;
  CudaAttentionArgs args;

  explicit DeviceProblem(const Problem& problem)
      : q(ToBf16(problem.q)),
        k(ToBf16(problem.k)),
        v(ToBf16(problem.v)),
        k_means(ToBf16(problem.k_means)),
        v_means(ToBf16(problem.v_means)),
        out(problem.q.size()),
        out_f32(problem.q.size()),
        lse(static_cast<size_t>(problem.c.q_len) * problem.c.q_heads),
        counts(problem.counts),
        blocks(problem.blocks),
        offsets(problem.offsets) {
    const Case& c = problem.c;
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
    if (c.corrected) args.correction = {k_means.data(), v_means.data()};
  }

  Status Run() const {
    DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));
    HW_KERNELS_RETURN_IF_ERROR(CudaAttention(args, workspace.data(), workspace.size(), nullptr));
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(workspace.Intact());
    return {};
  }

  std::vector<float> Out() const { return args.out == nullptr ? out_f32.Host() : ToFloat(out.Host()); }
  bool Intact() const { return out.Intact() && out_f32.Intact() && lse.Intact(); }
};

inline void ExpectLse(const std::vector<float>& got, const std::vector<double>& wanted) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(wanted[i])) {
      ASSERT_EQ(got[i], -std::numeric_limits<float>::infinity()) << "row " << i;
    } else {
      ASSERT_NEAR(got[i], wanted[i], kLseError) << "row " << i;
    }
  }
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_ATTENTION_PROBLEM_H_
