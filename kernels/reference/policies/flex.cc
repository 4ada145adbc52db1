#include "kernels/reference/policies/flex.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "kernels/number_text.h"
#include "kernels/reference/dot.h"
#include "kernels/reference/policies/common.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kMaxBudget = std::numeric_limits<int32_t>::max();

Status CheckParameters(const FlexParameters& p) {
  const auto bad = [](const char* name, const std::string& value, const char* range) {
    return InvalidArgument(std::string(name) + " " + value + " is not " + range);
  };
  if (!(p.gamma > 0 && p.gamma < 1)) return bad("gamma", NumberText(p.gamma), "over 0 and below 1");
  if (!(p.tau >= 0 && p.tau <= 1)) return bad("tau", NumberText(p.tau), "from 0 to 1");
  if (p.min_budget_tokens < 1 || p.min_budget_tokens > kMaxBudget) {
    return bad("min_budget_tokens", std::to_string(p.min_budget_tokens), "from 1 to 2147483647");
  }
  if (p.max_budget_tokens < 0 || p.max_budget_tokens > kMaxBudget) {
    return bad("max_budget_tokens", std::to_string(p.max_budget_tokens), "from 0 to 2147483647");
  }
  if (p.block_tokens != 16 && p.block_tokens != 32 && p.block_tokens != 64 && p.block_tokens != 128) {
    return bad("block_tokens", std::to_string(p.block_tokens), "16, 32, 64 or 128");
  }
  return {};
}

double Scale(const PolicyProblem& problem, const FlexParameters& parameters) {
  return parameters.compat.scale_of_head_dim ? 1 / std::sqrt(static_cast<double>(problem.head_dim))
                                             : problem.softmax_scale;
}

int64_t NumBlocks(const PolicyProblem& problem, const FlexParameters& parameters) {
  return (problem.num_tokens + parameters.block_tokens - 1) / parameters.block_tokens;
}

void Softmax(std::vector<double>* x) {
  const double top = *std::max_element(x->begin(), x->end());
  double sum = 0;
  for (double& value : *x) sum += value = std::exp(value - top);
  for (double& value : *x) value /= sum;
}

double DotOfMeans(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

using RowOf = std::function<const float*(int64_t token)>;

std::vector<double> Mean(const RowOf& row, int64_t begin, int64_t end, int32_t dim) {
  std::vector<double> mean(dim);
  for (int64_t token = begin; token < end; ++token) {
    for (int32_t i = 0; i < dim; ++i) mean[i] += row(token)[i];
  }
  for (double& value : mean) value /= static_cast<double>(end - begin);
  return mean;
}

// Of each block, over its own tokens.
std::vector<std::vector<double>> BlockMeans(const PolicyProblem& problem, int32_t block_tokens,
                                            const RowOf& row) {
  std::vector<std::vector<double>> means;
  for (int64_t begin = 0; begin < problem.num_tokens; begin += block_tokens) {
    const int64_t end = std::min(begin + block_tokens, problem.num_tokens);
    means.push_back(Mean(row, begin, end, problem.head_dim));
  }
  return means;
}

std::vector<std::vector<double>> KeyMeans(const PolicyProblem& problem, int32_t block_tokens, int32_t head) {
  return BlockMeans(problem, block_tokens, [&](int64_t token) { return problem.K(token, head); });
}

std::vector<double> BlockSums(const std::vector<double>& x, size_t block) {
  std::vector<double> sums((x.size() + block - 1) / block);
  for (size_t i = 0; i < x.size(); ++i) sums[i / block] += x[i];
  return sums;
}

// The softmax of the query at `token` over keys 0 to token.
std::vector<double> AttentionRow(const PolicyProblem& problem, int32_t head, int64_t token, double scale) {
  std::vector<double> row(token + 1);
  const float* q = problem.Q(token, head);
  for (int64_t j = 0; j <= token; ++j) {
    row[j] = Dot(q, problem.K(j, head), problem.head_dim) * scale;
  }
  Softmax(&row);
  return row;
}

// The numbers of the n largest entries, best first, of equal ones the first; entry 0 counts as infinite.
std::vector<int32_t> Best(const std::vector<double>& scores, int64_t n) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin() + 1, order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(std::min(n, static_cast<int64_t>(order.size())));
  return order;
}

}  // namespace

