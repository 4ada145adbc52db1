// Which addresses workers and decode nodes may name as theirs. Others dial them.
#ifndef HW_COORDINATOR_ADDRESS_H_
#define HW_COORDINATOR_ADDRESS_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headwater {

// 10.0.0.0/8 or fd00::/8. IPv4 is held as the IPv6 addresses ::ffff:0:0/96.
struct AddressRange {
  std::array<uint8_t, 16> address = {};
  int bits = 0;
};

// Ranges with commas between them; an empty text is none. INVALID_ARGUMENT: what is no range, or has bits
// beyond its length.
absl::StatusOr<std::vector<AddressRange>> ParseAddressRanges(absl::string_view text);

// INVALID_ARGUMENT says what is wanted instead: HOST:PORT with an address or a plain name and nothing that
// gRPC or a resolver would read as more (schemes, paths, IPv4 in other spellings); not a wildcard, link-local
// (so that of a cloud's metadata service), multicast or broadcast address. With ranges: an address in one of
// them, which no name is.
absl::Status CheckPeerAddress(absl::string_view host_port, const std::vector<AddressRange>& ranges);

}  // namespace headwater

#endif  // HW_COORDINATOR_ADDRESS_H_
