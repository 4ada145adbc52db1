#include "kernels/cuda/policies/a_shape.h"

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/policies/range_policy.h"
#include "kernels/cuda/sm90/a_shape_launch.h"

namespace headwater::kernels {
namespace {

struct Memory {
  int32_t* counts;
  int64_t* offsets;
  CudaKeyRange* ranges;
  uint64_t* visited;
  size_t bytes;
};

Memory Carve(int64_t num_tokens, void* base) {
  const int64_t tiles = CudaRangeTiles(num_tokens);
  PolicyMemory from(base);
  Memory memory = {};
  memory.counts = from.Take<int32_t>(tiles);
  memory.offsets = from.Take<int64_t>(tiles);
  memory.ranges = from.Take<CudaKeyRange>(2 * tiles);
  memory.visited = from.Take<uint64_t>(1);
  memory.bytes = from.bytes();
  return memory;
}

}  // namespace

size_t AShapePolicy::MemoryBytes(int64_t num_tokens) const { return Carve(num_tokens, nullptr).bytes; }

Status AShapePolicy::Begin(int64_t num_tokens, void* memory, size_t memory_bytes, cudaStream_t stream) {
  selection_ = {};
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 1, INT32_MAX - 256));
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyMemory(num_tokens, memory, memory_bytes, MemoryBytes(num_tokens)));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  const Memory m = Carve(num_tokens, memory);
  const auto sinks = static_cast<int32_t>(parameters_.sink_tokens),
             window = static_cast<int32_t>(parameters_.window_tokens);
  HW_KERNELS_RETURN_IF_CUDA_ERROR(
      sm90::LaunchAShape({CudaRangeTiles(num_tokens), sinks, window, shape_.num_q_heads, m.counts, m.offsets,
                          m.ranges, m.visited},
                         stream));
  ranges_ = {};
  ranges_.num_lists = 1;
  ranges_.range_counts = m.counts;
  ranges_.range_offsets = m.offsets;
  ranges_.ranges = m.ranges;
  ranges_.sink_tokens = sinks;
  ranges_.window_tokens = window;
  selection_.ranges = &ranges_;
  selection_.visited = m.visited;
  selection_.possible = PossibleSteps(num_tokens, shape_.num_q_heads);
  return {};
}

Status AShapePolicy::Select(const CudaPolicyLayer& /*layer*/, cudaStream_t /*stream*/,
                            CudaSelection* selection) {
  if (selection_.ranges == nullptr) return InvalidArgument("Select() without a Begin() that was OK");
  *selection = selection_;
  return {};
}

Status MakeCudaAShape(const AShapeParameters& parameters, const CudaPolicyShape& shape,
                      std::unique_ptr<CudaPolicy>* made) {
  HW_KERNELS_RETURN_IF_ERROR(CheckPolicyShape(shape));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("sink_tokens", parameters.sink_tokens, 0, kMostPatternTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("window_tokens", parameters.window_tokens, 1, kMostPatternTokens));
  *made = std::make_unique<AShapePolicy>(parameters, shape);
  return {};
}

}  // namespace headwater::kernels