namespace flex {

void BlockSet::Add(const BlockSet& other) {
  for (size_t i = 0; i < has_.size(); ++i) has_[i] = has_[i] || other.has_[i];
}

void BlockSet::Add(const std::vector<int32_t>& columns, const std::vector<int32_t>& offsets) {
  for (int64_t row = 0; row < num_blocks_; ++row) {
    for (const int32_t column : columns) Add(row, column);
    for (const int32_t offset : offsets) {
      if (offset <= row) Add(row, row - offset);
    }
  }
}

Status CheckFlex(const PolicyProblem& problem, const FlexParameters& parameters) {
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(parameters));
  return CheckPolicyProblem(problem);
}

int64_t Cover(std::vector<double> x, double share) {
  std::sort(x.begin(), x.end(), std::greater<>());
  int64_t count = 0;
  double sum = 0;
  for (const double value : x) {
    sum += value;
    if (sum > share) break;
    ++count;
  }
  return count + 1;
}

double JsDistance(const std::vector<double>& p, const std::vector<double>& q, bool nan_rule) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (nan_rule && (static_cast<float>(p[i]) == 0 || static_cast<float>(q[i]) == 0)) {
      return std::numeric_limits<double>::quiet_NaN();
    }
    const double m = (p[i] + q[i]) / 2;
    if (p[i] > 0) sum += 0.5 * p[i] * std::log(p[i] / m);
    if (q[i] > 0) sum += 0.5 * q[i] * std::log(q[i] / m);
  }
  return std::sqrt(std::max(sum, 0.0));  // rounding may leave equal distributions just below 0
}

FlexHead ScoreHead(const PolicyProblem& problem, const FlexParameters& parameters, int32_t head) {
  const int64_t tokens = problem.num_tokens, block = parameters.block_tokens;
  const int64_t first = std::max<int64_t>(0, tokens - block);
  const double scale = Scale(problem, parameters), rows = static_cast<double>(tokens - first);
  FlexHead h;
  h.vertical.assign(tokens, 0);
  h.slash.assign(tokens, 0);
  for (int64_t token = first; token < tokens; ++token) {
    const std::vector<double> attention = AttentionRow(problem, head, token, scale);
    for (int64_t j = 0; j <= token; ++j) {
      h.vertical[j] += attention[j] / rows;
      h.slash[tokens - 1 - (token - j)] += attention[j] / rows;
    }
  }

  const int64_t divisor = parameters.compat.count_by_128 ? 128 : block;
  const int64_t blocks = NumBlocks(problem, parameters);
  const int64_t most =
      parameters.max_budget_tokens > 0 ? (parameters.max_budget_tokens + block - 1) / block : kMaxBudget;
  const auto count = [&](int64_t cover) {
    return std::min(std::max(cover / divisor + 1, parameters.MinBlocks()), std::min(most, blocks));
  };
  h.vertical_cover = Cover(h.vertical, parameters.gamma);
  h.slash_cover = Cover(h.slash, parameters.gamma);
  h.n_v = count(h.vertical_cover);
  h.n_s = count(h.slash_cover);

  h.column_scores = BlockSums(h.vertical, block);
  h.slash_scores = BlockSums(h.slash, block);
  const std::vector<double> probe =
      Mean([&](int64_t token) { return problem.Q(token, head); }, first, tokens, problem.head_dim);
  for (const std::vector<double>& mean : KeyMeans(problem, parameters.block_tokens, head)) {
    h.pooled.push_back(DotOfMeans(probe, mean) * scale);
  }
  Softmax(&h.pooled);
  h.js_distance = JsDistance(h.pooled, h.column_scores, parameters.compat.nan_rule);
  h.query_aware = h.js_distance < parameters.tau;
  return h;
}

