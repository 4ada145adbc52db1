#include "kernels/reference/policies/common.h"

#include <cmath>

#include "kernels/number_text.h"

namespace headwater::kernels::reference {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 37;  // key blocks are int32_t

Status CheckFinite(const char* name, const float* x, int64_t num_tokens, int64_t num_heads,
                   int64_t head_dim) {
  for (int64_t i = 0; i < num_tokens * num_heads * head_dim; ++i) {
    if (std::isfinite(x[i])) continue;
    return InvalidArgument(std::string(name) + " of token " + std::to_string(i / head_dim / num_heads) +
                           ", head " + std::to_string(i / head_dim % num_heads) + " is not finite");
  }
  return {};
}

}  // namespace

Status CheckRange(const std::string& name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return {};
  return InvalidArgument(name + " " + std::to_string(value) + " is outside " + std::to_string(least) +
                         " to " + std::to_string(most));
}

Status CheckReal(const std::string& name, double value, double least, double most) {
  if (value >= least && value <= most) return {};
  return InvalidArgument(name + " " + NumberText(value) + " is outside " + NumberText(least) + " to " +
                         NumberText(most));
}

Status CheckPerHead(const std::string& name, int64_t values, int32_t num_q_heads) {
  if (values == 1 || values == num_q_heads) return {};
  return InvalidArgument(name + " has " + std::to_string(values) + " values, not 1 or one for each of " +
                         std::to_string(num_q_heads) + " query heads");
}

Status CheckPolicyProblem(const PolicyProblem& problem) {
  if (problem.q == nullptr || problem.k == nullptr) return InvalidArgument("q or k is null");
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", problem.num_tokens, 1, kMaxTokens));
  if (problem.num_q_heads < 1 || problem.num_kv_heads < 1 ||
      problem.num_q_heads % problem.num_kv_heads != 0) {
    return InvalidArgument("num_q_heads " + std::to_string(problem.num_q_heads) +
                           " is not a positive multiple of num_kv_heads " +
                           std::to_string(problem.num_kv_heads));
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("head_dim", problem.head_dim, 1, 1 << 16));
  if (!std::isfinite(problem.softmax_scale) || problem.softmax_scale <= 0) {
    return InvalidArgument("softmax_scale " + NumberText(problem.softmax_scale) +
                           " is not a positive number");
  }
  HW_KERNELS_RETURN_IF_ERROR(
      CheckFinite("q", problem.q, problem.num_tokens, problem.num_q_heads, problem.head_dim));
  return CheckFinite("k", problem.k, problem.num_tokens, problem.num_kv_heads, problem.head_dim);
}

BlockIndex IndexOfLists(const std::vector<std::vector<std::vector<int32_t>>>& lists) {
  BlockIndex index;
  index.num_lists = static_cast<int32_t>(lists.size());
  index.num_q_tiles = static_cast<int64_t>(lists[0].size());
  index.offsets.push_back(0);
  for (const auto& tiles : lists) {
    for (const std::vector<int32_t>& blocks : tiles) {
      index.blocks.insert(index.blocks.end(), blocks.begin(), blocks.end());
      index.offsets.push_back(static_cast<int64_t>(index.blocks.size()));
      index.dense.push_back(0);
    }
  }
  return index;
}

}  // namespace headwater::kernels::reference
