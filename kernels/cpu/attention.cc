#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <string>

#include <omp.h>

#include "kernels/cpu/attention_few.h"
#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/cpu_features.h"

namespace headwater::kernels {
namespace cpu {
namespace {

// Most keys that are packed at a time.
constexpr int64_t kPackedKeys = 4096;
constexpr int64_t kPackedBlocks = kPackedKeys / kStepKeys;

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

class Call {
 public:
  Call(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys, const BlockIndex& index,
       const AttentionState& state)
      : index_(index),
        kernel_(KernelFor(queries.dtype, keys.dtype)),
        plan_(MakePlan(shape, queries, index)),
        queries_(queries),
        item_(CommonItem(shape, queries, keys, index, state)),
        key_begin_(keys.begin) {}

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

  void RunItem(int64_t i, void* scratch) const {
    AttentionItem item = item_;
    int64_t segment = 0;
    if (!LocateItem(plan_, queries_, index_, i, &item, &segment)) return;
    bool begun = false;
    ForEachStep(index_, item, segment, key_begin_, item_.k_end, [&](int64_t begin, int64_t end) {
      if (!begun) kernel_.begin(item, scratch);
      begun = true;
      kernel_.step(item, scratch, begin, end);
    });
    if (begun) kernel_.end(item, scratch);
  }

  const BlockIndex& index_;
  const AttentionKernel& kernel_;
  const Plan plan_;
  const QueryChunk& queries_;
  AttentionItem item_;
  // Keys [key_begin_, item_.k_end) take part at the moment.
  int64_t key_begin_;
};

// Few lanes: keys are cut into splits, so that threads can share one token's keys, and the splits' results
// merged in order. The cut depends on the shapes alone.
class FewCall {
 public:
  FewCall(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
          const BlockIndex& index, const AttentionState& state)
      : index_(index),
        kernel_(Kernel()),
        plan_(MakePlan(shape, queries, index)),
        queries_(queries),
        item_(CommonItem(shape, queries, keys, index, state)) {
    item_.k_end = std::min(item_.k_end, queries.begin + queries.num_tokens);
    const int64_t num_keys = std::max<int64_t>(item_.k_end - item_.k_begin, 0);
    const int64_t most_splits = std::clamp<int64_t>(kMaxPartials / plan_.num_items(), 1, kMaxSplits);
    split_keys_ = std::max(kLeastSplitKeys, (num_keys + most_splits - 1) / most_splits);
    num_splits_ = (num_keys + split_keys_ - 1) / split_keys_;
  }

  static uint64_t MostScratchBytes(const AttentionShape& shape, uint64_t threads) {
    const auto items = static_cast<uint64_t>(shape.num_q_heads) * kFewLanes;
    return std::max<uint64_t>(kMaxPartials, items) * sizeof(FewPartial) +
           threads * (Kernel().scratch_bytes(shape.head_dim) + 63) + 63;
  }

  Status Run() {
    const size_t bytes = (kernel_.scratch_bytes(item_.head_dim) + 63) / 64 * 64;
    const int64_t num_tasks = plan_.num_items() * num_splits_;
    const Memory scratch = Allocate(bytes * static_cast<size_t>(omp_get_max_threads()));
    const Memory partial_memory = Allocate(static_cast<size_t>(num_tasks) * sizeof(FewPartial));
    if (scratch == nullptr || partial_memory == nullptr) {
      return {StatusCode::kResourceExhausted,
              "no memory for " + std::to_string(num_tasks) + " partial results of attention"};
    }
    auto* partials = static_cast<FewPartial*>(partial_memory.get());
    char* base = static_cast<char*>(scratch.get());
#pragma omp parallel for schedule(dynamic, 1) if (num_tasks > 1)
    for (int64_t i = 0; i < num_tasks; ++i) {
      RunTask(i, base + bytes * static_cast<size_t>(omp_get_thread_num()), partials + i);
    }
    for (int64_t i = 0; i < plan_.num_items(); ++i) Merge(i, partials + i * num_splits_);
    return {};
  }

 private:
  static constexpr int64_t kLeastSplitKeys = 512;
  static constexpr int64_t kMaxSplits = 64;
  static constexpr int64_t kMaxPartials = 256;

  static const FewKernel& Kernel() {
#if defined(__x86_64__)
    const CpuPath path = ActivePath();
    if (path >= CpuPath::kAvx512) return kAvx512Few;
    if (path >= CpuPath::kAvx2) return kAvx2Few;
#endif
    return kPortableFew;
  }