void ChooseColumnsAndOffsets(FlexHead* head) {
  head->columns = Best(head->column_scores, head->n_v);
  const std::vector<double> by_offset(head->slash_scores.rbegin(), head->slash_scores.rend());
  head->offsets = Best(by_offset, head->n_s);
}

std::vector<FlexBlock> ChoosePooled(const PolicyProblem& problem, const FlexParameters& parameters,
                                    int32_t head) {
  const double scale = Scale(problem, parameters);
  const auto keys = KeyMeans(problem, parameters.block_tokens, head);
  const auto queries =
      BlockMeans(problem, parameters.block_tokens, [&](int64_t token) { return problem.Q(token, head); });
  std::vector<std::pair<double, FlexBlock>> map;
  for (size_t row = 0; row < queries.size(); ++row) {
    std::vector<double> scores;
    for (size_t column = 0; column <= row; ++column) {
      scores.push_back(DotOfMeans(queries[row], keys[column]) * scale);
    }
    Softmax(&scores);
    for (size_t column = 0; column <= row; ++column) map.push_back({scores[column], FlexBlock(row, column)});
  }
  std::stable_sort(map.begin(), map.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  const double budget = parameters.gamma * static_cast<double>(queries.size());
  std::vector<FlexBlock> chosen;
  double sum = 0;
  for (const auto& [share, block] : map) {
    sum += share;
    if (sum > budget) break;
    chosen.push_back(block);
  }
  return chosen;
}

BlockIndex MakeIndex(const std::vector<BlockSet>& heads, const std::vector<bool>& dense,
                     int32_t block_tokens) {
  BlockIndex index;
  index.q_tile_tokens = index.k_block_tokens = block_tokens;
  index.num_lists = static_cast<int32_t>(heads.size());
  index.num_q_tiles = heads.front().num_blocks();
  index.offsets.push_back(0);
  for (size_t head = 0; head < heads.size(); ++head) {
    for (int64_t row = 0; row < index.num_q_tiles; ++row) {
      index.dense.push_back(dense[head]);
      for (int64_t column = 0; column <= row && !dense[head]; ++column) {
        if (heads[head].Has(row, column)) index.blocks.push_back(static_cast<int32_t>(column));
      }
      index.offsets.push_back(static_cast<int64_t>(index.blocks.size()));
    }
  }
  return index;
}

}  // namespace flex

Status FlexSelect(const PolicyProblem& problem, const FlexParameters& parameters, FlexTrace* trace,
                  BlockIndex* index) {
  HW_KERNELS_RETURN_IF_ERROR(flex::CheckFlex(problem, parameters));
  const int64_t block = parameters.block_tokens, blocks = NumBlocks(problem, parameters);
  FlexTrace stages;
  stages.dense = problem.num_tokens <= std::max(2 * block, parameters.MinBlocks() * block);
  std::vector<flex::BlockSet> sets(problem.num_q_heads, flex::BlockSet(blocks));
  for (int32_t head = 0; head < problem.num_q_heads && !stages.dense; ++head) {
    FlexHead h = flex::ScoreHead(problem, parameters, head);
    if (h.query_aware) {
      h.n_v = h.n_s = parameters.MinBlocks();
      h.pooled_blocks = flex::ChoosePooled(problem, parameters, head);
    }
    flex::ChooseColumnsAndOffsets(&h);
    sets[head].Add(h.columns, h.offsets);
    for (const auto& [row, column] : h.pooled_blocks) sets[head].Add(row, column);
    stages.heads.push_back(std::move(h));
  }
  *index = flex::MakeIndex(sets, std::vector<bool>(sets.size(), stages.dense), parameters.block_tokens);
  if (trace != nullptr) *trace = std::move(stages);
  return {};
}

}  // namespace headwater::kernels::reference
