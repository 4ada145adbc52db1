#include <cmath>
#include <string>

#include "kernels/attention/attention.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMaxPosition = int64_t{1} << 53;
// 128-bit products are not needed below: 2^53 tokens times 2^16 heads times 2^8 would overflow, so rows are
// bounded by what 64-bit byte offsets can address.
constexpr int64_t kMaxElements = int64_t{1} << 59;

Status ValidateShape(const AttentionShape& shape) {
  if (shape.num_q_heads < 1 || shape.num_kv_heads < 1 || shape.num_q_heads % shape.num_kv_heads != 0) {
    return InvalidArgument("num_q_heads " + std::to_string(shape.num_q_heads) +
                           " is not a positive multiple of num_kv_heads " +
                           std::to_string(shape.num_kv_heads));
  }
  if (shape.head_dim < 16 || shape.head_dim > 256 || shape.head_dim % 16 != 0) {
    return InvalidArgument("head_dim " + std::to_string(shape.head_dim) +
                           " is not a multiple of 16 from 16 to 256");
  }
  if (!std::isfinite(shape.softmax_scale) || shape.softmax_scale <= 0) {
    return InvalidArgument("softmax_scale " + NumberText(shape.softmax_scale) + " is not a positive number");
  }
  return {};
}

Status ValidateChunk(const char* what, int64_t begin, int64_t num_tokens, int64_t num_heads,
                     int64_t head_dim) {
  if (begin < 0 || num_tokens < 0 || begin > kMaxPosition || num_tokens > kMaxPosition - begin) {
    return InvalidArgument(std::string(what) + " from position " + std::to_string(begin) + ", " +
                           std::to_string(num_tokens) + " of them, are outside 0 to 2^53");
  }
  if (static_cast<__int128>(num_tokens) * num_heads * head_dim > kMaxElements) {
    return InvalidArgument(std::to_string(num_tokens) + " " + what + " of " + std::to_string(num_heads) +
                           " heads have more than 2^59 elements");
  }
  return {};
}

}  // namespace

Status ValidateAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                         const BlockIndex& index) {
  HW_KERNELS_RETURN_IF_ERROR(ValidateShape(shape));
  HW_KERNELS_RETURN_IF_ERROR(
      ValidateChunk("queries", queries.begin, queries.num_tokens, shape.num_q_heads, shape.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(
      ValidateChunk("keys", keys.begin, keys.num_tokens, shape.num_kv_heads, shape.head_dim));
  if (queries.num_tokens > 0 && queries.q == nullptr) return InvalidArgument("queries.q is null");
  if (keys.num_tokens > 0 && (keys.k == nullptr || keys.v == nullptr)) {
    return InvalidArgument("keys.k or keys.v is null");
  }
  HW_KERNELS_RETURN_IF_ERROR(ValidateBlockIndex(index));
  if (shape.num_q_heads % index.num_lists != 0) {
    return InvalidArgument("num_lists " + std::to_string(index.num_lists) + " does not divide num_q_heads " +
                           std::to_string(shape.num_q_heads));
  }
  if (queries.num_tokens > 0) {
    const int64_t first = queries.begin / index.q_tile_tokens;
    const int64_t last = (queries.begin + queries.num_tokens - 1) / index.q_tile_tokens;
    if (first < index.first_q_tile || last >= index.first_q_tile + index.num_q_tiles) {
      return InvalidArgument("queries lie in tiles " + std::to_string(first) + " to " + std::to_string(last) +
                             ", the index has " + std::to_string(index.first_q_tile) + " to " +
                             std::to_string(index.first_q_tile + index.num_q_tiles - 1));
    }
  }
  return {};
}

void ResetAttentionState(const AttentionShape& shape, int64_t num_tokens, const AttentionState& state) {
  const int64_t rows = num_tokens * shape.num_q_heads;
  for (int64_t i = 0; i < rows * shape.head_dim; ++i) state.out[i] = 0;
  for (int64_t i = 0; i < rows; ++i) state.lse_ln[i] = -INFINITY;
}

}  // namespace headwater::kernels
