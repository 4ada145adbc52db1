#include "kernels/reference/policies/share.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/number_text.h"
#include "kernels/reference/dot.h"

namespace headwater::kernels::reference {
namespace {

Status Check(const PolicyProblem& problem, const ShareParameters& p, int32_t layer, const ShareState& state) {
  const std::pair<const char*, double> shares[] = {
      {"similarity", p.similarity}, {"fallback", p.fallback}, {"query_aware", p.query_aware}};
  for (const auto& [name, value] : shares) {
    if (!(value >= 0 && value <= 1)) {
      return InvalidArgument(std::string(name) + " " + NumberText(value) + " is not from 0 to 1");
    }
  }
  if (p.pivots_per_layer < 0 || p.pivots_per_layer > 65536) {
    return InvalidArgument("pivots_per_layer " + std::to_string(p.pivots_per_layer) +
                           " is not from 0 to 65536");
  }
  HW_KERNELS_RETURN_IF_ERROR(flex::CheckFlex(problem, p.Flex()));
  if (layer < state.next_layer) {
    return InvalidArgument("layer " + std::to_string(layer) + " is below the next, " +
                           std::to_string(state.next_layer));
  }
  if (state.next_layer > 0 && problem.num_tokens != state.num_tokens) {
    return InvalidArgument("num_tokens " + std::to_string(problem.num_tokens) +
                           " is not that of the layers before, " + std::to_string(state.num_tokens));
  }
  return {};
}

// A row of Abar; kept[kDotRows * num_tokens] is scratch.
void AverageRow(const PolicyProblem& problem, int64_t block, int32_t head, int64_t row, double* kept,
                double* average) {
  const int64_t tokens = problem.num_tokens, begin = row * block, end = std::min(begin + block, tokens);
  std::vector<double> queries(kDotRows * problem.head_dim);
  double dots[kDotRows];
  for (int64_t first = begin; first < end; first += kDotRows) {
    const int64_t last = std::min(first + kDotRows, end);
    for (int64_t i = first; i < last; ++i) {
      std::copy_n(problem.Q(i, head), problem.head_dim, queries.begin() + (i - first) * problem.head_dim);
    }
    for (int64_t j = 0; j < last; ++j) {
      DotRows(queries.data(), problem.K(j, head), problem.head_dim, dots);
      for (int64_t i = first; i < last; ++i) {
        kept[(i - first) * tokens + j] = dots[i - first] * problem.softmax_scale;
      }
    }
    for (int64_t i = first; i < last; ++i) {
      double* const scores = kept + (i - first) * tokens;
      const double top = *std::max_element(scores, scores + i + 1);
      double sum = 0;
      for (int64_t j = 0; j <= i; ++j) sum += scores[j] = std::exp(scores[j] - top);
      for (int64_t key_block = 0; key_block <= i / block; ++key_block) {
        const double *const from = scores + key_block * block, *const to =
                                                                   scores +
                                                                   std::min(i + 1, (key_block + 1) * block);
        const double mass = std::accumulate(from, to, 0.0);
        average[key_block] += mass / sum / static_cast<double>(end - begin);
      }
    }
  }
}

// Abar. Its rows are shared among all cores, which changes no value.
std::vector<double> AverageAttention(const PolicyProblem& problem, int64_t block, int32_t head) {
  const int64_t blocks = (problem.num_tokens + block - 1) / block;
  std::vector<double> average(blocks * blocks);
#pragma omp parallel
  {
    std::vector<double> kept(kDotRows * problem.num_tokens);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = blocks - 1 - i;  // the longest first
      AverageRow(problem, block, head, row, kept.data(), average.data() + row * blocks);
    }
  }
  return average;
}

flex::BlockSet PatternOf(const std::vector<double>& average, int64_t blocks, double gamma) {
  flex::BlockSet pattern(blocks);
  for (int64_t row = 0; row < blocks; ++row) {
    const double* shares = &average[row * blocks];
    std::vector<int64_t> order(row + 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return shares[a] > shares[b]; });
    double sum = 0;
    for (const int64_t column : order) {
      pattern.Add(row, column);
      sum += shares[column];
      if (sum >= gamma) break;
    }
  }
  return pattern;
}

