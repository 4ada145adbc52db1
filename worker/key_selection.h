// KeySelection: which key blocks of the prompt each rank's queries look at, per KV head.
#ifndef HW_WORKER_KEY_SELECTION_H_
#define HW_WORKER_KEY_SELECTION_H_

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"

#include "base/status_macros.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/block_index.h"
#include "worker/job_control.h"
#include "worker/partition.h"

namespace headwater {

// A bitmap of [world_size][key blocks of kKeyBlockTokens][KV heads], each rank's in whole words. Does not own
// its words. Bits of a rank past its last block, which only a peer can set, are never looked at.
class KeySelection {
 public:
  // Words of one rank, for a prompt of `num_tokens`.
  static int64_t Words(int64_t num_kv_heads, int64_t num_tokens) {
    return (num_kv_heads * ((num_tokens - 1) / kernels::kKeyBlockTokens + 1) + 63) / 64;
  }

  // words: [world_size * Words()], which must outlive this.
  KeySelection(const kernels::AttentionShape& shape, int64_t num_tokens, uint64_t* words)
      : num_q_heads_(shape.num_q_heads),
        num_kv_heads_(shape.num_kv_heads),
        rank_words_(Words(shape.num_kv_heads, num_tokens)),
        words_(words) {}

  int64_t rank_words() const { return rank_words_; }
  uint64_t* row(int rank) const { return words_ + rank * rank_words_; }

  void Clear(int rank) const { std::fill_n(row(rank), rank_words_, 0); }
  // Adds what any tile of `index`, of this prompt and in blocks of kKeyBlockTokens, selects: for a KV head,
  // what any of its query heads does.
  void Add(int rank, const kernels::BlockIndex& index) const;

  bool Selects(int rank, int64_t block, int32_t kv_head) const {
    const int64_t bit = block * num_kv_heads_ + kv_head;
    return (row(rank)[bit / 64] >> (bit % 64) & 1) != 0;
  }

  // Calls run(offset, bytes) for what `rank` selects of a chunk's K (or V, which lies alike): maximal runs
  // within a token, or of whole tokens of a block, ascending. ranges: the chunk's; head_bytes: of one token
  // and KV head. The job control's error.
  template <typename Run>
  absl::Status ForEachRun(int rank, const RankTokens& ranges, uint64_t head_bytes, JobControl* control,
                          const Run& run) const {
    const uint64_t row_bytes = head_bytes * static_cast<uint64_t>(num_kv_heads_);
    uint64_t offset = 0;
    return ForEachBlock(ranges, [&](int64_t block, uint64_t tokens) -> absl::Status {
      HW_RETURN_IF_ERROR(control->Step());
      const uint64_t heads = NumSelected(rank, block);
      if (heads * head_bytes == row_bytes) {
        run(offset, tokens * row_bytes);
      } else if (heads > 0) {
        for (uint64_t token = 0; token < tokens; ++token) {
          RunsOfToken(rank, block, head_bytes, offset + token * row_bytes, run);
        }
      }
      offset += tokens * row_bytes;
      return absl::OkStatus();
    });
  }

  // Of K and V together, in what `rank` selects of the chunk.
  uint64_t SelectedBytes(int rank, const RankTokens& ranges, uint64_t head_bytes) const {
    uint64_t bytes = 0;
    ForEachBlock(ranges, [&](int64_t block, uint64_t tokens) {
      bytes += 2 * tokens * NumSelected(rank, block) * head_bytes;
      return absl::OkStatus();
    }).IgnoreError();
    return bytes;
  }

 private:
  void Set(int rank, int64_t block, int32_t kv_head) const {
    const int64_t bit = block * num_kv_heads_ + kv_head;
    row(rank)[bit / 64] |= uint64_t{1} << (bit % 64);
  }
  uint64_t NumSelected(int rank, int64_t block) const {
    uint64_t count = 0;
    for (int32_t head = 0; head < num_kv_heads_; ++head) count += Selects(rank, block, head) ? 1 : 0;
    return count;
  }
  // visit(block, tokens) for the part of each block that a range holds, in order.
  template <typename Visit>
  static absl::Status ForEachBlock(const RankTokens& ranges, const Visit& visit) {
    for (const TokenRange& range : ranges) {
      for (int64_t begin = range.begin; begin < range.end;) {
        const int64_t block = begin / kernels::kKeyBlockTokens;
        const int64_t end = std::min(range.end, (block + 1) * kernels::kKeyBlockTokens);
        HW_RETURN_IF_ERROR(visit(block, static_cast<uint64_t>(end - begin)));
        begin = end;
      }
    }
    return absl::OkStatus();
  }
  template <typename Run>
  void RunsOfToken(int rank, int64_t block, uint64_t head_bytes, uint64_t offset, const Run& run) const {
    for (int32_t head = 0; head < num_kv_heads_;) {
      int32_t end = head;
      while (end < num_kv_heads_ && Selects(rank, block, end)) ++end;
      const auto count = static_cast<uint64_t>(end - head);
      if (count > 0) run(offset + static_cast<uint64_t>(head) * head_bytes, count * head_bytes);
      head = end + 1;
    }
  }

  const int32_t num_q_heads_;
  const int32_t num_kv_heads_;
  const int64_t rank_words_;
  uint64_t* const words_;
};

}  // namespace headwater

#endif  // HW_WORKER_KEY_SELECTION_H_
