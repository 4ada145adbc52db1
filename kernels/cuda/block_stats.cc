#include "kernels/cuda/block_stats.h"

#include "kernels/cuda/block_stats_check.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/block_stats_launch.h"

namespace headwater::kernels {

Status CheckBlockStats(const CudaBlockStats& stats, bool* wants_k, bool* wants_v) {
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_mean", stats.k_mean));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v_mean", stats.v_mean));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_min", stats.k_min));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_max", stats.k_max));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_mean_square", stats.k_mean_square));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v_mean_square", stats.v_mean_square));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_max_norm", stats.k_max_norm));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v_max_norm", stats.v_max_norm));
  if ((stats.k_min == nullptr) != (stats.k_max == nullptr)) {
    return InvalidArgument("of k_min and k_max one is null");
  }
  *wants_k = stats.k_mean != nullptr || stats.k_min != nullptr || stats.k_mean_square != nullptr ||
             stats.k_max_norm != nullptr;
  *wants_v = stats.v_mean != nullptr || stats.v_mean_square != nullptr || stats.v_max_norm != nullptr;
  return {};
}

Status CheckStatsHeads(int32_t num_kv_heads, int32_t head_dim) {
  constexpr int32_t kMostHeads = 1 << 16;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_kv_heads", num_kv_heads, 1, kMostHeads));
  if (head_dim == 64 || head_dim == 128) return {};
  return {StatusCode::kUnimplemented, "head_dim is " + std::to_string(head_dim) + "; 64 or 128 is known"};
}

Status CudaBlockStatistics(const CudaBlockStatsArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("total_k", a.total_k, 0, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckStatsHeads(a.num_kv_heads, a.head_dim));
  if (a.first_token < 0 || a.first_token > a.total_k || a.first_token % kStatsBlockTokens != 0) {
    return InvalidArgument("first_token is " + std::to_string(a.first_token) +
                           "; a multiple of 128 from 0 to " + std::to_string(a.total_k) + " is wanted");
  }
  bool wants_k = false, wants_v = false;
  HW_KERNELS_RETURN_IF_ERROR(CheckBlockStats(a.stats, &wants_k, &wants_v));
  const int64_t blocks = CudaStatsBlocks(a.total_k) - a.first_token / kStatsBlockTokens;
  if (blocks == 0 || (!wants_k && !wants_v)) return {};
  if (wants_k) HW_KERNELS_RETURN_IF_ERROR(CheckArray("k", a.k));
  if (wants_v) HW_KERNELS_RETURN_IF_ERROR(CheckArray("v", a.v));
  const sm90::BlockStatsParams params{a, wants_k ? a.num_kv_heads : 0, wants_v ? a.num_kv_heads : 0};
  const int64_t ctas = blocks * (params.k_heads + params.v_heads);
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("blocks * heads", ctas, 1, INT32_MAX));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchBlockStats(params, ctas, stream));
  return {};
}

Status CudaMeanTables(const CudaMeanTablesArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("total_k", a.total_k, 0, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckStatsHeads(a.num_kv_heads, a.head_dim));
  if (a.total_k == 0) return {};
  if ((a.k_mean == nullptr) != (a.k_table == nullptr) || (a.v_mean == nullptr) != (a.v_table == nullptr)) {
    return InvalidArgument("a mean without its table, or a table without its mean");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_mean", a.k_mean));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v_mean", a.v_mean));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("k_table", a.k_table));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("v_table", a.v_table));
  if (a.k_mean == nullptr && a.v_mean == nullptr) return {};
  HW_KERNELS_RETURN_IF_ERROR(
      CheckRange("blocks * heads", CudaStatsBlocks(a.total_k) * a.num_kv_heads, 1, INT32_MAX));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchMeanTables(a, stream));
  return {};
}

}  // namespace headwater::kernels