// r of share.h.
double Ratio(const SharePivot& pivot, bool with_repeats) {
  const auto blocks = static_cast<int64_t>(pivot.column_scores.size());
  const auto at = [&](int64_t row, int64_t column) { return pivot.average[row * blocks + column]; };
  double held = 0;
  if (with_repeats) {
    for (int64_t row = 0; row < blocks; ++row) {
      for (const int32_t column : pivot.columns) held += column <= row ? at(row, column) : at(0, 0);
      for (const int32_t offset : pivot.offsets) held += offset <= row ? at(row, row - offset) : at(0, 0);
    }
  } else {
    flex::BlockSet once(blocks);
    once.Add(pivot.columns, pivot.offsets);
    for (int64_t row = 0; row < blocks; ++row) {
      for (int64_t column = 0; column <= row; ++column) held += once.Has(row, column) ? at(row, column) : 0;
    }
  }
  return held / std::accumulate(pivot.average.begin(), pivot.average.end(), 0.0);
}

struct Layer {
  const PolicyProblem& problem;
  const ShareParameters& parameters;
  int32_t number;
  std::map<int32_t, SharePivot> pivots;
  std::vector<ShareHead> heads;

  void MakePivot(int32_t head, int32_t key, const std::string& why);
  void Compare(const SharePivot& pivot, ShareHead* head) const;
  bool Alike(ShareHead* head) const;
  const SharePivot* Nearest(ShareHead* head) const;
  void ByCluster(const ShareClusters& clusters, std::vector<const SharePivot*>* shared);
  void ByLayer(std::vector<const SharePivot*>* shared);
  BlockIndex Lists(const std::vector<const SharePivot*>& shared);
};

void Layer::MakePivot(int32_t head, int32_t key, const std::string& why) {
  ShareHead& h = heads[head];
  h.role = ShareRole::kPivot;
  h.why = why;
  FlexHead own = h.flex;
  flex::ChooseColumnsAndOffsets(&own);
  SharePivot pivot{number,           head, own.column_scores, own.slash_scores, own.columns, own.offsets, {},
                   flex::BlockSet(), 0};
  pivot.average = AverageAttention(problem, parameters.block_tokens, head);
  const auto blocks = static_cast<int64_t>(own.column_scores.size());
  pivot.pattern = PatternOf(pivot.average, blocks, parameters.gamma);
  pivot.ratio = Ratio(pivot, parameters.compat_ratio);
  pivots[key] = std::move(pivot);
}

void Layer::Compare(const SharePivot& pivot, ShareHead* head) const {
  const bool nan_rule = parameters.compat.nan_rule;
  head->pivot_layer = pivot.layer;
  head->pivot_head = pivot.head;
  head->vertical_distance = flex::JsDistance(pivot.column_scores, head->flex.column_scores, nan_rule);
  head->slash_distance = flex::JsDistance(pivot.slash_scores, head->flex.slash_scores, nan_rule);
  head->ratio = pivot.ratio;
}

// Whether the head may share with the pivot that it was compared with; says why.
bool Layer::Alike(ShareHead* head) const {
  const auto below = [&](const char* what, double value, double limit) {
    if (value < limit) return true;
    head->why = std::string(what) + " " + std::to_string(value) + " is not below " + std::to_string(limit);
    return false;
  };
  if (!below("vertical distance", head->vertical_distance, parameters.similarity) ||
      !below("slash distance", head->slash_distance, parameters.similarity) ||
      !below("ratio", head->ratio, parameters.fallback)) {
    return false;
  }
  head->role = ShareRole::kShared;
  head->why =
      "like head " + std::to_string(head->pivot_head) + " of layer " + std::to_string(head->pivot_layer);
  return true;
}

// Compares the head with all pivots and leaves in it what came of the nearest.
const SharePivot* Layer::Nearest(ShareHead* head) const {
  const auto distance = [](const ShareHead& h) {
    const double sum = h.vertical_distance + h.slash_distance;
    return std::isnan(sum) ? INFINITY : sum;
  };
  const SharePivot* nearest = nullptr;
  for (const auto& [key, pivot] : pivots) {
    ShareHead compared = *head;
    Compare(pivot, &compared);
    if (nearest != nullptr && !(distance(compared) < distance(*head))) continue;
    nearest = &pivot;
    *head = std::move(compared);
  }
  return nearest;
}

