#include "kernels/cuda/merge.h"

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/merge_launch.h"

namespace headwater::kernels {
namespace {

Status Validate(const CudaMergeArgs& a) {
  if (a.num_rows < 0) {
    return InvalidArgument("num_rows is " + std::to_string(a.num_rows) + "; 0 or more is wanted");
  }
  if (a.head_dim != 64 && a.head_dim != 128) {
    return {StatusCode::kUnimplemented, "head_dim " + std::to_string(a.head_dim) + "; 64 and 128 are known"};
  }
  if (a.num_rows == 0) return {};
  if (a.a == nullptr || a.b == nullptr || a.a_lse_ln == nullptr || a.b_lse_ln == nullptr ||
      (a.out == nullptr && a.out_f32 == nullptr)) {
    return InvalidArgument("a partial result, its lse_ln or both outputs are null");
  }
  if (Misaligned(a.a) || Misaligned(a.b) || Misaligned(a.out) || Misaligned(a.out_f32)) {
    return InvalidArgument("a partial result or an output is not 16-byte aligned");
  }
  return {};
}

}  // namespace

Status CudaMergePartials(const CudaMergeArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  if (args.num_rows == 0) return {};
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchMerge(
      {args.a, args.a_lse_ln, args.b, args.b_lse_ln, args.out_f32, args.out, args.lse_ln, args.num_rows},
      args.head_dim, num_sms, stream));
  return {};
}

}  // namespace headwater::kernels
