// Checks of what workers and decode nodes say of themselves when they register. Everything later relies on
// these bounds: sizes of a checked model multiply without overflow in 64 bits for prompts up to 2^22 tokens.
#ifndef HW_COORDINATOR_REGISTRATION_H_
#define HW_COORDINATOR_REGISTRATION_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

#include "coordinator/address.h"
#include "headwater/v1/decode.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

// Of one packed pass. A worker holds two passes' worth at most, so these bound what waits on its stream, too.
inline constexpr uint32_t kMaxPackedPrompts = 256;
inline constexpr uint64_t kMaxPackedTokens = uint64_t{1} << 20;

// Of FLOP or bytes a second: possible at all. NaN is not.
bool IsRate(double value);

// INVALID_ARGUMENT, BAD_FIELD: an id, address, model shape, memory model, rate or packed pass out of range.
// FAILED_PRECONDITION, BAD_FIELD: another protocol version.
absl::Status CheckRegistration(const v1::WorkerRegistration& registration);
// ranges: of the addresses, as CheckPeerAddress() has it.
absl::Status CheckRegistration(const v1::DecodeRegistration& registration,
                               const std::vector<AddressRange>& ranges = {});

}  // namespace headwater

#endif  // HW_COORDINATOR_REGISTRATION_H_
