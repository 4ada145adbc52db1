// The C interface of pattern policies.
#include <memory>
#include <string>

#include "kernels/c_api_support.h"
#include "kernels/cuda/policy.h"
#include "kernels/cuda/range_attention.h"
#include "kernels/headwater_kernels.h"
#include "kernels/pattern/config.h"

using headwater::kernels::CudaPolicy;
using headwater::kernels::CudaPolicyShape;
using headwater::kernels::CudaSelection;
using headwater::kernels::InvalidArgument;
using headwater::kernels::PolicyParameters;
using headwater::kernels::Status;
using headwater::kernels::capi::BadStructure;
using headwater::kernels::capi::Counted;
using headwater::kernels::capi::Guarded;
using headwater::kernels::capi::WithArgs;

struct hw_policy {
  CudaPolicyShape shape;
  std::unique_ptr<CudaPolicy> policy;
  int64_t num_tokens = 0;  // of the prompt that has begun
};

namespace {

Status Create(const hw_policy_config& c, hw_policy** policy) {
  auto made = std::make_unique<hw_policy>();
  PolicyParameters parameters;
  HW_KERNELS_RETURN_IF_ERROR(headwater::kernels::ReadPolicyConfig(c, &parameters));
  made->shape = {c.num_layers, c.num_q_heads, c.num_kv_heads, c.head_dim, c.softmax_scale};
  HW_KERNELS_RETURN_IF_ERROR(headwater::kernels::MakeCudaPolicy(parameters, made->shape, &made->policy));
  *policy = made.release();
  return {};
}

Status Begin(hw_policy* policy, int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) {
  if (policy == nullptr) return InvalidArgument("policy is null");
  policy->num_tokens = 0;
  HW_KERNELS_RETURN_IF_ERROR(policy->policy->Begin(num_tokens, memory, memory_bytes, stream));
  policy->num_tokens = num_tokens;
  return {};
}

hw_selection ToC(const CudaSelection& found) {
  hw_selection c{};
  c.struct_size = sizeof c;
  c.lists = {found.lists.num_lists, found.lists.counts, found.lists.offsets, found.lists.blocks};
  c.k_means = found.correction.k_means;
  c.v_means = found.correction.v_means;
  if (found.ranges != nullptr) {
    const headwater::kernels::CudaKeyRanges& r = *found.ranges;
    c.ranges = {
        r.num_lists,     r.range_counts,   r.range_offsets, reinterpret_cast<const int32_t*>(r.ranges),
        r.column_counts, r.column_offsets, r.columns,       r.sink_tokens,
        r.window_tokens};
  }
  c.visited = found.visited;
  c.overflows = found.overflows;
  c.possible = found.possible;
  return c;
}

Status Attend(hw_policy* policy, const headwater::kernels::CudaPolicyLayer& layer,
              const headwater::kernels::CudaPolicyOutput& output, void* workspace, size_t workspace_bytes,
              cudaStream_t stream, hw_selection* selection) {
  if (policy == nullptr || policy->num_tokens == 0) {
    return InvalidArgument("policy is null, or no prompt has begun");
  }
  if (selection != nullptr && selection->struct_size != sizeof *selection) return BadStructure();
  if (layer.layer < 0 || layer.layer >= policy->shape.num_layers) {
    return InvalidArgument("layer is " + std::to_string(layer.layer) + "; 0 to " +
                           std::to_string(policy->shape.num_layers - 1) + " is wanted");
  }
  CudaSelection found;
  HW_KERNELS_RETURN_IF_ERROR(
      headwater::kernels::CudaPolicyAttention(policy->policy.get(), policy->shape, policy->num_tokens, layer,
                                              output, workspace, workspace_bytes, stream, &found));
  if (selection != nullptr) *selection = ToC(found);
  return {};
}

}  // namespace

extern "C" {

hw_status hw_policy_create(const hw_policy_config* config, hw_policy** policy) {
  if (policy == nullptr) return Guarded([] { return InvalidArgument("policy is null"); });
  *policy = nullptr;
  return WithArgs(config, [&](const hw_policy_config& c) { return Create(c, policy); });
}

void hw_policy_destroy(hw_policy* policy) { delete policy; }

size_t hw_policy_memory_bytes(const hw_policy* policy, int64_t num_tokens) {
  if (policy == nullptr || num_tokens < 1) return 0;
  return Counted([&] { return policy->policy->MemoryBytes(num_tokens); });
}

size_t hw_policy_workspace_bytes(const hw_policy* policy, int64_t num_tokens) {
  if (policy == nullptr || num_tokens < 1) return 0;
  return Counted(
      [&] { return headwater::kernels::CudaPolicyAttentionWorkspaceBytes(policy->shape, num_tokens); });
}

int32_t hw_policy_wants_lse(const hw_policy* policy) {
  return policy != nullptr && policy->policy->wants_lse() ? 1 : 0;
}

hw_status hw_policy_begin(hw_policy* policy, int64_t num_tokens, void* memory, size_t memory_bytes,
                          void* stream) {
  return Guarded(
      [&] { return Begin(policy, num_tokens, memory, memory_bytes, static_cast<cudaStream_t>(stream)); });
}

hw_status hw_policy_attention(hw_policy* policy, int32_t layer, const void* q, const void* k, const void* v,
                              void* out, float* lse_ln, void* workspace, size_t workspace_bytes, void* stream,
                              hw_selection* selection) {
  return Guarded([&] {
    return Attend(policy, {layer, q, k, v}, {out, lse_ln}, workspace, workspace_bytes,
                  static_cast<cudaStream_t>(stream), selection);
  });
}

}  // extern "C"
