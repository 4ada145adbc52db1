// The element-wise operations of a transformer layer on the CPU. All use the calling thread's OpenMP team;
// none allocates. Any element type may go in and out. Rows are contiguous; outputs do not overlap inputs,
// unless said otherwise.
#ifndef HW_KERNELS_OPS_LAYER_OPS_H_
#define HW_KERNELS_OPS_LAYER_OPS_H_

#include <cstdint>
#include <vector>

#include "kernels/dtype.h"

namespace headwater::kernels {

// out[i, :] = table[ids[i], :]; ids must be below the table's rows. table: [vocab, width] of `dtype`; out:
// f32.
void EmbedTokens(const void* table, DType dtype, int64_t width, const int32_t* ids, int64_t num_tokens,
                 float* out);

// out = x / sqrt(mean(x^2) + epsilon) * weight, per row of `width`.
void RmsNorm(const float* x, const float* weight, float epsilon, int64_t num_tokens, int64_t width, void* out,
             DType out_dtype);

// Largest head_dim of SplitQkv().
inline constexpr int32_t kMaxRotaryHeadDim = 256;

// Frequencies of rotary embedding for pairs (i, i + head_dim / 2), i < head_dim / 2, in double.
struct RopeFrequencies {
  std::vector<double> inverse;  // [head_dim / 2], radians per position
  double attention_factor = 1;  // multiplies cos and sin
};

// cos and sin of positions [begin, begin + num_tokens): angles are formed and reduced in double, so that they
// stay exact to f32 at any position below 2^53. cos, sin: [num_tokens, head_dim / 2].
void RopeTable(const RopeFrequencies& frequencies, int64_t begin, int64_t num_tokens, float* cos, float* sin);

// Takes apart the rows of a fused QKV projection, normalises heads where asked, rotates Q and K and writes
// each on its own.
struct SplitQkvArgs {
  const float* qkv = nullptr;  // [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;           // even, at most kMaxRotaryHeadDim
  const float* q_norm = nullptr;  // [head_dim], or null: RMS norm of each query head before the rotation
  const float* k_norm = nullptr;
  float epsilon = 0;
  const float* cos = nullptr;  // [num_tokens, head_dim / 2]
  const float* sin = nullptr;
  DType out_dtype = DType::kF32;
  void* q = nullptr;  // [num_tokens, num_q_heads, head_dim]
  void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim]
  void* v = nullptr;
};
void SplitQkv(const SplitQkvArgs& args);

// out[i, j] = silu(gate_up[i, j]) * gate_up[i, width + j]; gate_up: [num_tokens, 2 * width] of gate_up_dtype.
void SiluMul(const void* gate_up, DType gate_up_dtype, int64_t num_tokens, int64_t width, void* out,
             DType out_dtype);

// Index of the first row with a NaN or an infinity, -1: none. x: [num_tokens, width].
int64_t FirstNonFiniteRow(const float* x, int64_t num_tokens, int64_t width);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_OPS_LAYER_OPS_H_
