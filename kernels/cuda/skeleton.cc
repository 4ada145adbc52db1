#include "kernels/cuda/skeleton.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/skeleton_launch.h"
#include "kernels/number_text.h"
#include "kernels/reference/policies/skeleton_mask.h"

namespace headwater::kernels {
namespace {

using reference::SkeletonParameters;

constexpr int64_t kDesignRows = int64_t{1} << 17;  // of all heads at a time
constexpr int32_t kShares = 100;                   // of systems, of all heads
constexpr int64_t kGramCtas = 512;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Arrays of one workspace, 256-byte aligned.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void Take(T** array, int64_t count) {
    *array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

sm90::SkeletonParams Plan(const CudaSkeletonArgs& a, void* workspace, size_t* bytes) {
  const SkeletonParameters& from = *a.parameters;
  sm90::SkeletonParams p = {};
  p.q = a.q;
  p.k = a.k;
  p.num_tokens = a.num_tokens;
  p.rows = a.num_tokens - from.sink_tokens - from.local_tokens;
  p.num_q_heads = a.num_q_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.head_dim = a.head_dim;
  p.sinks = from.sink_tokens;
  p.local = from.local_tokens;
  p.scale = a.softmax_scale;
  p.seed = from.seed;
  p.ridge = from.ridge;
  p.samples = int64_t{from.samples_per_dim} * a.head_dim;
  p.splits = std::max(1, kShares / a.num_q_heads);
  const int64_t unit = int64_t{p.splits} * sm90::kSkeletonDesignTile;
  const int64_t batches = CeilDiv(p.samples * a.num_q_heads, kDesignRows);
  p.batch = CeilDiv(CeilDiv(p.samples, batches), unit) * unit;
  const int64_t tiles = CeilDiv(p.rows, a.head_dim);
  p.gram_chunk_tiles = static_cast<int32_t>(CeilDiv(tiles * a.num_kv_heads, kGramCtas));
  p.gram_chunks = static_cast<int32_t>(CeilDiv(tiles, p.gram_chunk_tiles));

  const int64_t heads = a.num_q_heads, kv_heads = a.num_kv_heads, dim = a.head_dim, half = dim / 2;
  Carver carver(workspace);
  carver.Take(&p.per_pi, half);
  carver.Take(&p.inverse_sine, half);
  carver.Take(&p.turns, half * sm90::kSkeletonFineTurns);
  carver.Take(&p.turns_f32, half * sm90::kSkeletonFineTurns);
  carver.Take(&p.chunk_sums, kv_heads * p.chunks() * dim);
  carver.Take(&p.group_sums, kv_heads * p.groups() * dim);
  carver.Take(&p.grams, p.gram_chunks * kv_heads * (dim / 16 + 1) * 4 * dim);
  carver.Take(&p.last_parts, heads * p.last_part_count());
  for (float** const array : {&p.mu, &p.sigma, &p.lambda, &p.delta, &p.h, &p.s, &p.v}) {
    carver.Take(array, heads * a.num_tokens);
  }
  carver.Take(&p.distances, heads * p.batch * dim);
  carver.Take(&p.keys, heads * p.batch * dim);
  carver.Take(&p.target, heads * p.batch);
  carver.Take(&p.system, heads * p.splits * 2 * dim * p.system_rows());
  carver.Take(&p.coefficients, heads * 2 * dim);
  carver.Take(&p.constants, heads * 3);
  carver.Take(&p.scan_sums, heads * p.scan_blocks());
  carver.Take(&p.spread_sums, heads * p.scan_blocks());
  carver.Take(&p.tau, heads);
  for (float** const array : {&p.s_most, &p.s_block, &p.v_block, &p.h_block}) {
    carver.Take(array, heads * p.pair_blocks());
  }
  *bytes = carver.bytes();
  return p;
}

Status CheckWorkspace(const void* workspace, size_t given, size_t wanted) {
  if (workspace != nullptr && given >= wanted && reinterpret_cast<uintptr_t>(workspace) % 256 == 0) return {};
  return InvalidArgument("the workspace has " + std::to_string(given) + " bytes; " + std::to_string(wanted) +
                         ", 256-byte aligned, are wanted");
}

// Turns of a position are the same.
sm90::SkeletonFrequencies Frequencies(const CudaSkeletonArgs& a) {
  constexpr double kPi = 3.14159265358979323846;
  sm90::SkeletonFrequencies frequencies = {};
  for (int32_t m = 0; m < a.head_dim / 2; ++m) {
    const double theta = a.parameters->frequencies.empty()
                             ? std::pow(a.parameters->rope_base, -2.0 * m / a.head_dim)
                             : a.parameters->frequencies[static_cast<size_t>(m)];
    frequencies.theta[m] = theta > kPi ? std::remainder(theta, 2 * kPi) : theta;
  }
  return frequencies;
}

// How many deviations over the mean the threshold of a budget is; `decides` is false where all pairs of
// blocks are forced.
double BudgetQuantile(const CudaSkeletonArgs& a, bool* decides) {
  constexpr int64_t kPair = sm90::kSkeletonPairTokens;
  const int64_t rows = CeilDiv(a.num_tokens, kPair);
  // In a row of blocks the first and the last ones are forced.
  const int64_t forced =
      CeilDiv(a.parameters->sink_tokens, kPair) + CeilDiv(a.parameters->local_tokens + kPair - 1, kPair);
  const auto free_rows = static_cast<double>(std::max<int64_t>(0, rows - forced));
  const double free = free_rows * (free_rows + 1) / 2;
  const auto all = static_cast<double>(rows) * (static_cast<double>(rows) + 1) / 2;
  *decides = free > 0;
  if (!*decides) return 0;
  const double wanted = a.parameters->budget_blocks * static_cast<double>(rows);
  return reference::ThresholdOfShare({0, 1}, 1 - std::clamp((wanted - (all - free)) / free, 0.0, 1.0));
}

Status Threshold(const CudaSkeletonArgs& a, const sm90::SkeletonParams& p, cudaStream_t stream) {
  double tau =
      std::log(a.parameters->epsilon * sm90::kSkeletonPairTokens / static_cast<double>(a.num_tokens));
  if (a.parameters->budget_blocks > 0) {
    bool decides = false;
    tau = BudgetQuantile(a, &decides);
    if (decides && std::isfinite(tau)) {
      HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonSpread(p, tau, stream));
      return {};
    }
  }
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonThreshold(p, static_cast<float>(tau), stream));
  return {};
}

}  // namespace

