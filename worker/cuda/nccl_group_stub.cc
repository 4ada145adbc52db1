// Stands in for nccl_group.cc where NCCL is not installed.
#include "worker/cuda/nccl_group.h"

namespace headwater {

absl::StatusOr<std::unique_ptr<NcclGroup>> NcclGroup::Create(const NcclOptions& /*options*/) {
  return absl::UnimplementedError("built without NCCL: no groups over GPUs");
}

}  // namespace headwater
