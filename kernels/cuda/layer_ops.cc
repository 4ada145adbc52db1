#include "kernels/cuda/layer_ops.h"

#include <cmath>
#include <string>
#include <utility>

#include "kernels/cuda/block_stats_check.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/quantize.h"
#include "kernels/cuda/sm90/layer_ops_launch.h"
#include "kernels/cuda/sm90/quantize_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostTokens = INT32_MAX;
constexpr int64_t kMostWidth = 1 << 20;
constexpr int64_t kMostElements = int64_t{1} << 42;  // of one array: keeps grids in 31 bits
constexpr int32_t kMostHeads = 1 << 16;
constexpr int64_t kMostPosition = int64_t{1} << 53;  // whole numbers are exact in double up to here

Status CheckShape(int64_t num_tokens, int64_t width, int64_t most_width) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", num_tokens, 0, kMostTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("width", width, 1, most_width));
  if (width % 8 == 0) return {};
  return InvalidArgument("width is " + std::to_string(width) + "; a multiple of 8 is wanted");
}

Status CheckFloatType(const char* name, DType dtype) {
  if (dtype == DType::kF32 || dtype == DType::kBF16) return {};
  return {StatusCode::kUnimplemented, std::string(name) + " is " + NameOf(dtype) + "; bf16 or f32 is known"};
}

Status CheckEpsilon(float epsilon) {
  if (epsilon >= 0 && std::isfinite(epsilon)) return {};
  return InvalidArgument("epsilon is " + NumberText(epsilon) + "; 0 or more is wanted");
}

Status CheckDevice() {
  int num_sms = 0;
  return RequireSm90(&num_sms);
}

}  // namespace

Status CudaEmbedTokens(const CudaEmbedTokensArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckShape(a.num_tokens, a.width, kMostWidth));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("vocab", a.vocab, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckFloatType("out_dtype", a.out_dtype));
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("table", a.table));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("ids", a.ids));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("out", a.out));
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchEmbedTokens(a, stream));
  return {};
}

Status CudaRmsNorm(const CudaRmsNormArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckShape(a.num_tokens, a.width, kMaxNormWidth));
  HW_KERNELS_RETURN_IF_ERROR(CheckFloatType("x_dtype", a.x_dtype));
  HW_KERNELS_RETURN_IF_ERROR(CheckFloatType("weight_dtype", a.weight_dtype));
  HW_KERNELS_RETURN_IF_ERROR(CheckEpsilon(a.epsilon));
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("x", a.x));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("delta", a.delta));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("weight", a.weight));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("out", a.out));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("scale", a.scale));
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchRmsNorm(a, stream));
  return {};
}

Status CudaRopeTable(const CudaRopeTableArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 0, kMostTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("head_dim", a.head_dim, 2, 2 * kMaxRotaryPairs));
  if (a.head_dim % 2 != 0) {
    return InvalidArgument("head_dim is " + std::to_string(a.head_dim) + "; an even number is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("begin", a.begin, -kMostPosition, kMostPosition - a.num_tokens));
  if (!std::isfinite(a.attention_factor)) return InvalidArgument("attention_factor is not finite");
  if (a.positions_i32 != nullptr && a.positions_i64 != nullptr) {
    return InvalidArgument("positions_i32 and positions_i64 are both given");
  }
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("inverse_device", a.inverse_device));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("positions_i32", a.positions_i32));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("positions_i64", a.positions_i64));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("cos", a.cos));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("sin", a.sin));
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchRopeTable(a, stream));
  return {};
}

