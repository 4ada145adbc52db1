#include "kernels/reference/policies/xattention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include "kernels/number_text.h"
#include "kernels/reference/dot.h"
#include "kernels/reference/policies/common.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kBlock = kKeyBlockTokens;
static_assert(kQueryTileTokens == kKeyBlockTokens, "query and key blocks are one grid");

Status CheckParameters(const XAttentionParameters& p, int32_t num_q_heads) {
  if (p.stride < 1 || kBlock % p.stride != 0) {
    return InvalidArgument("stride " + std::to_string(p.stride) + " is not a divisor of 128 from 1 to 128");
  }
  HW_KERNELS_RETURN_IF_ERROR(
      CheckPerHead("thresholds", static_cast<int64_t>(p.thresholds.size()), num_q_heads));
  for (const double threshold : p.thresholds) {
    if (!(threshold >= 0 && threshold <= 1)) {
      return InvalidArgument("threshold " + NumberText(threshold) + " is outside 0 to 1");
    }
  }
  if (!std::isfinite(p.norm) || p.norm <= 0) {
    return InvalidArgument("norm " + NumberText(p.norm) + " is not a number over 0");
  }
  if (p.chunk_tokens < 0 || p.chunk_tokens > (int64_t{1} << 28) || p.chunk_tokens % kBlock != 0) {
    return InvalidArgument("chunk_tokens " + std::to_string(p.chunk_tokens) +
                           " is not 0 or a multiple of 128 up to 2^28");
  }
  return {};
}

// y[w, u]: tokens past the prompt add nothing.
double Logit(const PolicyProblem& problem, const XAttentionParameters& p, int32_t head, int64_t w,
             int64_t u) {
  double sum = 0;
  for (int64_t a = 0; a < p.stride; ++a) {
    const int64_t query = w * p.stride + p.stride - 1 - a, key = u * p.stride + a;
    if (query >= problem.num_tokens || key >= problem.num_tokens) continue;
    sum += Dot(problem.Q(query, head), problem.K(key, head), problem.head_dim);
  }
  return sum * problem.softmax_scale / (p.stride * p.norm);
}

// E of one head: each stride of queries that holds a token brings a mass of 1.
void Score(const PolicyProblem& problem, const XAttentionParameters& p, int32_t head, int64_t num_blocks,
           std::vector<double>* scores) {
  scores->assign(num_blocks * num_blocks, 0);
  const int64_t per_block = kBlock / p.stride, strides = (problem.num_tokens + p.stride - 1) / p.stride;
  for (int64_t w = 0; w < strides; ++w) {
    std::vector<double> row(w + 1);
    for (int64_t u = 0; u <= w; ++u) row[u] = Logit(problem, p, head, w, u);
    const double top = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (double& value : row) sum += value = std::exp(value - top);
    for (int64_t u = 0; u <= w; ++u) {
      (*scores)[w / per_block * num_blocks + u / per_block] += row[u] / sum;
    }
  }
}

// The blocks that row `own` keeps, ascending; `scores` are its E up to `own`.
std::vector<int32_t> Keep(const std::vector<double>& scores, double threshold, bool compat_first_chunk) {
  const int32_t own = static_cast<int32_t>(scores.size()) - 1;
  std::vector<int32_t> kept, others;
  for (int32_t block = 0; block <= own; ++block) {
    const bool forced = block == own || (block == 0 && !compat_first_chunk);
    (forced ? kept : others).push_back(block);
  }
  std::stable_sort(others.begin(), others.end(), [&](int32_t x, int32_t y) { return scores[x] > scores[y]; });
  const double wanted = threshold * std::accumulate(scores.begin(), scores.end(), 0.0);
  double mass = 0, ahead = 0;
  for (const int32_t block : kept) mass += scores[block];
  for (const int32_t block : others) {
    if ((compat_first_chunk ? ahead : mass) >= wanted) break;
    kept.push_back(block);
    ahead = mass;
    mass += scores[block];
  }
  if (std::find(kept.begin(), kept.end(), 0) == kept.end()) kept.push_back(0);
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace

int64_t XAttentionChunk(int64_t num_tokens) {
  int64_t power = 1;
  while (power < num_tokens) power *= 2;
  return std::max<int64_t>(2048, std::min(power, (int64_t{1} << 28) / power));
}

Status SelectXAttention(const PolicyProblem& problem, const XAttentionParameters& p, XAttentionTrace* trace,
                        BlockIndex* index) {
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyProblem(problem));
  HW_KERNELS_RETURN_IF_ERROR(CheckParameters(p, problem.num_q_heads));
  trace->chunk_tokens = p.chunk_tokens > 0 ? p.chunk_tokens : XAttentionChunk(problem.num_tokens);
  trace->num_blocks = (problem.num_tokens + kBlock - 1) / kBlock;
  trace->heads.clear();
  std::vector<std::vector<std::vector<int32_t>>> lists;
  for (int32_t h = 0; h < problem.num_q_heads; ++h) {
    XAttentionHead head;
    Score(problem, p, h, trace->num_blocks, &head.scores);
    for (int64_t block = 0; block < trace->num_blocks; ++block) {
      const auto row = head.scores.begin() + block * trace->num_blocks;
      head.kept.push_back(Keep({row, row + block + 1}, p.thresholds[p.thresholds.size() == 1 ? 0 : h],
                               p.compat && (block + 1) * kBlock <= trace->chunk_tokens));
    }
    lists.push_back(head.kept);
    if (p.compat && p.keep_sink) {
      head.kept[0].resize(trace->num_blocks);
      std::iota(head.kept[0].begin(), head.kept[0].end(), 0);
    }
    trace->heads.push_back(std::move(head));
  }
  *index = IndexOfLists(lists);
  return {};
}

}  // namespace headwater::kernels::reference
