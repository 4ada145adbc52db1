// Checks of what workers and decode nodes say of themselves when they register. Everything later relies on
// these bounds: sizes of a checked model multiply without overflow in 64 bits for prompts up to 2^22 tokens.
#ifndef HW_COORDINATOR_REGISTRATION_H_
#define HW_COORDINATOR_REGISTRATION_H_

#include "absl/status/status.h"

#include "headwater/v1/decode.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

// INVALID_ARGUMENT, BAD_FIELD: an id, address, model shape or memory model out of range.
// FAILED_PRECONDITION, BAD_FIELD: another protocol version.
absl::Status CheckRegistration(const v1::WorkerRegistration& registration);
absl::Status CheckRegistration(const v1::DecodeRegistration& registration);

}  // namespace headwater

#endif  // HW_COORDINATOR_REGISTRATION_H_
