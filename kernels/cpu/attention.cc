#include "kernels/attention/attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include <omp.h>

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/cpu_features.h"

namespace headwater::kernels {
namespace cpu {
namespace {

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeDeleter>;

Memory Allocate(size_t bytes) {
  return Memory(std::aligned_alloc(64, std::max<size_t>((bytes + 63) / 64, 1) * 64));
}

// Most keys that are packed at a time.
constexpr int64_t kPackedKeys = 4096;
constexpr int64_t kPackedBlocks = kPackedKeys / kStepKeys;

ElementType TypeOf(DType dtype) {
  return dtype == DType::kF32   ? ElementType::kF32
         : dtype == DType::kF16 ? ElementType::kF16
                                : ElementType::kBF16;
}

const AttentionKernel& KernelFor(DType q, DType kv) {
#if defined(__x86_64__)
  const CpuPath path = ActivePath();
  const bool bf16 = q == DType::kBF16 && kv == DType::kBF16;
  if (bf16 && path >= CpuPath::kAmx) return kAmxAttention;
  if (bf16 && path >= CpuPath::kAvx512Bf16) return kAvx512Bf16Attention;
  if (path >= CpuPath::kAvx512) return kAvx512Attention;
  if (path >= CpuPath::kAvx2) return kAvx2Attention;
#endif
  return kPortableAttention;
}

// How a call is cut into items: tiles (cut where the chunk of queries begins and ends) into pieces of
// tokens_per_item, times groups of heads. It depends on the shapes alone, never on the number of threads.
struct Plan {
  int32_t heads_per_item = 0;
  int32_t tokens_per_item = 0;
  int64_t pieces_per_tile = 0;
  int64_t head_groups = 0;
  int64_t first_tile = 0;
  int64_t num_tiles = 0;

  int64_t num_items() const { return num_tiles * pieces_per_tile * head_groups; }
  int32_t max_lanes() const { return heads_per_item * tokens_per_item; }
};

// Queries, running outputs and scores of this many bytes stay in the second-level cache.
constexpr int64_t kItemBytes = 256 << 10;
constexpr int64_t kMaxLanes = 384;
// Fewer items than this would leave threads idle at the end.
constexpr int64_t kEnoughItems = 64;
constexpr int64_t kLeastLanes = 32;

Plan MakePlan(const AttentionShape& shape, const QueryChunk& queries, const BlockIndex& index) {
  Plan plan;
  const int32_t group = shape.num_q_heads / shape.num_kv_heads;
  const int32_t heads_per_list = shape.num_q_heads / index.num_lists;
  // The largest number of heads that shares KV head and list, whichever of the two is finer.
  int32_t heads = group;
  while (group % heads != 0 || heads_per_list % heads != 0 || heads > 16) --heads;
  plan.heads_per_item = heads;
  plan.head_groups = shape.num_q_heads / heads;
  plan.first_tile = queries.begin / index.q_tile_tokens;
  plan.num_tiles = (queries.begin + queries.num_tokens - 1) / index.q_tile_tokens - plan.first_tile + 1;

  const int64_t lane_bytes = 2 * int64_t{shape.head_dim} * static_cast<int64_t>(sizeof(float));
  int64_t lanes = std::min(kMaxLanes, kItemBytes / lane_bytes);
  while (lanes / 2 >= kLeastLanes && queries.num_tokens * shape.num_q_heads / lanes < kEnoughItems) {
    lanes /= 2;
  }
  const int64_t tile_tokens = std::min<int64_t>(index.q_tile_tokens, queries.num_tokens);
  plan.tokens_per_item = static_cast<int32_t>(std::clamp<int64_t>(lanes / heads, 1, tile_tokens));
  plan.pieces_per_tile = (index.q_tile_tokens + plan.tokens_per_item - 1) / plan.tokens_per_item;
  return plan;
}

// Calls visit(begin, end) for each run of key positions that the segment selects inside [begin, end); a run
// may be empty.
template <typename Visit>
void ForEachRun(const BlockIndex& index, int64_t segment, int64_t begin, int64_t end, const Visit& visit) {
  const auto row = static_cast<size_t>(segment);
  if (index.dense[row] != 0) {
    visit(begin, end);
    return;
  }
  const auto first = index.blocks.begin() + index.offsets[row];
  const auto last = index.blocks.begin() + index.offsets[row + 1];
  const int64_t size = index.k_block_tokens;
  for (auto at = std::lower_bound(first, last, begin / size); at != last && *at * size < end; ++at) {
    const int64_t run_begin = std::max(begin, *at * size);
    while (at + 1 != last && *(at + 1) == *at + 1) ++at;
    visit(run_begin, std::min(end, (int64_t{*at} + 1) * size));
  }
}

class Call {
 public:
  Call(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys, const BlockIndex& index,
       const AttentionState& state)
      : index_(index),
        kernel_(KernelFor(queries.dtype, keys.dtype)),
        plan_(MakePlan(shape, queries, index)),
        queries_(queries) {
    item_.head_dim = shape.head_dim;
    item_.num_q_heads = shape.num_q_heads;
    item_.num_kv_heads = shape.num_kv_heads;
    item_.scale_log2 = static_cast<float>(static_cast<double>(shape.softmax_scale) * 1.4426950408889634);
    item_.q = queries.q;
    item_.q_type = TypeOf(queries.dtype);
    item_.q_begin = queries.begin;
    item_.k = keys.k;
    item_.v = keys.v;
    item_.kv_type = TypeOf(keys.dtype);
    item_.k_begin = keys.begin;
    item_.k_end = keys.begin + keys.num_tokens;
    key_begin_ = keys.begin;
    item_.out = state.out;
    item_.lse_ln = state.lse_ln;
    item_.sink_tokens = index.sink_tokens;
    item_.window_tokens = index.window_tokens;
  }

