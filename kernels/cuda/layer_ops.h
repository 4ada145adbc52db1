// The element-wise operations of a transformer layer on a Hopper GPU: the device side of ops/layer_ops.h.
//
// All of them: arrays are in device memory, contiguous and 16-byte aligned; outputs do not overlap inputs,
// unless said otherwise. Calls enqueue on `stream` (the current device's) and return; arrays must live until
// the stream has passed. Sums are f32 in a fixed order: equal calls give equal bits. A NaN or an infinity
// stays within its row (with CudaSplitQkv, within its head, and the block statistics of its block).
// num_tokens = 0: OK, nothing is enqueued but where said. Cost: one read of the inputs and one write of the
// outputs.
//
// INVALID_ARGUMENT: null or misaligned arrays, sizes out of range. UNIMPLEMENTED: a type or head_dim without
// a kernel, a device that is not sm_90. INTERNAL: a CUDA call failed. num_tokens: at most 2^31 - 1; widths:
// multiples of 8, at most 2^20. Formulas, sources and tolerances: README.md, "GPU layer operations".
#ifndef HW_KERNELS_CUDA_LAYER_OPS_H_
#define HW_KERNELS_CUDA_LAYER_OPS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_stats.h"
#include "kernels/dtype.h"
#include "kernels/status.h"

