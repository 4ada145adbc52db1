// What the attention driver (attention.cc) and the kernels for each instruction set agree on. Internal to
// kernels/.
//
// Work is cut into items: some consecutive queries of one query tile times some heads of one KV head that
// share a block list. The (query, head) pairs of an item are its lanes, queries outermost; lanes lie in SIMD
// lanes, so that softmax over keys needs no horizontal operation. A strip is as many lanes as a kernel takes
// at once. The driver feeds the keys of an item in steps.
#ifndef HW_KERNELS_CPU_ATTENTION_KERNEL_H_
#define HW_KERNELS_CPU_ATTENTION_KERNEL_H_

#include <cstddef>
#include <cstdint>

namespace headwater::kernels::cpu {

// Keys of one step; steps begin and end at multiples of it or at the ends of a run of keys.
inline constexpr int32_t kStepKeys = 128;

enum class ElementType : int32_t { kF32, kF16, kBF16 };

struct AttentionItem {
  int32_t head_dim = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  float scale_log2 = 0;  // softmax_scale * log2(e)

  const void* q = nullptr;
  ElementType q_type = ElementType::kF32;
  int64_t q_begin = 0;  // position of the first row of q
  const void* k = nullptr;
  const void* v = nullptr;
  ElementType kv_type = ElementType::kF32;
  int64_t k_begin = 0;  // position of the first row of k and v
  int64_t k_end = 0;
  // Kernels with pack() only: [blocks][num_kv_heads] packed blocks; the first block is that of position
  // packed_begin, a multiple of kStepKeys.
  const uint16_t* packed = nullptr;
  int64_t packed_begin = 0;

  float* out = nullptr;
  float* lse_ln = nullptr;

  int64_t token_begin = 0;  // row of q
  int32_t num_tokens = 0;
  int32_t head_begin = 0;
  int32_t num_heads = 0;
  int32_t kv_head = 0;

  int64_t sink_tokens = -1;  // as in BlockIndex
  int64_t window_tokens = -1;
};

struct AttentionKernel {
  // Bytes of scratch for an item, 64-byte aligned.
  size_t (*scratch_bytes)(int32_t head_dim, int32_t num_lanes);
  void (*begin)(const AttentionItem& item, void* scratch);
  // Keys at positions [key_begin, key_end): at most kStepKeys, inside the chunk and inside one block of
  // kStepKeys positions. Rising from call to call.
  void (*step)(const AttentionItem& item, void* scratch, int64_t key_begin, int64_t key_end);
  void (*end)(const AttentionItem& item, void* scratch);
  // Null, or: elements of one packed block of kStepKeys keys of one KV head; and packs the one whose first
  // key has position `block_begin` into `to`. `item` names the keys and the KV head.
  size_t (*packed_elements)(int32_t head_dim);
  void (*pack)(const AttentionItem& item, int64_t block_begin, uint16_t* to);
};

// Multiply in f32; any element types.
extern const AttentionKernel kPortableAttention;
#if defined(__x86_64__)
extern const AttentionKernel kAvx2Attention;
extern const AttentionKernel kAvx512Attention;
// Multiply in bf16; all inputs bf16.
extern const AttentionKernel kAvx512Bf16Attention;
extern const AttentionKernel kAmxAttention;
#endif

}  // namespace headwater::kernels::cpu

#endif  // HW_KERNELS_CPU_ATTENTION_KERNEL_H_