Status CheckCudaSkeletonArgs(const CudaSkeletonArgs& a) {
  if (a.parameters == nullptr) return InvalidArgument("parameters is null");
  HW_KERNELS_RETURN_IF_ERROR(reference::CheckSkeletonParameters(*a.parameters));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.num_q_heads, 1, 1 << 15));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(a.num_tokens, a.num_tokens, a.num_q_heads, a.num_kv_heads, a.head_dim));
  const int64_t least = int64_t{a.parameters->sink_tokens} + a.parameters->local_tokens + 1;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, least, INT32_MAX));
  if (!(a.softmax_scale > 0 && std::isfinite(a.softmax_scale))) {
    return InvalidArgument("softmax_scale is " + NumberText(a.softmax_scale) +
                           "; a positive number is wanted");
  }
  const size_t given = a.parameters->frequencies.size();
  if (given == 0 || given == static_cast<size_t>(a.head_dim / 2)) return {};
  return InvalidArgument("frequencies has " + std::to_string(given) + " values, not " +
                         std::to_string(a.head_dim / 2) + ", half of head_dim");
}

size_t CudaSkeletonWorkspaceBytes(const CudaSkeletonArgs& args) {
  if (!CheckCudaSkeletonArgs(args).ok()) return 0;
  size_t bytes = 0;
  Plan(args, nullptr, &bytes);
  return bytes;
}

CudaSkeletonStages CudaSkeletonStagesIn(const CudaSkeletonArgs& args, void* workspace) {
  size_t bytes = 0;
  const sm90::SkeletonParams p = Plan(args, workspace, &bytes);
  return {p.mu,           p.sigma,     p.lambda, p.delta,   p.h,       p.s,      p.v,
          p.coefficients, p.constants, p.tau,    p.s_block, p.v_block, p.h_block};
}

Status CudaSkeletonTables(const CudaSkeletonArgs& args, void* workspace, size_t workspace_bytes,
                          cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckCudaSkeletonArgs(args));
  size_t bytes = 0;
  const sm90::SkeletonParams p = Plan(args, workspace, &bytes);
  HW_KERNELS_RETURN_IF_ERROR(CheckWorkspace(workspace, workspace_bytes, bytes));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonTables(p, Frequencies(args), stream));
  return {};
}

Status CudaSkeletonSelect(const CudaSkeletonArgs& args, const CudaBlockMasks& masks, void* workspace,
                          size_t workspace_bytes, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckCudaSkeletonArgs(args));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", args.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", args.k));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("words", masks.words));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("masks.num_tokens", masks.num_tokens, args.num_tokens, args.num_tokens));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("masks.num_lists", masks.num_lists, args.num_q_heads, args.num_q_heads));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("masks.tile_positions", masks.tile_positions, 128, 128));
  size_t bytes = 0;
  sm90::SkeletonParams p = Plan(args, workspace, &bytes);
  HW_KERNELS_RETURN_IF_ERROR(CheckWorkspace(workspace, workspace_bytes, bytes));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  p.words = masks.words;
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonKeySums(p, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonStatistics(p, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonLocal(p, stream));
  for (int64_t first = 0; first < p.samples; first += p.batch) {
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonDesign(p, first, stream));
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonGram(p, first == 0, stream));
  }
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonSumSystems(p, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonSolve(p, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonTerms(p, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonRows(p, stream));
  HW_KERNELS_RETURN_IF_ERROR(Threshold(args, p, stream));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSkeletonMasks(p, stream));
  return {};
}

}  // namespace headwater::kernels
