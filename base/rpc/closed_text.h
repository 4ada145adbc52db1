// What clients are told of errors that are not theirs to mend.
#ifndef HW_BASE_RPC_CLOSED_TEXT_H_
#define HW_BASE_RPC_CLOSED_TEXT_H_

#include "absl/status/status.h"

namespace headwater {

// Of what went wrong inside of the service (reasons such as WORKER_LOST, and INTERNAL, which is that of an
// error without a reason): code, reason and RetryInfo are kept; the text becomes one of a closed list, and
// other payloads go. Their texts name hosts, addresses, paths and what the system said, which is for the log.
// Any other error is returned as it is: its text names the caller's value and the limit.
absl::Status WithClosedText(const absl::Status& status);

}  // namespace headwater

#endif  // HW_BASE_RPC_CLOSED_TEXT_H_