void Layer::ByCluster(const ShareClusters& clusters, std::vector<const SharePivot*>* shared) {
  for (size_t head = 0; head < heads.size(); ++head) {
    ShareHead& h = heads[head];
    if (h.role == ShareRole::kQueryAware) continue;
    const auto number_of_head = static_cast<int32_t>(head);
    const auto found = clusters.cluster_of.find({number, number_of_head});
    if (found == clusters.cluster_of.end()) {
      h.why = "in no cluster";
      continue;
    }
    h.cluster = found->second;
    const std::string cluster = "cluster " + std::to_string(h.cluster);
    if (clusters.shareable.count(h.cluster) == 0) {
      h.why = cluster + " does not share";
      continue;
    }
    const auto pivot = pivots.find(h.cluster);
    if (pivot == pivots.end()) {
      MakePivot(number_of_head, h.cluster, "first of " + cluster);
    } else if (pivot->second.layer == number) {
      h.why = "pivot of " + cluster + " lies in this layer";
    } else {
      Compare(pivot->second, &h);
      if (Alike(&h)) (*shared)[head] = &pivot->second;
    }
  }
}

void Layer::ByLayer(std::vector<const SharePivot*>* shared) {
  pivots.clear();
  for (int32_t head = 0; head < static_cast<int32_t>(heads.size()); ++head) {
    if (heads[head].role == ShareRole::kQueryAware) continue;
    if (static_cast<int32_t>(pivots.size()) < parameters.pivots_per_layer) {
      MakePivot(head, head, "among the first of its layer");
      continue;
    }
    const SharePivot* nearest = Nearest(&heads[head]);
    if (Alike(&heads[head])) (*shared)[head] = nearest;
  }
}

BlockIndex Layer::Lists(const std::vector<const SharePivot*>& shared) {
  const FlexParameters flex_parameters = parameters.Flex();
  const auto blocks = static_cast<int64_t>(heads.front().flex.column_scores.size());
  std::vector<flex::BlockSet> sets(heads.size(), flex::BlockSet(blocks));
  std::vector<bool> dense(heads.size());
  for (size_t head = 0; head < heads.size(); ++head) {
    FlexHead& h = heads[head].flex;
    const ShareRole role = heads[head].role;
    dense[head] = role == ShareRole::kPivot;
    if (role == ShareRole::kQueryAware || role == ShareRole::kShared) {
      h.n_v = h.n_s = flex_parameters.MinBlocks();
    }
    flex::ChooseColumnsAndOffsets(&h);
    sets[head].Add(h.columns, h.offsets);
    if (role == ShareRole::kShared) sets[head].Add(shared[head]->pattern);
    if (role == ShareRole::kQueryAware) {
      h.pooled_blocks = flex::ChoosePooled(problem, flex_parameters, static_cast<int32_t>(head));
    }
    for (const auto& [row, column] : h.pooled_blocks) sets[head].Add(row, column);
  }
  return flex::MakeIndex(sets, dense, parameters.block_tokens);
}

}  // namespace

FlexParameters ShareParameters::Flex() const {
  FlexParameters flex;
  flex.gamma = gamma;
  flex.tau = query_aware;
  flex.min_budget_tokens = min_budget_tokens;
  flex.max_budget_tokens = max_budget_tokens;
  flex.block_tokens = block_tokens;
  flex.compat = compat;
  flex.compat.count_by_128 = false;
  return flex;
}

Status ShareSelect(const PolicyProblem& problem, const ShareParameters& parameters,
                   const ShareClusters& clusters, int32_t layer, ShareState* state, ShareLayer* selected) {
  HW_KERNELS_RETURN_IF_ERROR(Check(problem, parameters, layer, *state));
  const FlexParameters flex_parameters = parameters.Flex();
  Layer work{problem, parameters, layer, state->pivots, std::vector<ShareHead>(problem.num_q_heads)};
  for (int32_t head = 0; head < problem.num_q_heads; ++head) {
    ShareHead& h = work.heads[head];
    h.flex = flex::ScoreHead(problem, flex_parameters, head);
    if (!h.flex.query_aware) continue;
    h.role = ShareRole::kQueryAware;
    h.why = "distance of the pooled row " + std::to_string(h.flex.js_distance);
  }
  std::vector<const SharePivot*> shared(work.heads.size());
  if (parameters.pivots_per_layer > 0) {
    work.ByLayer(&shared);
  } else {
    work.ByCluster(clusters, &shared);
  }

  selected->index = work.Lists(shared);
  selected->heads = std::move(work.heads);
  *state = {problem.num_tokens, layer + 1, std::move(work.pivots)};
  return {};
}

}  // namespace headwater::kernels::reference
