// The stages of vertical-slash on the GPU, and what a host sees of them.
#ifndef HW_TESTS_KERNELS_CUDA_VERTICAL_SLASH_STAGES_H_
#define HW_TESTS_KERNELS_CUDA_VERTICAL_SLASH_STAGES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/policies/tail_profile.h"
#include "kernels/cuda/policies/vertical_slash_stages.h"
#include "tests/kernels/cuda/range_problem.h"

namespace headwater::kernels {

using reference::VerticalSlashParameters;
using reference::VerticalSlashRows;

inline VerticalSlashParameters Budget(int64_t vertical, int64_t slash, int64_t forced_verticals = 30,
                                      int64_t forced_locals = 100, int64_t last_q = 64) {
  return {{{vertical, slash}}, last_q, forced_verticals, forced_locals, 1, 1};
}

struct Stages {
  VerticalSlashParameters parameters;
  int heads, tokens, tiles;
  DeviceArray<float> vertical, slash;
  DeviceArray<int32_t> columns, totals;
  DeviceArray<CudaDistanceWord> words;
  DeviceArray<int32_t> range_counts, column_counts, key_columns;
  DeviceArray<int64_t> range_offsets, column_offsets;
  DeviceArray<CudaKeyRange> ranges;
  DeviceArray<uint64_t> visited;
  DeviceArray<uint32_t> overflows;
  int64_t stride;

  Stages(const VerticalSlashParameters& p, int num_heads, int num_tokens, size_t capacity)
      : parameters(p),
        heads(num_heads),
        tokens(num_tokens),
        tiles(static_cast<int>(CudaRangeTiles(num_tokens))),
        vertical(size_t{1} * heads * tokens),
        slash(vertical.size()),
        columns(size_t{1} * heads * tokens),
        totals(heads),
        words(heads * CudaDistanceWords(tokens)),
        range_counts(size_t{1} * heads * tiles),
        column_counts(range_counts.size()),
        key_columns(capacity),
        range_offsets(range_counts.size()),
        column_offsets(range_counts.size()),
        ranges(capacity),
        visited(1),
        overflows(1),
        stride(tokens) {}

  CudaChosen Chosen() const { return {columns.data(), totals.data(), words.data(), stride}; }
  Status Choose() const {
    return CudaChooseVerticalSlash(parameters, {vertical.data(), slash.data(), tokens, heads, Chosen()},
                                   nullptr);
  }
  Status Merge() const {
    return CudaMergeVerticalSlash(
        {Chosen(), tokens, heads, range_counts.data(), range_offsets.data(), ranges.data(),
         column_counts.data(), column_offsets.data(), key_columns.data(), static_cast<int64_t>(ranges.size()),
         static_cast<int64_t>(key_columns.size()), visited.data(), overflows.data()},
        nullptr);
  }
  CudaTailProfileArgs ProfileArgs(const Shape& s, const void* q, const void* k) const {
    return {q,
            k,
            tokens,
            s.q_heads,
            s.kv_heads,
            s.head_dim,
            static_cast<int32_t>(std::min<int64_t>(parameters.last_q, tokens)),
            s.Policy().softmax_scale,
            1,
            vertical.data(),
            slash.data()};
  }
  Status Profile(const RangeProblem& problem) const {
    const Shape& s = problem.shape;
    const CudaTailProfileArgs args = ProfileArgs(s, problem.dq.data(), problem.dk.data());
    DeviceArray<char> workspace(CudaTailProfileWorkspaceBytes(args));
    const Status status = CudaTailProfile(args, workspace.data(), workspace.size(), nullptr);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(workspace.Intact());
    return status;
  }
  bool Intact() const {
    return vertical.Intact() && slash.Intact() && columns.Intact() && totals.Intact() && words.Intact() &&
           range_counts.Intact() && column_counts.Intact() && key_columns.Intact() &&
           range_offsets.Intact() && column_offsets.Intact() && ranges.Intact() && visited.Intact() &&
           overflows.Intact();
  }

  std::vector<int64_t> Columns(int head) const {
    const std::vector<int32_t> all = columns.Host();
    const auto begin = all.begin() + head * stride;
    return {begin, begin + totals.Host()[head]};
  }
  // Ascending; `before` is checked.
  std::vector<int64_t> Distances(int head) const {
    const std::vector<CudaDistanceWord> all = words.Host();
    const int64_t count = CudaDistanceWords(tokens);
    std::vector<int64_t> distances;
    for (int64_t w = 0; w < count; ++w) {
      const CudaDistanceWord word = all[head * count + w];
      EXPECT_EQ(word.before, distances.empty() ? -1 : distances.back()) << "word " << w;
      for (int bit = 0; bit < 32; ++bit) {
        if ((word.bits >> bit & 1) != 0) distances.push_back(32 * w + bit);
      }
    }
    return distances;
  }
};

// The lists of every (head, tile).
inline std::vector<VerticalSlashRows> HostLists(const Stages& s) {
  const std::vector<int32_t> range_counts = s.range_counts.Host(), column_counts = s.column_counts.Host(),
                             columns = s.key_columns.Host();
  const std::vector<int64_t> range_offsets = s.range_offsets.Host(), column_offsets = s.column_offsets.Host();
  const std::vector<CudaKeyRange> ranges = s.ranges.Host();
  std::vector<VerticalSlashRows> lists(range_counts.size());
  for (size_t i = 0; i < lists.size(); ++i) {
    for (int n = 0; n < range_counts[i]; ++n) {
      lists[i].ranges.push_back({ranges[range_offsets[i] + n].begin, ranges[range_offsets[i] + n].end});
    }
    const auto begin = columns.begin() + column_offsets[i];
    lists[i].columns.assign(begin, begin + column_counts[i]);
  }
  return lists;
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_VERTICAL_SLASH_STAGES_H_