  Status Run() {
    const Memory scratch = Allocate(item_bytes() * static_cast<size_t>(omp_get_max_threads()));
    const Memory packed = Allocate(packed_bytes());
    if (scratch == nullptr || packed == nullptr) {
      return {StatusCode::kResourceExhausted, "no memory for " + std::to_string(item_bytes()) +
                                                  " bytes of attention scratch per thread and " +
                                                  std::to_string(packed_bytes()) + " for packed keys"};
    }
    if (kernel_.pack == nullptr) {
      RunItems(scratch.get());
      return {};
    }
    // Piece by piece, so that packed keys take bounded memory; the running state carries over.
    const int64_t k_begin = item_.k_begin;
    const int64_t k_end = std::min(item_.k_end, queries_.begin + queries_.num_tokens);
    for (int64_t begin = k_begin / kStepKeys * kStepKeys; begin < k_end; begin += kPackedKeys) {
      item_.k_end = std::min(k_end, begin + kPackedKeys);
      key_begin_ = std::max(begin, k_begin);
      item_.packed = static_cast<const uint16_t*>(packed.get());
      item_.packed_begin = begin;
      if (PackNeeded(static_cast<uint16_t*>(packed.get()))) RunItems(scratch.get());
    }
    return {};
  }

 private:
  size_t item_bytes() const {
    return (kernel_.scratch_bytes(item_.head_dim, plan_.max_lanes()) + 63) / 64 * 64;
  }

  size_t packed_bytes() const {
    if (kernel_.pack == nullptr) return 0;
    const int64_t first = item_.k_begin / kStepKeys;
    const int64_t blocks = std::min((item_.k_end - 1) / kStepKeys - first + 1, kPackedBlocks);
    return static_cast<size_t>(blocks * item_.num_kv_heads) * kernel_.packed_elements(item_.head_dim) * 2;
  }

  // Packs the blocks of this piece of the keys that some query tile has selected; false if there is none.
  bool PackNeeded(uint16_t* packed) const {
    const int64_t num_blocks = (item_.k_end - 1) / kStepKeys - item_.packed_begin / kStepKeys + 1;
    bool needed[kPackedBlocks] = {};
    int64_t count = 0;
    for (int32_t list = 0; list < index_.num_lists && count < num_blocks; ++list) {
      for (int64_t i = plan_.num_tiles - 1; i >= 0 && count < num_blocks; --i) {
        const int64_t tile = plan_.first_tile + i;
        const int64_t end = std::min(item_.k_end, (tile + 1) * index_.q_tile_tokens);
        ForEachRun(index_, index_.Row(list, tile), key_begin_, end, [&](int64_t run_begin, int64_t run_end) {
          for (int64_t at = run_begin / kStepKeys * kStepKeys; at < run_end; at += kStepKeys) {
            bool& flag = needed[(at - item_.packed_begin) / kStepKeys];
            count += flag ? 0 : 1;
            flag = true;
          }
        });
      }
    }
    if (count == 0) return false;
    const auto block_elements = static_cast<int64_t>(kernel_.packed_elements(item_.head_dim));
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_blocks * item_.num_kv_heads; ++i) {
      const int64_t block = i % num_blocks;
      if (!needed[block]) continue;
      AttentionItem item = item_;
      item.kv_head = static_cast<int32_t>(i / num_blocks);
      kernel_.pack(item, item_.packed_begin + block * kStepKeys,
                   packed + (block * item.num_kv_heads + item.kv_head) * block_elements);
    }
    return true;
  }

