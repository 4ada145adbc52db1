#include "model/kernel_status.h"

#include "absl/strings/str_cat.h"

namespace headwater {
namespace {

absl::StatusCode CodeOf(kernels::StatusCode code) {
  switch (code) {
    case kernels::StatusCode::kOk:
      return absl::StatusCode::kOk;
    case kernels::StatusCode::kInvalidArgument:
      return absl::StatusCode::kInvalidArgument;
    case kernels::StatusCode::kUnimplemented:
      return absl::StatusCode::kUnimplemented;
    case kernels::StatusCode::kResourceExhausted:
      return absl::StatusCode::kResourceExhausted;
    case kernels::StatusCode::kInternal:
      return absl::StatusCode::kInternal;
  }
  return absl::StatusCode::kInternal;
}

}  // namespace

absl::Status FromKernels(const kernels::Status& status, absl::string_view what) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(CodeOf(status.code()), absl::StrCat(what, ": ", status.message()));
}

}  // namespace headwater
