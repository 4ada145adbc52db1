#include "kernels/cuda/block_mass.h"

#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/block_mass_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

Status CheckProblem(const CudaMassProblem& p) {
  HW_KERNELS_RETURN_IF_ERROR(
      CheckSizes(p.num_tokens, p.num_tokens, p.num_q_heads, p.num_kv_heads, p.head_dim));
  if (!std::isfinite(p.softmax_scale) || p.softmax_scale <= 0) {
    return InvalidArgument("softmax_scale is " + NumberText(p.softmax_scale) + "; a number over 0 is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("first_query", p.first_query, 0, p.num_tokens - 1));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("q", p.q));
  return CheckArray("k", p.k);
}

Status CheckHeads(const CudaMassProblem& p, const int32_t* heads, int32_t num_heads) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_heads", num_heads, 0, heads == nullptr ? p.num_q_heads : 65535));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_heads", num_heads, 0, 65535));
  return heads == nullptr ? Status() : CheckAligned("heads", heads, 4);
}

Status CheckRowCount(int32_t num_rows) { return CheckRange("num_rows", num_rows, 0, 65536); }

}  // namespace

Status CheckSampledRows(const CudaSampledRows& rows) {
  if ((rows.positions == nullptr) == (rows.positions_i32 == nullptr)) {
    return InvalidArgument("positions and positions_i32 are both null or both given; one is wanted");
  }
  if (rows.positions != nullptr) return CheckAligned("positions", rows.positions, 8);
  return CheckAligned("positions_i32", rows.positions_i32, 4);
}

Status CudaBlockMass(const CudaBlockMassArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckProblem(a.problem));
  HW_KERNELS_RETURN_IF_ERROR(CheckHeads(a.problem, a.heads, a.num_heads));
  if (a.num_heads == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("lse_ln", a.lse_ln, 4));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("average", a.average, 4));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchBlockMass(a, stream));
  return {};
}

Status CudaLogSumExp(const CudaLogSumExpArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckProblem(a.problem));
  HW_KERNELS_RETURN_IF_ERROR(CheckHeads(a.problem, a.heads, a.num_heads));
  if (a.num_heads == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("lse_ln", a.lse_ln, 4));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchLogSumExp(a, stream));
  return {};
}

Status CudaRowMass(const CudaRowMassArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckProblem(a.problem));
  HW_KERNELS_RETURN_IF_ERROR(CheckRowCount(a.rows.num_rows));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.problem.num_q_heads, 1, 65535));
  if (a.rows.num_rows == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckSampledRows(a.rows));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("mass", a.mass, 4));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchRowMass(a, stream));
  return {};
}

Status CudaRecallOfRows(const CudaRecallArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_q_heads", a.num_q_heads, 1, 65535));
  HW_KERNELS_RETURN_IF_ERROR(CheckRowCount(a.rows.num_rows));
  HW_KERNELS_RETURN_IF_ERROR(CheckQueries(a.queries.first, a.queries.count, a.num_tokens));
  const CudaBlockLists& lists = a.lists;
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_lists", lists.num_lists, 0, a.num_q_heads));
  if (lists.num_lists > 0 && (a.num_q_heads % lists.num_lists != 0 || a.num_q_heads / lists.num_lists > 8)) {
    return InvalidArgument(std::to_string(lists.num_lists) + " lists for " + std::to_string(a.num_q_heads) +
                           " query heads; 1 to 8 heads a list are wanted");
  }
  if (a.rows.num_rows == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckSampledRows(a.rows));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("mass", a.mass, 4));
  HW_KERNELS_RETURN_IF_ERROR(CheckAligned("recall", a.recall, 4));
  if (lists.num_lists > 0) {
    HW_KERNELS_RETURN_IF_ERROR(CheckAligned("counts", lists.counts, 4));
    HW_KERNELS_RETURN_IF_ERROR(CheckAligned("offsets", lists.offsets, 8));
    HW_KERNELS_RETURN_IF_ERROR(CheckAligned("blocks", lists.blocks, 4));
  }
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchRecall(a, stream));
  return {};
}

}  // namespace headwater::kernels
