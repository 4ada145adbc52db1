// CudaPolicy: decides on the GPU which keys each query tile of a prompt attends to, layer by layer. Every
// published method has a class in cuda/policies/; its rule is that of the reference of the same name in
// reference/policies/.
#ifndef HW_KERNELS_CUDA_POLICY_H_
#define HW_KERNELS_CUDA_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/recall_threshold.h"
#include "kernels/pattern/parameters.h"
#include "kernels/status.h"

namespace headwater::kernels {

struct CudaPolicyShape {
  int32_t num_layers = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float softmax_scale = 0;
};

// One layer of one prompt: bf16, device memory, 16-byte aligned, contiguous, rotated.
struct CudaPolicyLayer {
  int32_t layer = 0;
  const void* q = nullptr;  // [num_tokens, num_q_heads, head_dim]; after BeginRanges() those of `range`
  const void* k = nullptr;  // [num_tokens, num_kv_heads, head_dim]
  const void* v = nullptr;  // as k
  int32_t range = 0;        // of BeginRanges()
};

// Keys to the token, for the two methods whose patterns are not blocks (cuda/range_attention.h).
struct CudaKeyRanges;

// What a layer's attention reads; device memory of the policy, valid until its next Select() on the same
// stream.
struct CudaSelection {
  CudaBlockLists lists;                   // num_lists 0: dense, unless `ranges` is set
  CudaQueryRange queries = {};            // whose tiles `lists` are of
  CudaMeanCorrection correction;          // for what `lists` leaves out
  const CudaKeyRanges* ranges = nullptr;  // in place of lists
  // uint64 and uint32 in device memory, or null: as CudaListsOfMasksArgs has them.
  const uint64_t* visited = nullptr;
  const uint32_t* overflows = nullptr;
  uint64_t possible = 0;  // what *visited is a share of
};

// Settings for one layer's search, in place of the policy's.
struct CudaSearchSettings {
  // Host memory [num_kv_heads], read before the call returns; as CudaSearchArgs has them. Null: the policy's.
  const float* thresholds = nullptr;
  const int32_t* windows = nullptr;
  double forced_density = 0;  // as CudaSearchArgs has it
};

// Not thread-safe; one prompt at a time. Calls enqueue on the stream that they are given, which is the same
// for a whole prompt, and return without waiting for it.
class CudaPolicy {
 public:
  virtual ~CudaPolicy() = default;

  // Device memory for a prompt of num_tokens: lists, scratch, and what layers leave for later ones. 256-byte
  // aligned.
  virtual size_t MemoryBytes(int64_t num_tokens) const = 0;

  // A new prompt; what an earlier one left is forgotten. `memory` lives until the next Begin() or the end of
  // the work that has been enqueued. INVALID_ARGUMENT: too little memory, misaligned, num_tokens outside 1 to
  // 2^31 - 1.
  virtual Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) = 0;

  // A prompt of which only some queries are asked for, in ranges that ascend and start on multiples of 128;
  // the others are another device's. Ranges of a layer are selected one after the other, and the selections
  // of all stay until the next layer's. What a query sees of K and V must be there; the layer's block means
  // are in stats() already, of all blocks that a superblock shares with what is seen. RangesMemoryBytes(): at
  // most MemoryBytes(), but for alignment and a tile's list a range. UNIMPLEMENTED: a policy that compares
  // queries with each other; the rest as Begin().
  virtual size_t RangesMemoryBytes(int64_t /*num_tokens*/,
                                   const std::vector<CudaQueryRange>& /*ranges*/) const {
    return 0;
  }
  virtual Status BeginRanges(int64_t /*num_tokens*/, const std::vector<CudaQueryRange>& /*ranges*/,
                             void* /*memory*/, size_t /*memory_bytes*/, cudaStream_t /*stream*/) {
    return {StatusCode::kUnimplemented, "this policy takes whole prompts alone"};
  }
  // Where a layer's block means go before Select(), after BeginRanges().
  virtual CudaBlockStats stats() const { return {}; }

