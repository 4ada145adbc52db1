// Attention for few lanes: one token, or few, as in decoding. Keys are read once, in place, with head_dim in
// SIMD lanes. Internal to kernels/; terms as in attention_kernel.h.
#ifndef HW_KERNELS_CPU_ATTENTION_FEW_H_
#define HW_KERNELS_CPU_ATTENTION_FEW_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/attention_kernel.h"

namespace headwater::kernels::cpu {

inline constexpr int32_t kFewLanes = 8;

// Softmax attention over some of the keys, not normalised.
struct FewPartial {
  float m[kFewLanes];       // largest score times scale_log2, -infinity: no key seen
  float l[kFewLanes];       // sum of exp2(scaled score - m)
  float o[kFewLanes][256];  // sum of the same times V
};

struct FewKernel {
  // Bytes of scratch for step(), 64-byte aligned.
  size_t (*scratch_bytes)(int32_t head_dim);
  // Adds the keys at positions [key_begin, key_end), at most kStepKeys, to `partial`. At most kFewLanes
  // lanes. Arithmetic is f32, whatever the element types.
  void (*step)(const AttentionItem& item, void* scratch, int64_t key_begin, int64_t key_end,
               FewPartial* partial);
};

extern const FewKernel kPortableFew;
#if defined(__x86_64__)
extern const FewKernel kAvx2Few;
extern const FewKernel kAvx512Few;
#endif

}  // namespace headwater::kernels::cpu

#endif  // HW_KERNELS_CPU_ATTENTION_FEW_H_
