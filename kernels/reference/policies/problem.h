// What the references of published sparse methods take: one layer's Q, K and V of one prompt. Each method has
// a file here, in obvious loops and double precision, written from its paper and, where they differ, from
// what its official code does; the stages of the method are returned beside its blocks, so that each can be
// checked alone.
#ifndef HW_KERNELS_REFERENCE_POLICIES_PROBLEM_H_
#define HW_KERNELS_REFERENCE_POLICIES_PROBLEM_H_

#include <cstdint>

namespace headwater::kernels::reference {

// Arrays live as long as the call. Query head h reads KV head h / (num_q_heads / num_kv_heads).
struct PolicyProblem {
  const float* q = nullptr;  // [num_tokens, num_q_heads, head_dim], rotated
  const float* k = nullptr;  // [num_tokens, num_kv_heads, head_dim], rotated
  const float* v = nullptr;  // as k; null where a method does not look at it
  int64_t num_tokens = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  double softmax_scale = 0;

  const float* Q(int64_t token, int32_t head) const { return q + (token * num_q_heads + head) * head_dim; }
  const float* K(int64_t token, int32_t q_head) const {
    return k + (token * num_kv_heads + q_head / (num_q_heads / num_kv_heads)) * head_dim;
  }
};

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_PROBLEM_H_