  // Layers go up, from 0 or later.
  virtual Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) = 0;

  // Selects anew for a layer that Select() has been called for, with other settings. Heads whose settings are
  // as they were get equal lists. UNIMPLEMENTED: a policy without such settings.
  virtual Status Reselect(const CudaPolicyLayer& /*layer*/, const CudaSearchSettings& /*settings*/,
                          cudaStream_t /*stream*/, CudaSelection* /*selection*/) {
    return {StatusCode::kUnimplemented, "this policy has no settings of a single layer"};
  }

  // Thresholds for Reselect() under which the layer's lists hold the goal, of a layer that Select() has
  // searched, with the policy's windows. UNIMPLEMENTED: a policy without thresholds.
  virtual Status ThresholdsForRecall(const CudaPolicyLayer& /*layer*/, const CudaRecallGoal& /*goal*/,
                                     cudaStream_t /*stream*/) {
    return {StatusCode::kUnimplemented, "this policy has no thresholds"};
  }

  // Whether Finish() wants the layer's lse_ln [num_tokens, num_q_heads], f32.
  virtual bool wants_lse() const { return false; }
  // After the layer's attention has been enqueued.
  virtual Status Finish(const CudaPolicyLayer& /*layer*/, const float* /*lse_ln*/, cudaStream_t /*stream*/) {
    return {};
  }
};

// INVALID_ARGUMENT: shape out of range. UNIMPLEMENTED: a policy or parameter that the GPU has no path for;
// the message names it.
Status MakeCudaPolicy(const PolicyParameters& parameters, const CudaPolicyShape& shape,
                      std::unique_ptr<CudaPolicy>* made);

// What a layer's attention over a selection needs besides its arrays.
struct CudaPolicyOutput {
  void* out = nullptr;      // bf16 as q; may be q itself, unless the policy wants_lse()
  float* lse_ln = nullptr;  // f32 [num_tokens, num_q_heads]; may be null unless the policy wants_lse()
};

// Whether the GPU has a path for BeginRanges().
bool CudaPolicyTakesRanges(const PolicyParameters& parameters);
// Whether what the policy selects are blocks: `lists`, or everything.
bool CudaPolicyListsBlocks(const PolicyParameters& parameters);

// Device memory for CudaPolicyAttention(), 256-byte aligned.
size_t CudaPolicyAttentionWorkspaceBytes(const CudaPolicyShape& shape, int64_t num_tokens);

// Attention of some queries over a selection of blocks for the whole prompt: layer.q and `output` are theirs.
// scratch: of CudaPartBytes(), which may be used again once the stream has passed. UNIMPLEMENTED: `queries`
// begin within a tile of the lists; the rest as CudaAttentionOver(), without Finish().
size_t CudaPartBytes(const CudaPolicyShape& shape, int64_t num_tokens);
Status CudaAttentionOverPart(const CudaSelection& selection, const CudaQueryRange& queries,
                             const CudaPolicyShape& shape, int64_t num_tokens, const CudaPolicyLayer& layer,
                             const CudaPolicyOutput& output, void* scratch, void* workspace,
                             size_t workspace_bytes, cudaStream_t stream);

// Attention over what Select() or Reselect() selected for the layer, then Finish(). Enqueues on `stream`;
// lifetimes and errors as CudaAttention().
Status CudaAttentionOver(const CudaSelection& selection, CudaPolicy* policy, const CudaPolicyShape& shape,
                         int64_t num_tokens, const CudaPolicyLayer& layer, const CudaPolicyOutput& output,
                         void* workspace, size_t workspace_bytes, cudaStream_t stream);

// Select() and CudaAttentionOver(): one layer of a prompt that has begun. *selection is what was selected.
Status CudaPolicyAttention(CudaPolicy* policy, const CudaPolicyShape& shape, int64_t num_tokens,
                           const CudaPolicyLayer& layer, const CudaPolicyOutput& output, void* workspace,
                           size_t workspace_bytes, cudaStream_t stream, CudaSelection* selection);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICY_H_