namespace headwater::kernels {

// out[i, :] = table[ids[i], :].
struct CudaEmbedTokensArgs {
  const void* table = nullptr;     // bf16 [vocab, width]
  const int32_t* ids = nullptr;    // [num_tokens]; a row whose id is not of [0, vocab) becomes NaN
  void* out = nullptr;             // [num_tokens, width]
  DType out_dtype = DType::kBF16;  // or f32
  int64_t num_tokens = 0;
  int64_t vocab = 0;  // at most 2^31 - 1
  int64_t width = 0;
};
Status CudaEmbedTokens(const CudaEmbedTokensArgs& args, cudaStream_t stream);

// Largest width of CudaRmsNorm().
inline constexpr int64_t kMaxNormWidth = 16384;

// x += delta, if there is one; out = x / sqrt(mean(x^2) + epsilon) * weight, per row, of x as it is stored.
struct CudaRmsNormArgs {
  void* x = nullptr;                  // [num_tokens, width]; written only if there is a delta
  DType x_dtype = DType::kBF16;       // or f32
  const void* delta = nullptr;        // bf16 [num_tokens, width], or null
  const void* weight = nullptr;       // [width]
  DType weight_dtype = DType::kBF16;  // or f32
  void* out = nullptr;                // bf16 [num_tokens, width]; with `scale`: e4m3
  float epsilon = 0;                  // 0 or more
  int64_t num_tokens = 0;
  int64_t width = 0;       // at most kMaxNormWidth
  float* scale = nullptr;  // [num_tokens], or null: quantizes the rows (quantize.h), before any rounding
};
Status CudaRmsNorm(const CudaRmsNormArgs& args, cudaStream_t stream);

inline constexpr int32_t kMaxRotaryPairs = 128;

// cos and sin of position * inverse_i, times attention_factor, for pairs (i, i + head_dim / 2). Angles are
// formed and reduced in double, with the product's rounding error added back, so that they are exact to f32
// at any position below 2^53.
struct CudaRopeTableArgs {
  // Radians per position, [head_dim / 2]: in host memory, read before the call returns, or, where
  // inverse_device is given, in device memory.
  double inverse[kMaxRotaryPairs] = {};
  const double* inverse_device = nullptr;
  double attention_factor = 1;
  int32_t head_dim = 0;  // even, at most 2 * kMaxRotaryPairs
  int64_t num_tokens = 0;
  // Row i has position begin + i; or, in device memory, [num_tokens], positions_i32[i] or positions_i64[i]
  // (at most one of them; `begin` is not added). All of magnitude at most 2^53.
  int64_t begin = 0;
  const int32_t* positions_i32 = nullptr;
  const int64_t* positions_i64 = nullptr;
  float* cos = nullptr;  // [num_tokens, head_dim / 2]
  float* sin = nullptr;
};
Status CudaRopeTable(const CudaRopeTableArgs& args, cudaStream_t stream);

// Takes apart the rows of a fused QKV projection, normalises heads where asked, rotates Q and K, writes each
// on its own, and takes the statistics of K and V as they are written.
struct CudaSplitQkvArgs {
  const void* qkv = nullptr;  // bf16 [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;          // 64 or 128
  const void* q_norm = nullptr;  // [head_dim], or null: RMS norm of each query head before the rotation
  const void* k_norm = nullptr;
  DType norm_dtype = DType::kBF16;  // or f32
  float epsilon = 0;
  const float* cos = nullptr;  // [num_tokens, head_dim / 2], as CudaRopeTable()
  const float* sin = nullptr;
  void* q = nullptr;  // bf16 [num_tokens, num_q_heads, head_dim]
  void* k = nullptr;  // bf16 [num_tokens, num_kv_heads, head_dim]
  void* v = nullptr;
  // Statistics of the blocks of these tokens, in the arrays of the whole sequence, of which row 0 is token
  // first_token: a multiple of 128 if anything is wanted. The bits are CudaBlockStatistics()'s.
  CudaBlockStats stats;
  int64_t first_token = 0;
};
Status CudaSplitQkv(const CudaSplitQkvArgs& args, cudaStream_t stream);

// out[i, j] = silu(gate_up[i, j]) * gate_up[i, width + j]. A gate of minus infinity gives NaN.
struct CudaSiluMulArgs {
  const void* gate_up = nullptr;  // bf16 [num_tokens, 2 * width]
  void* out = nullptr;            // bf16 [num_tokens, width]; with `scale`: e4m3
  int64_t num_tokens = 0;
  int64_t width = 0;       // with `scale`: at most kMaxQuantizedWidth
  float* scale = nullptr;  // as CudaRmsNormArgs's
};
Status CudaSiluMul(const CudaSiluMulArgs& args, cudaStream_t stream);

// *row = index of the first row with a NaN or an infinity, -1: none (also where num_tokens is 0).
struct CudaFirstNonFiniteRowArgs {
  const void* x = nullptr;     // [num_tokens, width]
  DType dtype = DType::kBF16;  // or f32
  int64_t num_tokens = 0;
  int64_t width = 0;
  int64_t* row = nullptr;  // device memory, 8-byte aligned
};
Status CudaFirstNonFiniteRow(const CudaFirstNonFiniteRowArgs& args, cudaStream_t stream);

// Tokens [source_token, source_token + count) go to destination + destination_offset, one after the other.
struct CudaTokenRun {
  int64_t source_token;
  int64_t count;
  int64_t destination_offset;  // bytes, a multiple of 16
};

// K or V of one layer, both or one, in the order and the type in which it travels: conversion and gather in
// one pass. A token of the wire is num_kv_heads * head_dim elements (blocks are token-major).
struct CudaPackKvArgs {
  const void* k = nullptr;  // bf16 [num_tokens, num_kv_heads, head_dim]; null together with k_destination
  const void* v = nullptr;
  int64_t num_tokens = 0;
  int32_t num_kv_heads = 0;  // num_kv_heads * head_dim is a multiple of 8
  int32_t head_dim = 0;
  // Device memory, or host memory that is pinned and mapped; destination_bytes each.
  void* k_destination = nullptr;
  void* v_destination = nullptr;
  int64_t destination_bytes = 0;
  // f16: finite values beyond +-65504 become +-65504; infinities and NaNs stay what they are.
  DType wire_dtype = DType::kBF16;
  const CudaTokenRun* runs = nullptr;  // [num_runs], device memory, not checked by the host
  int32_t num_runs = 0;                // 0: OK, nothing is enqueued
  // Device memory, or null. Bits are added to what is there.
  uint32_t* problems = nullptr;
  static constexpr uint32_t kNotRepresentable = 1;  // a value was not finite, or went to f16's limit
  static constexpr uint32_t kBadRun = 2;  // a run left the source or the destination, and was left out whole
};
// The work is split evenly over the runs: long runs beside short ones cost time.
Status CudaPackKv(const CudaPackKvArgs& args, cudaStream_t stream);

// Copies what the host reads while other things leave the device: a kernel does it, for the engine that
// cudaMemcpyAsync() takes may have a layer's K and V before it, and the stream would wait for them. Meant for
// up to some 100 KB. from: device memory; to: host memory that is pinned and mapped, whole once the stream
// has come to what is enqueued next; both 4-byte aligned, not checked otherwise. bytes: a multiple of 4.
Status CudaStoreToHost(const void* from, void* to, int64_t bytes, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_LAYER_OPS_H_
