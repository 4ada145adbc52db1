// The C interface of the references of pattern policies.
#include <memory>
#include <string>
#include <variant>

#include "kernels/c_api_support.h"
#include "kernels/headwater_reference.h"
#include "kernels/pattern/config.h"
#include "kernels/pattern/policy.h"

using headwater::kernels::BlockIndex;
using headwater::kernels::InvalidArgument;
using headwater::kernels::PolicyParameters;
using headwater::kernels::Status;
using headwater::kernels::capi::BadStructure;
using headwater::kernels::capi::Guarded;
using headwater::kernels::capi::LastError;
using headwater::kernels::capi::WithArgs;

struct hw_reference {
  PolicyParameters parameters;
  headwater::kernels::reference::PolicyProblem problem;  // without arrays
  headwater::kernels::reference::ShareState share;
  BlockIndex index;
};

namespace {

namespace hk = headwater::kernels;
namespace ref = headwater::kernels::reference;

// Overloads for std::visit: one layer's index.
struct Select {
  const ref::PolicyProblem& problem;
  int32_t layer;
  ref::ShareState* share;
  BlockIndex* index;

  Status operator()(const ref::FlashParameters& p) const { return FlashSelect(problem, p, nullptr, index); }
  Status operator()(const ref::Flash2Parameters& p) const {
    return Flash2Select(problem, p, layer, nullptr, index);
  }
  Status operator()(const ref::FlexParameters& p) const { return FlexSelect(problem, p, nullptr, index); }
  Status operator()(const ref::SkeletonParameters& p) const {
    return SkeletonSelect(problem, p, nullptr, index);
  }
  Status operator()(const ref::VerticalSlashParameters& p) const {
    ref::VerticalSlashTrace trace;
    return SelectVerticalSlash(problem, p, &trace, index);
  }
  Status operator()(const ref::XAttentionParameters& p) const {
    ref::XAttentionTrace trace;
    return SelectXAttention(problem, p, &trace, index);
  }
  Status operator()(const hk::ShareWithClusters& p) const {
    if (layer == 0) *share = {};
    ref::ShareLayer selected;
    HW_KERNELS_RETURN_IF_ERROR(ShareSelect(problem, p.share, p.clusters, layer, share, &selected));
    *index = std::move(selected.index);
    return {};
  }
  Status operator()(const hk::AShapeParameters& p) const {
    std::unique_ptr<hk::PatternPolicy> policy;
    HW_KERNELS_RETURN_IF_ERROR(hk::MakePolicy("a_shape",
                                              {{"sink_tokens", static_cast<double>(p.sink_tokens)},
                                               {"window_tokens", static_cast<double>(p.window_tokens)}},
                                              &policy));
    hk::PatternInputs inputs;
    inputs.num_q_heads = problem.num_q_heads;
    inputs.num_kv_heads = problem.num_kv_heads;
    inputs.num_tokens = problem.num_tokens;
    inputs.num_q_tiles = (problem.num_tokens + hk::kQueryTileTokens - 1) / hk::kQueryTileTokens;
    return policy->Select(inputs, index);
  }
  Status operator()(const hk::DenseParameters&) const { return None("dense"); }
  Status operator()(const hk::ProbeParameters&) const { return None("probe"); }
  Status operator()(const hk::HeadwaterParameters&) const { return None("headwater"); }

  static Status None(const std::string& name) {
    return {hk::StatusCode::kUnimplemented, "policy " + name + " has no reference of this kind"};
  }
};

Status Create(const hw_policy_config& c, hw_reference** reference) {
  auto made = std::make_unique<hw_reference>();
  HW_KERNELS_RETURN_IF_ERROR(hk::ReadPolicyConfig(c, &made->parameters));
  made->problem.num_q_heads = c.num_q_heads;
  made->problem.num_kv_heads = c.num_kv_heads;
  made->problem.head_dim = c.head_dim;
  made->problem.softmax_scale = c.softmax_scale;
  *reference = made.release();
  return {};
}

Status Run(hw_reference* reference, int32_t layer, hw_reference_lists* lists) {
  HW_KERNELS_RETURN_IF_ERROR(std::visit(
      Select{reference->problem, layer, &reference->share, &reference->index}, reference->parameters));
  const BlockIndex& index = reference->index;
  *lists = {};
  lists->struct_size = sizeof *lists;
  lists->num_lists = index.num_lists;
  lists->tile_positions = index.q_tile_tokens;
  lists->num_tiles = index.num_q_tiles;
  lists->dense = index.dense.data();
  lists->offsets = index.offsets.data();
  lists->blocks = index.blocks.data();
  lists->sink_tokens = index.sink_tokens;
  lists->window_tokens = index.window_tokens;
  return {};
}

}  // namespace

extern "C" {

const char* hw_reference_last_error(void) { return LastError().c_str(); }

hw_status hw_reference_create(const hw_policy_config* config, hw_reference** reference) {
  if (reference == nullptr) return Guarded([] { return InvalidArgument("reference is null"); });
  *reference = nullptr;
  return WithArgs(config, [&](const hw_policy_config& c) { return Create(c, reference); });
}

void hw_reference_destroy(hw_reference* reference) { delete reference; }

hw_status hw_reference_select(hw_reference* reference, int32_t layer, int64_t num_tokens, const float* q,
                              const float* k, const float* v, hw_reference_lists* lists) {
  return Guarded([&] {
    if (reference == nullptr || lists == nullptr || lists->struct_size != sizeof *lists) {
      return BadStructure();
    }
    reference->problem.q = q;
    reference->problem.k = k;
    reference->problem.v = v;
    reference->problem.num_tokens = num_tokens;
    return Run(reference, layer, lists);
  });
}

}  // extern "C"
