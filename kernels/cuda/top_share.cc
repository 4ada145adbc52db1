#include "kernels/cuda/top_share.h"

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/sm90/top_share_launch.h"
#include "kernels/number_text.h"

namespace headwater::kernels {
namespace {

Status CheckMasks(const CudaBlockMasks& masks) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", masks.num_tokens, 1, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("tile_positions", masks.tile_positions, 128, 128));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("the masks' num_lists", masks.num_lists, 1, INT32_MAX));
  if (masks.blocks() > sm90::kMostShareBlocks) {
    return {StatusCode::kUnimplemented, std::to_string(masks.blocks()) + " blocks; at most " +
                                            std::to_string(sm90::kMostShareBlocks) + " are known"};
  }
  return CheckArray("words", masks.words);
}

Status Validate(const CudaTopShareArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckMasks(a.masks));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("first_list", a.first_list, 0, a.masks.num_lists));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_lists", a.num_lists, 0, a.masks.num_lists - a.first_list));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("first_row", a.first_row, 0, a.masks.tiles()));
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_rows", a.num_rows, 0, a.masks.tiles() - a.first_row));
  if (a.num_shares != 1 && a.num_shares != a.num_lists) {
    return InvalidArgument("num_shares is " + std::to_string(a.num_shares) + "; 1 or " +
                           std::to_string(a.num_lists) + " is wanted");
  }
  if (a.shares == nullptr) return InvalidArgument("shares is null");
  for (int32_t i = 0; i < a.num_shares; ++i) {
    if (!(a.shares[i] >= 0 && a.shares[i] <= 1)) {
      return InvalidArgument("share " + NumberText(a.shares[i]) + " is outside 0 to 1");
    }
  }
  if (a.num_lists > 1) HW_KERNELS_RETURN_IF_ERROR(CheckRange("list_stride", a.list_stride, 0, INT64_MAX));
  if (a.scores == nullptr || reinterpret_cast<uintptr_t>(a.scores) % 4 != 0) {
    return InvalidArgument("scores is null or not 4-byte aligned");
  }
  return {};
}

}  // namespace

Status CudaTopShareRows(const CudaTopShareArgs& a, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Validate(a));
  if (a.num_lists == 0 || a.num_rows == 0) return {};
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  for (int32_t list = 0; list < a.num_lists; list += sm90::kShareLists) {
    sm90::TopShareParams p{};
    p.scores = a.scores + list * a.list_stride;
    p.list_stride = a.list_stride;
    p.words = a.masks.words + (a.first_list + list) * a.masks.tiles() * a.masks.tile_words();
    p.flags = a.flags == nullptr ? nullptr : a.flags + list;
    p.blocks = static_cast<int32_t>(a.masks.blocks());
    p.first_row = static_cast<int32_t>(a.first_row);
    p.with_first_and_own = a.rule == CudaTopShareRule::kWithFirstAndOwn;
    const int32_t lists = std::min(a.num_lists - list, sm90::kShareLists);
    for (int32_t i = 0; i < lists; ++i) p.shares[i] = a.shares[a.num_shares == 1 ? 0 : list + i];
    HW_KERNELS_RETURN_IF_CUDA_ERROR(sm90::LaunchTopShare(p, static_cast<int32_t>(a.num_rows), lists, stream));
  }
  return {};
}

}  // namespace headwater::kernels