  void RunTask(int64_t i, void* scratch, FewPartial* partial) const {
    AttentionItem item = item_;
    int64_t segment = 0;
    if (!LocateItem(plan_, queries_, index_, i / num_splits_, &item, &segment)) return;
    for (int32_t lane = 0; lane < item.num_tokens * item.num_heads; ++lane) {
      partial->m[lane] = -INFINITY;
      partial->l[lane] = 0;
      std::fill_n(partial->o[lane], item.head_dim, 0.0f);
    }
    const int64_t begin = item.k_begin + i % num_splits_ * split_keys_;
    const int64_t end = std::min(item.k_end, begin + split_keys_);
    ForEachStep(index_, item, segment, begin, end, [&](int64_t step_begin, int64_t step_end) {
      kernel_.step(item, scratch, step_begin, step_end, partial);
    });
  }

  void Merge(int64_t i, const FewPartial* partials) const {
    AttentionItem item = item_;
    int64_t segment = 0;
    if (!LocateItem(plan_, queries_, index_, i, &item, &segment)) return;
    for (int32_t lane = 0; lane < item.num_tokens * item.num_heads; ++lane) {
      const int64_t row = (item.token_begin + lane / item.num_heads) * item.num_q_heads + item.head_begin +
                          lane % item.num_heads;
      MergeLane(partials, lane, item.head_dim, item.out + row * item.head_dim, item.lse_ln + row);
    }
  }

  void MergeLane(const FewPartial* partials, int32_t lane, int32_t dim, float* out, float* lse_ln) const {
    constexpr double kLog2E = 1.4426950408889634;
    const double start = static_cast<double>(*lse_ln) * kLog2E;
    double top = start;
    bool seen = false;
    for (int64_t s = 0; s < num_splits_; ++s) {
      top = std::max(top, static_cast<double>(partials[s].m[lane]));
      seen = seen || partials[s].l[lane] != 0;  // also if NaN
    }
    if (!seen) return;
    double values[256];
    double sum = std::exp2(start - top);
    for (int32_t c = 0; c < dim; ++c) values[c] = sum * static_cast<double>(out[c]);
    for (int64_t s = 0; s < num_splits_; ++s) {
      if (partials[s].l[lane] == 0) continue;
      const double weight = std::exp2(static_cast<double>(partials[s].m[lane]) - top);
      sum += weight * static_cast<double>(partials[s].l[lane]);
      for (int32_t c = 0; c < dim; ++c) values[c] += weight * static_cast<double>(partials[s].o[lane][c]);
    }
    for (int32_t c = 0; c < dim; ++c) out[c] = static_cast<float>(values[c] / sum);
    *lse_ln = static_cast<float>((top + std::log2(sum)) / kLog2E);
  }

  const BlockIndex& index_;
  const FewKernel& kernel_;
  const Plan plan_;
  const QueryChunk& queries_;
  AttentionItem item_;
  int64_t split_keys_ = 0;
  int64_t num_splits_ = 0;
};

uint64_t MostScratchBytes(const AttentionShape& shape, int64_t num_keys) {
  const auto threads = static_cast<uint64_t>(omp_get_max_threads());
  uint64_t bytes = 0;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const AttentionKernel& kernel = KernelFor(dtype, dtype);
    uint64_t needed = threads * (kernel.scratch_bytes(shape.head_dim, MaxLanes(shape)) + 63);
    if (kernel.pack != nullptr) {
      const int64_t blocks = std::min(num_keys / kStepKeys + 2, kPackedBlocks);
      needed +=
          static_cast<uint64_t>(blocks * shape.num_kv_heads) * kernel.packed_elements(shape.head_dim) * 2;
    }
    bytes = std::max(bytes, needed + 63);
  }
  return std::max(bytes, FewCall::MostScratchBytes(shape, threads));
}

bool IsFew(const AttentionShape& shape, const QueryChunk& queries, const BlockIndex& index) {
  return queries.num_tokens * SharedHeads(shape, index) <= kFewLanes;
}

}  // namespace
}  // namespace cpu

uint64_t AttentionScratchBytes(const AttentionShape& shape, int64_t num_keys) {
  return cpu::MostScratchBytes(shape, num_keys);
}

Status SparseAttention(const AttentionShape& shape, const QueryChunk& queries, const KeyChunk& keys,
                       const BlockIndex& index, const AttentionState& state) {
  HW_KERNELS_RETURN_IF_ERROR(ValidateAttention(shape, queries, keys, index));
  if (queries.num_tokens == 0 || keys.num_tokens == 0) return {};
  if (state.out == nullptr || state.lse_ln == nullptr)
    return InvalidArgument("state.out or state.lse_ln is null");
  if (cpu::IsFew(shape, queries, index)) return cpu::FewCall(shape, queries, keys, index, state).Run();
  return cpu::Call(shape, queries, keys, index, state).Run();
}

}  // namespace headwater::kernels
