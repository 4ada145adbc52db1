#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

namespace headwater::kernels::reference {
namespace {

std::vector<double> LoadRow(const void* from, DType dtype, int64_t row, int32_t head_dim) {
  std::vector<float> values(static_cast<size_t>(head_dim));
  const auto bytes = static_cast<int64_t>(SizeOf(dtype)) * row * head_dim;
  Convert(static_cast<const char*>(from) + bytes, dtype, values.data(), DType::kF32, values.size());
  return {values.begin(), values.end()};
}

bool Selected(const BlockIndex& index, int64_t segment, int64_t block) {
  if (index.dense[static_cast<size_t>(segment)] != 0) return true;
  return std::binary_search(index.blocks.begin() + index.offsets[static_cast<size_t>(segment)],
                            index.blocks.begin() + index.offsets[static_cast<size_t>(segment) + 1], block);
}

bool Visible(const BlockIndex& index, int64_t segment, int64_t query, int64_t key) {
  if (key > query) return false;
  if (index.has_element_mask() && key >= index.sink_tokens && key <= query - index.window_tokens)
    return false;
  return Selected(index, segment, key / index.k_block_tokens);
}

// One query row: gathers the scores of its visible keys, then merges them into the state.
void AttendRow(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
               const BlockIndex& index, const AttentionState& state, int64_t token, int32_t head) {
  const int64_t query = queries.begin + token;
  const int64_t list = static_cast<int64_t>(head) * index.num_lists / shape.num_q_heads;
  const int64_t segment = index.Row(static_cast<int32_t>(list), query / index.q_tile_tokens);
  const int32_t kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
  const int64_t row = token * shape.num_q_heads + head;
  const std::vector<double> q = LoadRow(queries.q, queries.dtype, row, shape.head_dim);

  std::vector<int64_t> visible;
  std::vector<double> scores;
  double top = -INFINITY;
  for (int64_t j = 0; j < keys.num_tokens; ++j) {
    if (!Visible(index, segment, query, keys.begin + j)) continue;
    const std::vector<double> k =
        LoadRow(keys.k, keys.dtype, j * shape.num_kv_heads + kv_head, shape.head_dim);
    double dot = 0;
    for (size_t c = 0; c < q.size(); ++c) dot += q[c] * k[c];
    visible.push_back(j);
    scores.push_back(dot * static_cast<double>(shape.softmax_scale));
    top = std::max(top, scores.back());
  }
  if (visible.empty()) return;

  float* out = state.out + row * shape.head_dim;
  const double old_lse = static_cast<double>(state.lse_ln[row]);
  top = std::max(top, old_lse);
  const double old_weight = std::exp(old_lse - top);
  double sum = old_weight;
  std::vector<double> accumulated(q.size());
  for (size_t c = 0; c < q.size(); ++c) accumulated[c] = old_weight * static_cast<double>(out[c]);
  for (size_t i = 0; i < visible.size(); ++i) {
    const double weight = std::exp(scores[i] - top);
    const std::vector<double> v =
        LoadRow(keys.v, keys.dtype, visible[i] * shape.num_kv_heads + kv_head, shape.head_dim);
    sum += weight;
    for (size_t c = 0; c < q.size(); ++c) accumulated[c] += weight * v[c];
  }
  for (size_t c = 0; c < q.size(); ++c) out[c] = static_cast<float>(accumulated[c] / sum);
  state.lse_ln[row] = static_cast<float>(top + std::log(sum));
}

}  // namespace

Status SparseAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                       const BlockIndex& index, const AttentionState& state) {
  HW_KERNELS_RETURN_IF_ERROR(ValidateAttention(shape, queries, keys, index));
  try {
    for (int64_t token = 0; token < queries.num_tokens; ++token) {
      for (int32_t head = 0; head < shape.num_q_heads; ++head) {
        AttendRow(shape, queries, keys, index, state, token, head);
      }
    }
  } catch (const std::bad_alloc&) {
    return {StatusCode::kResourceExhausted, "no memory for the scores of one row"};
  }
  return {};
}

}  // namespace headwater::kernels::reference