Status CudaSplitQkv(const CudaSplitQkvArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 0, kMostTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.num_q_heads, 1, kMostHeads));
  HW_KERNELS_RETURN_IF_ERROR(CheckStatsHeads(a.num_kv_heads, a.head_dim));
  HW_KERNELS_RETURN_IF_ERROR(CheckFloatType("norm_dtype", a.norm_dtype));
  HW_KERNELS_RETURN_IF_ERROR(CheckEpsilon(a.epsilon));
  bool wants_k = false, wants_v = false;
  HW_KERNELS_RETURN_IF_ERROR(CheckBlockStats(a.stats, &wants_k, &wants_v));
  if (wants_k || wants_v) {
    HW_KERNELS_RETURN_IF_ERROR(CheckRange("first_token", a.first_token, 0, kMostTokens - a.num_tokens));
    if (a.first_token % kStatsBlockTokens != 0) {
      return InvalidArgument("first_token is " + std::to_string(a.first_token) +
                             "; a multiple of 128 is wanted for statistics");
    }
  }
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("qkv", a.qkv));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("q_norm", a.q_norm));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_norm", a.k_norm));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("cos", a.cos));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("sin", a.sin));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", a.q));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", a.k));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("v", a.v));
  const int64_t units =
      (a.num_q_heads + sm90::kSplitQueryHeads - 1) / sm90::kSplitQueryHeads + int64_t{2} * a.num_kv_heads;
  const int64_t ctas = CudaStatsBlocks(a.num_tokens) * units;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("blocks * heads", ctas, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  CudaSplitQkvArgs aligned = a;
  if (!wants_k && !wants_v) aligned.first_token = 0;
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchSplitQkv(aligned, ctas, stream));
  return {};
}

Status CudaSiluMul(const CudaSiluMulArgs& a, cudaStream_t stream) {
  const bool quantize = a.scale != nullptr;
  HW_KERNELS_RETURN_IF_ERROR(CheckShape(a.num_tokens, a.width, quantize ? kMaxQuantizedWidth : kMostWidth));
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("gate_up", a.gate_up));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("out", a.out));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("scale", a.scale));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens * width", a.num_tokens * a.width, 1, kMostElements));
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(quantize ? sm90::LaunchQuantizedSiluMul(a, stream)
                                           : sm90::LaunchSiluMul(a, stream));
  return {};
}

Status CudaFirstNonFiniteRow(const CudaFirstNonFiniteRowArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckShape(a.num_tokens, a.width, kMostWidth));
  HW_KERNELS_RETURN_IF_ERROR(CheckFloatType("dtype", a.dtype));
  if (a.row == nullptr || reinterpret_cast<uintptr_t>(a.row) % alignof(int64_t) != 0) {
    return InvalidArgument("row is null or not 8-byte aligned");
  }
  if (a.num_tokens > 0) HW_KERNELS_RETURN_IF_ERROR(CheckArray("x", a.x));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens * width", a.num_tokens * a.width, 0, kMostElements));
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(a.row, 0xFF, sizeof *a.row, stream));
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchFirstNonFiniteRow(a, stream));
  return {};
}

Status CudaStoreToHost(const void* from, void* to, int64_t bytes, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("bytes", bytes, 0, int64_t{1} << 31));
  if (bytes % 4 != 0) return InvalidArgument("bytes is " + std::to_string(bytes) + ", no multiple of 4");
  if (bytes == 0) return {};
  for (const auto& [name, array] : {std::pair("from", from), std::pair<const char*, const void*>("to", to)}) {
    if (array == nullptr || reinterpret_cast<uintptr_t>(array) % 4 != 0) {
      return InvalidArgument(std::string(name) + " is null or not 4-byte aligned");
    }
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckDevice());
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchStoreToHost(static_cast<const uint32_t*>(from),
                                                          static_cast<uint32_t*>(to), bytes / 4, stream));
  return {};
}

Status CudaPackKv(const CudaPackKvArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 0, kMostTokens));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_kv_heads", a.num_kv_heads, 1, kMostHeads));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("head_dim", a.head_dim, 1, 1 << 14));
  const int64_t width = int64_t{a.num_kv_heads} * a.head_dim;
  if (width % 8 != 0) {
    return InvalidArgument("num_kv_heads * head_dim is " + std::to_string(width) +
                           "; a multiple of 8 is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_runs", a.num_runs, 0, 1 << 24));
  if (a.destination_bytes < 0) {
    return InvalidArgument("destination_bytes is " + std::to_string(a.destination_bytes));
  }
  if ((a.k == nullptr) != (a.k_destination == nullptr) || (a.v == nullptr) != (a.v_destination == nullptr)) {
    return InvalidArgument("a source without its destination, or a destination without its source");
  }
  if (a.num_runs == 0 || (a.k == nullptr && a.v == nullptr)) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k", a.k));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v", a.v));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_destination", a.k_destination));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v_destination", a.v_destination));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("runs", a.runs));
  if (reinterpret_cast<uintptr_t>(a.problems) % alignof(uint32_t) != 0) {
    return InvalidArgument("problems is not 4-byte aligned");
  }
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchPackKv(a, num_sms, stream));
  return {};
}

}  // namespace headwater::kernels
