// The operations of ops/layer_ops.h and cuda/layer_ops.h in obvious loops and double precision; results are
// not rounded.
#ifndef HW_KERNELS_REFERENCE_LAYER_OPS_H_
#define HW_KERNELS_REFERENCE_LAYER_OPS_H_

#include <cstdint>
#include <vector>

namespace headwater::kernels::reference {

// x / sqrt(mean(x^2) + epsilon) * weight per row of x [num_tokens, width].
std::vector<double> RmsNorm(const float* x, const float* weight, double epsilon, int64_t num_tokens,
                            int64_t width);

// cos and sin of position * inverse, times factor; angles in long double. [positions, inverse].
struct RopeTables {
  std::vector<double> cos, sin;
};
RopeTables RopeTable(const std::vector<int64_t>& positions, const std::vector<double>& inverse,
                     double factor);

// As SplitQkvArgs.
struct SplitQkvArgs {
  const float* qkv = nullptr;  // [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  const float* q_norm = nullptr;  // [head_dim], or null
  const float* k_norm = nullptr;
  double epsilon = 0;
  const float* cos = nullptr;  // [num_tokens, head_dim / 2]
  const float* sin = nullptr;
};
struct Qkv {
  std::vector<double> q, k, v;  // [num_tokens, heads, head_dim]
};
Qkv SplitQkv(const SplitQkvArgs& args);

// silu(gate) * up per row of gate_up [num_tokens, 2 * width].
std::vector<double> SiluMul(const float* gate_up, int64_t num_tokens, int64_t width);

// x W^T + bias (+ y) for x [num_tokens, in], weight [out, in]; bias [out] and y [num_tokens, out] or null.
std::vector<double> Linear(const float* x, const float* weight, const float* bias, const float* y,
                           int64_t num_tokens, int64_t in, int64_t out);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_LAYER_OPS_H_
