#include "kernels/cuda/policies/flash.h"

#include <algorithm>
#include <string>

#include "kernels/cuda/flash.h"
#include "kernels/cuda/policies/layer_means.h"
#include "kernels/cuda/policies/memory.h"

namespace headwater::kernels {
namespace {

// What V1 and V2 are made of.
struct Rule {
  bool per_query_head, corrects;
  double alpha;
  int32_t sink_blocks, window_blocks, dense_last_tiles, min_blocks, dense_layers;
  int64_t dense_tokens;
};

class FlashPolicy final : public CudaPolicy {
 public:
  FlashPolicy(const Rule& rule, const CudaPolicyShape& shape) : rule_(rule), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override {
    if (num_tokens < 1 || num_tokens > kCudaFlashMostTokens) return 0;
    return Divide(num_tokens, nullptr).bytes;
  }

  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t /*stream*/) override {
    num_tokens_ = 0;
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX));
    if (num_tokens > kCudaFlashMostTokens) {
      return {StatusCode::kUnimplemented, "num_tokens is " + std::to_string(num_tokens) + "; at most " +
                                              std::to_string(kCudaFlashMostTokens) + " is known"};
    }
    HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
    memory_ = Divide(num_tokens, memory);
    num_tokens_ = num_tokens;
    return {};
  }

  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override {
    *selection = {};
    if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("layer", layer.layer, 0, shape_.num_layers - 1));
    HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", layer.q));
    HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", layer.k));
    if (rule_.corrects) HW_KERNELS_RETURN_IF_ERROR(CheckArray("v", layer.v));
    if (layer.layer < rule_.dense_layers || num_tokens_ <= rule_.dense_tokens) return {};
    HW_KERNELS_RETURN_IF_ERROR(memory_.means.Make(shape_, num_tokens_, layer, stream));
    HW_KERNELS_RETURN_IF_ERROR(CudaFlashSelect(FlashArgs(layer.q), stream));
    HW_KERNELS_RETURN_IF_ERROR(CudaListsOfMasks(memory_.lists, stream));
    *selection = SelectionOf(memory_.lists);
    selection->correction = memory_.means.correction();
    return {};
  }

 private:
  struct Memory {
    CudaListsOfMasksArgs lists;
    LayerMeans means;
    size_t bytes = 0;
  };

  Memory Divide(int64_t num_tokens, void* memory) const {
    PolicyMemory from(memory);
    Memory m;
    m.lists = TakeLists(
        CudaBlockMasksOf(num_tokens, shape_.num_q_heads, shape_.num_kv_heads, rule_.per_query_head), &from);
    m.means = LayerMeans::Take(shape_, num_tokens, rule_.corrects, &from);
    m.bytes = from.bytes();
    return m;
  }

  CudaFlashArgs FlashArgs(const void* q) const {
    CudaFlashArgs args;
    args.q = q;
    args.k_means = memory_.means.k_table;
    args.mean_rows = CudaMeanTableRows(num_tokens_);
    args.num_tokens = num_tokens_;
    args.num_q_heads = shape_.num_q_heads;
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.softmax_scale = shape_.softmax_scale;
    args.per_query_head = rule_.per_query_head;
    args.alpha = rule_.alpha;
    args.sink_blocks = rule_.sink_blocks;
    args.window_blocks = rule_.window_blocks;
    args.dense_last_tiles = rule_.dense_last_tiles;
    args.min_blocks = rule_.min_blocks;
    args.masks = memory_.lists.masks;
    return args;
  }

  const Rule rule_;
  const CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  Memory memory_;
};

}  // namespace

Status MakeCudaFlash(const reference::FlashParameters& p, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(reference::CheckFlashParameters(p));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  if (p.compat) return {StatusCode::kUnimplemented, "FlashPrefill V1 with compat on a GPU"};
  const Rule rule{true,         false, p.alpha, p.sink_blocks, p.window_blocks, p.dense_last_blocks,
                  p.min_blocks, 0,     0};
  *made = std::make_unique<FlashPolicy>(rule, shape);
  return {};
}

Status MakeCudaFlash2(const reference::Flash2Parameters& p, const CudaPolicyShape& shape,
                      std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(reference::CheckFlash2Parameters(p));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  if (p.compat) return {StatusCode::kUnimplemented, "FlashPrefill V2 with compat on a GPU"};
  const Rule rule{false, true,           p.alpha,       p.sink_blocks, p.window_blocks, p.dense_last_tiles,
                  0,     p.dense_layers, p.dense_tokens};
  *made = std::make_unique<FlashPolicy>(rule, shape);
  return {};
}

}  // namespace headwater::kernels
