#include "kernels/reference/policies/vertical_slash.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/reference/dot.h"
#include "kernels/reference/policies/common.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kRows = kVerticalSlashRows;
constexpr int64_t kMaxPatternTokens = int64_t{1} << 22;

Status CheckParameters(const VerticalSlashParameters& p, int32_t num_q_heads) {
  HW_KERNELS_RETURN_IF_ERROR(CheckPerHead("budgets", static_cast<int64_t>(p.budgets.size()), num_q_heads));
  for (const VerticalSlashBudget& budget : p.budgets) {
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("n_vertical", budget.n_vertical, 1, kMaxPatternTokens));
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("n_slash", budget.n_slash, 1, kMaxPatternTokens));
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("last_q", p.last_q, 1, kMaxPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("forced_verticals", p.forced_verticals, 0, kMaxPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("forced_locals", p.forced_locals, 1, kMaxPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("least_verticals", p.least_verticals, 1, kMaxPatternTokens));
  return CheckRange("least_slashes", p.least_slashes, 1, kMaxPatternTokens);
}

// Softmax of one query over `keys`.
std::vector<double> Weights(const PolicyProblem& problem, int32_t head, int64_t query,
                            const std::vector<int64_t>& keys) {
  std::vector<double> weights;
  double top = -INFINITY, sum = 0;
  for (const int64_t key : keys) {
    weights.push_back(Dot(problem.Q(query, head), problem.K(key, head), problem.head_dim) *
                      problem.softmax_scale);
    top = std::max(top, weights.back());
  }
  for (double& weight : weights) sum += weight = std::exp(weight - top);
  for (double& weight : weights) weight /= sum;
  return weights;
}

// Sums the last rows by column and by distance.
void SumLastRows(const PolicyProblem& problem, int32_t head, int64_t last_q, VerticalSlashHead* stages) {
  stages->vertical.assign(problem.num_tokens, 0);
  stages->slash.assign(problem.num_tokens, 0);
  for (int64_t query = std::max<int64_t>(problem.num_tokens - last_q, 0); query < problem.num_tokens;
       ++query) {
    std::vector<int64_t> keys(query + 1);
    std::iota(keys.begin(), keys.end(), 0);
    const std::vector<double> weights = Weights(problem, head, query, keys);
    for (const int64_t key : keys) {
      stages->vertical[key] += weights[key];
      stages->slash[query - key] += weights[key];
    }
  }
}

// The numbers under `forced`, then those of the largest sums, of equal sums the lower number; `count` of
// them, ascending.
std::vector<int64_t> Choose(const std::vector<double>& sums, int64_t forced, int64_t count) {
  std::vector<int64_t> order(sums.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    if (x < forced || y < forced || sums[x] == sums[y]) return x < y;
    return sums[x] > sums[y];
  });
  order.resize(std::min<int64_t>(count, static_cast<int64_t>(sums.size())));
  std::sort(order.begin(), order.end());
  return order;
}

// Blocks of which a row of the tile reads a key.
std::vector<int32_t> BlocksOfTile(const VerticalSlashHead& head, int64_t tile, int64_t num_tokens) {
  std::vector<char> listed(tile + 1, 0);
  const int64_t per_tile = kQueryTileTokens / kRows;
  for (int64_t block = tile * per_tile; block < (tile + 1) * per_tile; ++block) {
    if (block * kRows >= num_tokens) break;
    const int64_t seen = std::min((block + 1) * kRows, num_tokens);
    for (const KeyRange& range : head.rows[block].ranges) {
      for (int64_t key = range.begin; key < std::min(range.end, seen); ++key)
        listed[key / kKeyBlockTokens] = 1;
    }
    for (const int64_t column : head.rows[block].columns) listed[column / kKeyBlockTokens] = 1;
  }
  std::vector<int32_t> blocks;
  for (int64_t block = 0; block <= tile; ++block) {
    if (listed[block] != 0) blocks.push_back(static_cast<int32_t>(block));
  }
  return blocks;
}

