// How an attention call is cut into items, and their keys into steps. Internal to kernels/.
#ifndef HW_KERNELS_CPU_ATTENTION_PLAN_H_
#define HW_KERNELS_CPU_ATTENTION_PLAN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels/attention/attention.h"
#include "kernels/cpu/attention_kernel.h"

namespace headwater::kernels::cpu {

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeDeleter>;

// 64-byte aligned; null: no memory.
inline Memory Allocate(size_t bytes) {
  return Memory(std::aligned_alloc(64, std::max<size_t>((bytes + 63) / 64, 1) * 64));
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

// No plan of this shape has more lanes in an item.
int32_t MaxLanes(const AttentionShape& shape);

// The largest number of heads, at most 16, that always share KV head and block list.
int32_t SharedHeads(const AttentionShape& shape, const BlockIndex& index);

Plan MakePlan(const AttentionShape& shape, const QueryChunk& queries, const BlockIndex& index);

// What all items of a call have in common.
AttentionItem CommonItem(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                         const BlockIndex& index, const AttentionState& state);

// Fills in which queries and heads item number `i` has, and the segment of `index` that they follow; false if
// the chunk has no such queries. Later queries, which see more keys, come first, so that no thread is left
// with a long item at the end.
bool LocateItem(const Plan& plan, const QueryChunk& queries, const BlockIndex& index, int64_t i,
                AttentionItem* item, int64_t* segment);

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

// Calls step(begin, end) for all key positions in [key_begin, key_end) that some query of `item` may see,
// rising, as AttentionKernel::step() wants them.
template <typename Step>
void ForEachStep(const BlockIndex& index, const AttentionItem& item, int64_t segment, int64_t key_begin,
                 int64_t key_end, const Step& step) {
  const int64_t first_query = item.q_begin + item.token_begin;
  key_end = std::min(key_end, first_query + item.num_tokens);
  // Keys from sinks_end to window_begin are masked for every query.
  int64_t sinks_end = key_end;
  int64_t window_begin = key_end;
  if (index.has_element_mask()) {
    sinks_end = std::min(key_end, index.sink_tokens);
    window_begin = std::max({key_begin, sinks_end, first_query - index.window_tokens + 1});
  }
  const auto visit = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t step_end = std::min(end, (begin / kStepKeys + 1) * kStepKeys);
      step(begin, step_end);
      begin = step_end;
    }
  };
  ForEachRun(index, segment, key_begin, sinks_end, visit);
  ForEachRun(index, segment, window_begin, key_end, visit);
}

}  // namespace headwater::kernels::cpu

#endif  // HW_KERNELS_CPU_ATTENTION_PLAN_H_