  void RunItems(void* scratch) const {
    char* base = static_cast<char*>(scratch);
    const size_t bytes = item_bytes();
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan_.num_items(); ++i) {
      RunItem(i, base + bytes * static_cast<size_t>(omp_get_thread_num()));
    }
  }

  // Fills in which queries and heads item number `i` has; false if the chunk has none of them. Later queries,
  // which see more keys, come first, so that no thread is left with a long item at the end.
  bool Locate(int64_t i, AttentionItem* item, int64_t* segment) const {
    const int64_t group = i % plan_.head_groups;
    const int64_t piece = plan_.pieces_per_tile - 1 - i / plan_.head_groups % plan_.pieces_per_tile;
    const int64_t tile =
        plan_.first_tile + plan_.num_tiles - 1 - i / plan_.head_groups / plan_.pieces_per_tile;
    const int64_t tile_begin = tile * index_.q_tile_tokens;
    const int64_t piece_begin = tile_begin + piece * plan_.tokens_per_item;
    const int64_t begin = std::max(piece_begin, queries_.begin);
    const int64_t end = std::min({piece_begin + plan_.tokens_per_item, tile_begin + index_.q_tile_tokens,
                                  queries_.begin + queries_.num_tokens});
    if (begin >= end) return false;
    item->token_begin = begin - queries_.begin;
    item->num_tokens = static_cast<int32_t>(end - begin);
    item->num_heads = plan_.heads_per_item;
    item->head_begin = static_cast<int32_t>(group * plan_.heads_per_item);
    item->kv_head = item->head_begin / (item->num_q_heads / item->num_kv_heads);
    const int64_t list = int64_t{item->head_begin} * index_.num_lists / item->num_q_heads;
    *segment = index_.Row(static_cast<int32_t>(list), tile);
    return true;
  }

  void RunItem(int64_t i, void* scratch) const {
    AttentionItem item = item_;
    int64_t segment = 0;
    if (!Locate(i, &item, &segment)) return;
    const int64_t last_query = item.q_begin + item.token_begin + item.num_tokens - 1;
    const int64_t first_query = item.q_begin + item.token_begin;
    const int64_t key_end = std::min(item.k_end, last_query + 1);
    // Keys from sinks_end to window_begin are masked for every query.
    const int64_t sinks_end = index_.has_element_mask() ? index_.sink_tokens : key_end;
    const int64_t window_begin =
        index_.has_element_mask() ? std::max(sinks_end, first_query - index_.window_tokens + 1) : key_end;
    bool begun = false;
    const auto visit = [&](int64_t begin, int64_t end) {
      if (begin >= end) return;
      if (!begun) kernel_.begin(item, scratch);
      begun = true;
      while (begin < end) {
        const int64_t step_end = std::min(end, (begin / kStepKeys + 1) * kStepKeys);
        kernel_.step(item, scratch, begin, step_end);
        begin = step_end;
      }
    };
    ForEachRun(index_, segment, key_begin_, std::min(key_end, sinks_end), visit);
    ForEachRun(index_, segment, std::max(key_begin_, window_begin), key_end, visit);
    if (begun) kernel_.end(item, scratch);
  }

  const BlockIndex& index_;
  const AttentionKernel& kernel_;
  const Plan plan_;
  const QueryChunk& queries_;
  AttentionItem item_;
  // Keys [key_begin_, item_.k_end) take part at the moment.
  int64_t key_begin_ = 0;
};

}  // namespace
}  // namespace cpu

Status SparseAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                       const BlockIndex& index, const AttentionState& state) {
  HW_KERNELS_RETURN_IF_ERROR(ValidateAttention(shape, queries, keys, index));
  if (queries.num_tokens == 0 || keys.num_tokens == 0) return {};
  if (state.out == nullptr || state.lse_ln == nullptr)
    return InvalidArgument("state.out or state.lse_ln is null");
  return cpu::Call(shape, queries, keys, index, state).Run();
}

}  // namespace headwater::kernels