bool InARange(const VerticalSlashRows& rows, int64_t key) {
  return std::any_of(rows.ranges.begin(), rows.ranges.end(),
                     [&](const KeyRange& range) { return key >= range.begin && key < range.end; });
}

}  // namespace

VerticalSlashRows MergeVerticalSlash(const std::vector<int64_t>& columns,
                                     const std::vector<int64_t>& distances, int64_t first_row) {
  VerticalSlashRows rows;
  for (const int64_t distance : distances) {
    if (distance >= first_row + kRows) continue;
    const int64_t end = std::max(first_row + kRows - distance, kRows);
    if (rows.ranges.empty() || end > rows.ranges.back().end + kRows) {
      rows.ranges.push_back({end - kRows, end});
    } else if (end > rows.ranges.back().end) {
      rows.ranges.back().end += kRows;
    }
  }
  for (const int64_t column : columns) {
    if (column < first_row && !InARange(rows, column)) rows.columns.push_back(column);
  }
  return rows;
}

Status SelectVerticalSlash(const PolicyProblem& problem, const VerticalSlashParameters& parameters,
                           VerticalSlashTrace* trace, BlockIndex* index) {
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyProblem(problem));
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters, problem.num_q_heads));
  *trace = VerticalSlashTrace{problem.num_tokens, {}};
  std::vector<std::vector<std::vector<int32_t>>> lists;
  for (int32_t h = 0; h < problem.num_q_heads; ++h) {
    VerticalSlashHead head;
    SumLastRows(problem, h, parameters.last_q, &head);
    const VerticalSlashBudget& budget = parameters.budgets[parameters.budgets.size() == 1 ? 0 : h];
    head.columns = Choose(head.vertical, parameters.forced_verticals,
                          std::max(budget.n_vertical, parameters.least_verticals));
    head.distances =
        Choose(head.slash, parameters.forced_locals, std::max(budget.n_slash, parameters.least_slashes));
    std::reverse(head.distances.begin(), head.distances.end());
    for (int64_t row = 0; row < problem.num_tokens; row += kRows) {
      head.rows.push_back(MergeVerticalSlash(head.columns, head.distances, row));
    }
    lists.emplace_back();
    for (int64_t tile = 0; tile * kQueryTileTokens < problem.num_tokens; ++tile) {
      lists.back().push_back(BlocksOfTile(head, tile, problem.num_tokens));
    }
    trace->heads.push_back(std::move(head));
  }
  *index = IndexOfLists(lists);
  return {};
}

std::vector<int64_t> VerticalSlashKeys(const VerticalSlashHead& head, int64_t query) {
  const VerticalSlashRows& rows = head.rows[query / kRows];
  std::vector<int64_t> keys = rows.columns;
  for (const KeyRange& range : rows.ranges) {
    for (int64_t key = range.begin; key < std::min(range.end, query + 1); ++key) keys.push_back(key);
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

std::vector<double> VerticalSlashAttention(const PolicyProblem& problem, const VerticalSlashTrace& trace) {
  const int64_t dim = problem.head_dim;
  const int32_t group = problem.num_q_heads / problem.num_kv_heads;
  std::vector<double> out(problem.num_tokens * problem.num_q_heads * dim, 0);
  for (int64_t query = 0; query < problem.num_tokens; ++query) {
    for (int32_t head = 0; head < problem.num_q_heads; ++head) {
      const std::vector<int64_t> keys = VerticalSlashKeys(trace.heads[head], query);
      const std::vector<double> weights = Weights(problem, head, query, keys);
      for (size_t n = 0; n < keys.size(); ++n) {
        const float* value = problem.v + (keys[n] * problem.num_kv_heads + head / group) * dim;
        for (int64_t i = 0; i < dim; ++i) {
          out[(query * problem.num_q_heads + head) * dim + i] += weights[n] * value[i];
        }
      }
    }
  }
  return out;
}

}  // namespace headwater::kernels::reference
