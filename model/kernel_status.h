// kernels::Status -> absl::Status.
#ifndef HW_MODEL_KERNEL_STATUS_H_
#define HW_MODEL_KERNEL_STATUS_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

#include "kernels/status.h"

namespace headwater {

// The same code, and the message after `what` ("layer 3: output projection").
absl::Status FromKernels(const kernels::Status& status, absl::string_view what);

}  // namespace headwater

#endif  // HW_MODEL_KERNEL_STATUS_H_
