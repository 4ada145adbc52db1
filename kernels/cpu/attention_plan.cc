#include "kernels/cpu/attention_plan.h"

namespace headwater::kernels::cpu {
namespace {

ElementType TypeOf(DType dtype) {
  return dtype == DType::kF32   ? ElementType::kF32
         : dtype == DType::kF16 ? ElementType::kF16
                                : ElementType::kBF16;
}

// Queries, running outputs and scores of this many bytes stay in the second-level cache.
constexpr int64_t kItemBytes = 256 << 10;
constexpr int64_t kMaxLanes = 384;
// Fewer items than this would leave threads idle at the end.
constexpr int64_t kEnoughItems = 64;
constexpr int64_t kLeastLanes = 32;

}  // namespace

int32_t MaxLanes(const AttentionShape& shape) {
  const int64_t lane_bytes = 2 * int64_t{shape.head_dim} * static_cast<int64_t>(sizeof(float));
  return static_cast<int32_t>(std::min(kMaxLanes, kItemBytes / lane_bytes));
}

int32_t SharedHeads(const AttentionShape& shape, const BlockIndex& index) {
  const int32_t group = shape.num_q_heads / shape.num_kv_heads;
  const int32_t heads_per_list = shape.num_q_heads / index.num_lists;
  int32_t heads = group;
  while (group % heads != 0 || heads_per_list % heads != 0 || heads > 16) --heads;
  return heads;
}

Plan MakePlan(const AttentionShape& shape, const QueryChunk& queries, const BlockIndex& index) {
  Plan plan;
  const int32_t heads = SharedHeads(shape, index);
  plan.heads_per_item = heads;
  plan.head_groups = shape.num_q_heads / heads;
  plan.first_tile = queries.begin / index.q_tile_tokens;
  plan.num_tiles = (queries.begin + queries.num_tokens - 1) / index.q_tile_tokens - plan.first_tile + 1;

  int64_t lanes = MaxLanes(shape);
  while (lanes / 2 >= kLeastLanes && queries.num_tokens * shape.num_q_heads / lanes < kEnoughItems) {
    lanes /= 2;
  }
  const int64_t tile_tokens = std::min<int64_t>(index.q_tile_tokens, queries.num_tokens);
  plan.tokens_per_item = static_cast<int32_t>(std::clamp<int64_t>(lanes / heads, 1, tile_tokens));
  plan.pieces_per_tile = (tile_tokens + plan.tokens_per_item - 1) / plan.tokens_per_item;
  return plan;
}

AttentionItem CommonItem(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                         const BlockIndex& index, const AttentionState& state) {
  AttentionItem item;
  item.head_dim = shape.head_dim;
  item.num_q_heads = shape.num_q_heads;
  item.num_kv_heads = shape.num_kv_heads;
  item.scale_log2 = static_cast<float>(static_cast<double>(shape.softmax_scale) * 1.4426950408889634);
  item.q = queries.q;
  item.q_type = TypeOf(queries.dtype);
  item.q_begin = queries.begin;
  item.k = keys.k;
  item.v = keys.v;
  item.kv_type = TypeOf(keys.dtype);
  item.k_begin = keys.begin;
  item.k_end = keys.begin + keys.num_tokens;
  item.out = state.out;
  item.lse_ln = state.lse_ln;
  item.sink_tokens = index.sink_tokens;
  item.window_tokens = index.window_tokens;
  return item;
}

bool LocateItem(const Plan& plan, const QueryChunk& queries, const BlockIndex& index, int64_t i,
                AttentionItem* item, int64_t* segment) {
  const int64_t group = i % plan.head_groups;
  const int64_t piece = plan.pieces_per_tile - 1 - i / plan.head_groups % plan.pieces_per_tile;
  const int64_t tile = plan.first_tile + plan.num_tiles - 1 - i / plan.head_groups / plan.pieces_per_tile;
  const int64_t tile_begin = tile * index.q_tile_tokens;
  const int64_t piece_begin = std::max(tile_begin, queries.begin) + piece * plan.tokens_per_item;
  const int64_t begin = piece_begin;
  const int64_t end = std::min({piece_begin + plan.tokens_per_item, tile_begin + index.q_tile_tokens,
                                queries.begin + queries.num_tokens});
  if (begin >= end) return false;
  item->token_begin = begin - queries.begin;
  item->num_tokens = static_cast<int32_t>(end - begin);
  item->num_heads = plan.heads_per_item;
  item->head_begin = static_cast<int32_t>(group * plan.heads_per_item);
  item->kv_head = item->head_begin / (item->num_q_heads / item->num_kv_heads);
  const int64_t list = int64_t{item->head_begin} * index.num_lists / item->num_q_heads;
  *segment = index.Row(static_cast<int32_t>(list), tile);
  return true;
}

}  // namespace headwater::kernels::cpu
