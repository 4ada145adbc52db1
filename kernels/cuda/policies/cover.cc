#include "kernels/cuda/policies/cover.h"

#include <cmath>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/policies/memory.h"
#include "kernels/cuda/sm90/cover_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

sm90::CoverParams Plan(const CudaCoverArgs& a, PolicyMemory* memory) {
  sm90::CoverParams p = sm90::CoverOf(a.share, a.most_sum);
  p.x = a.x;
  p.length = a.length;
  p.rows = a.num_rows;
  p.counts = a.counts;
  p.bins = memory->Take<sm90::CoverBin>(int64_t{sm90::kCoverBins} * a.num_rows);
  p.states = memory->Take<sm90::CoverState>(a.num_rows);
  return p;
}

Status Validate(const CudaCoverArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("length", a.length, 1, int64_t{1} << 38));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_rows", a.num_rows, 1, 65535));
  if (!(a.most_sum >= std::ldexp(1.0, -30) && a.most_sum <= std::ldexp(1.0, 40))) {
    return InvalidArgument("most_sum is " + NumberText(a.most_sum) + "; 2^-30 to 2^40 is wanted");
  }
  if (!(a.share >= 0 && a.share <= a.most_sum)) {
    return InvalidArgument("share is " + NumberText(a.share) + "; 0 to " + NumberText(a.most_sum) +
                           " is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("x", a.x));
  return CheckArray("counts", a.counts);
}

}  // namespace

namespace sm90 {

CoverParams CoverOf(double share, double most_sum) {
  CoverParams p{};
  p.fraction_bits = 60 - static_cast<int>(std::ceil(std::log2(most_sum)));
  p.share = static_cast<uint64_t>(std::ldexp(share, p.fraction_bits));
  return p;
}

}  // namespace sm90

size_t CudaCoverWorkspaceBytes(const CudaCoverArgs& args) {
  PolicyMemory memory;
  Plan(args, &memory);
  return memory.bytes();
}

Status CudaCover(const CudaCoverArgs& args, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(args));
  HW_KERNELS_RETURN_IF_ERROR(
      CheckMemory("the workspace", workspace, workspace_bytes, CudaCoverWorkspaceBytes(args)));
  PolicyMemory memory(workspace);
  const sm90::CoverParams params = Plan(args, &memory);
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchCover(params, stream));
  return {};
}

}  // namespace headwater::kernels
