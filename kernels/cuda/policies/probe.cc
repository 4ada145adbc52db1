#include "kernels/cuda/policies/probe.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/policies/memory.h"

namespace headwater::kernels {
namespace {

class DenseCudaPolicy final : public CudaPolicy {
 public:
  size_t MemoryBytes(int64_t) const override { return 0; }
  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t) override {
    return CheckPolicyMemory(num_tokens, memory, memory_bytes, 0);
  }
  Status Select(const CudaPolicyLayer&, cudaStream_t, CudaSelection* selection) override {
    *selection = {};
    return {};
  }
};

class ProbeCudaPolicy final : public CudaPolicy {
 public:
  ProbeCudaPolicy(const ProbeParameters& probe, const CudaPolicyShape& shape)
      : probe_(probe), shape_(shape) {}

  size_t MemoryBytes(int64_t num_tokens) const override { return Lay(num_tokens, nullptr).bytes; }

  Status Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t) override {
    num_tokens_ = 0;
    HW_KERNELS_RETURN_IF_ERROR(
        CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(std::max<int64_t>(1, num_tokens))));
    num_tokens_ = num_tokens;
    parts_ = Lay(num_tokens, memory);
    return {};
  }

  Status Select(const CudaPolicyLayer& layer, cudaStream_t stream, CudaSelection* selection) override {
    *selection = {};
    if (num_tokens_ == 0) return InvalidArgument("Select() before Begin()");
    if (Dense(num_tokens_)) return {};
    CudaSearchArgs args = Args(num_tokens_, parts_);
    args.q = layer.q;
    args.k = layer.k;
    HW_KERNELS_RETURN_IF_ERROR(CudaSelectBlocks(args, parts_.workspace, parts_.workspace_bytes, stream));
    selection->lists = {shape_.num_kv_heads, parts_.counts, parts_.offsets, parts_.blocks};
    selection->overflows = parts_.overflows;
    return {};
  }

 private:
  struct Parts {
    int32_t* counts;
    int64_t* offsets;
    int32_t* blocks;
    int64_t capacity;
    uint64_t* used;
    uint32_t* overflows;
    char* workspace;
    size_t workspace_bytes;
    size_t bytes;
  };

  bool Dense(int64_t num_tokens) const {
    return probe_.forced_density == 0 && num_tokens < probe_.dense_below_tokens;
  }

  CudaSearchArgs Args(int64_t num_tokens, const Parts& parts) const {
    // Sizes are asked for before there are arrays: any aligned address that is not null does.
    void* const some = reinterpret_cast<void*>(uintptr_t{256});
    CudaSearchArgs args;
    args.q = args.k = some;
    args.total_q = args.total_k = num_tokens;
    args.num_q_heads = shape_.num_q_heads;
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.softmax_scale = shape_.softmax_scale;
    args.threshold = static_cast<float>(probe_.threshold);
    args.forced_density = probe_.forced_density;
    args.counts = parts.counts == nullptr ? static_cast<int32_t*>(some) : parts.counts;
    args.offsets = parts.offsets == nullptr ? static_cast<int64_t*>(some) : parts.offsets;
    args.blocks = parts.blocks == nullptr ? static_cast<int32_t*>(some) : parts.blocks;
    args.capacity = std::max<int64_t>(1, parts.capacity);
    args.used = parts.used == nullptr ? static_cast<uint64_t*>(some) : parts.used;
    args.overflows = parts.overflows == nullptr ? static_cast<uint32_t*>(some) : parts.overflows;
    return args;
  }

  Parts Lay(int64_t num_tokens, void* memory) const {
    PolicyMemory from(memory);
    Parts parts{};
    if (Dense(num_tokens)) return parts;
    const int64_t positions = 128 / (shape_.num_q_heads / shape_.num_kv_heads);
    const int64_t tiles = (num_tokens + positions - 1) / positions, blocks = (num_tokens + 127) / 128;
    const int64_t segments = tiles * shape_.num_kv_heads;
    // Forced: a share of (blocks + 1) / 2 on average, and what is always listed.
    const auto a_tile =
        probe_.forced_density == 0
            ? int64_t{64}
            : static_cast<int64_t>(probe_.forced_density * static_cast<double>(blocks + 2) / 2) + 10;
    parts.capacity = segments * std::min(a_tile, blocks);
    parts.counts = from.Take<int32_t>(segments);
    parts.offsets = from.Take<int64_t>(segments);
    parts.blocks = from.Take<int32_t>(parts.capacity);
    parts.used = from.Take<uint64_t>(1);
    parts.overflows = from.Take<uint32_t>(1);
    parts.workspace_bytes = CudaSearchWorkspaceBytes(Args(num_tokens, Parts{}));
    parts.workspace = from.Take<char>(static_cast<int64_t>(parts.workspace_bytes));
    parts.bytes = from.bytes();
    return parts;
  }

  const ProbeParameters probe_;
  const CudaPolicyShape shape_;
  int64_t num_tokens_ = 0;  // 0: no prompt
  Parts parts_{};
};

}  // namespace

Status MakeCudaDense(const DenseParameters&, const CudaPolicyShape&, std::unique_ptr<CudaPolicy>* made) {
  *made = std::make_unique<DenseCudaPolicy>();
  return {};
}

Status MakeCudaProbe(const ProbeParameters& parameters, const CudaPolicyShape& shape,
                     std::unique_ptr<CudaPolicy>* made) {
  *made = std::make_unique<ProbeCudaPolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
