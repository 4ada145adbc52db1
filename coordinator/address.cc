#include "coordinator/address.h"

#include <algorithm>
#include <optional>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include <arpa/inet.h>

#include "base/status_macros.h"
#include "coordinator/validation.h"

namespace headwater {
namespace {

constexpr size_t kMaxHostLength = 255;
constexpr int kMappedBits = 96;  // of ::ffff:0:0, before an IPv4 address

using Address = std::array<uint8_t, 16>;

std::optional<Address> ParseAddress(const std::string& text) {
  Address address = {};
  if (inet_pton(AF_INET6, text.c_str(), address.data()) == 1) return address;
  address[10] = address[11] = 0xff;
  if (inet_pton(AF_INET, text.c_str(), address.data() + 12) == 1) return address;
  return std::nullopt;
}

// The bits of byte `i` that a range of `bits` holds.
uint8_t MaskOf(int bits, size_t i) {
  return static_cast<uint8_t>(0xff00 >> std::clamp(bits - 8 * static_cast<int>(i), 0, 8));
}

bool IsIn(const Address& address, const AddressRange& range) {
  for (size_t i = 0; i < address.size(); ++i) {
    if (((address[i] ^ range.address[i]) & MaskOf(range.bits, i)) != 0) return false;
  }
  return true;
}

absl::StatusOr<AddressRange> ParseRange(absl::string_view text) {
  const auto wrong = [text](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("'", Printable(text), "' ", what));
  };
  const std::vector<std::string> parts = absl::StrSplit(text, '/');
  const std::optional<Address> address = ParseAddress(parts[0]);
  const bool is_v4 = address.has_value() && !absl::StrContains(parts[0], ':');
  AddressRange range;
  if (parts.size() != 2 || !address.has_value() || !absl::SimpleAtoi(parts[1], &range.bits) ||
      range.bits < 0 || range.bits > (is_v4 ? 32 : 128)) {
    return wrong("is no range of addresses such as 10.0.0.0/8 or fd00::/8");
  }
  range.address = *address;
  if (is_v4) range.bits += kMappedBits;
  for (size_t i = 0; i < address->size(); ++i) {
    if (((*address)[i] & ~MaskOf(range.bits, i)) != 0) return wrong("has bits beyond its length");
  }
  return range;
}

// What nobody can be reached at, or nobody of ours.
const std::vector<AddressRange>& NeverPeers() {
  static const auto* const ranges = new std::vector<AddressRange>(*ParseAddressRanges(
      "0.0.0.0/8,169.254.0.0/16,224.0.0.0/4,255.255.255.255/32,::/128,fe80::/10,ff00::/8"));
  return *ranges;
}

bool IsInAny(const Address& address, const std::vector<AddressRange>& ranges) {
  return std::any_of(ranges.begin(), ranges.end(),
                     [&](const AddressRange& range) { return IsIn(address, range); });
}

}  // namespace

absl::StatusOr<std::vector<AddressRange>> ParseAddressRanges(absl::string_view text) {
  std::vector<AddressRange> ranges;
  if (text.empty()) return ranges;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    HW_ASSIGN_OR_RETURN(ranges.emplace_back(), ParseRange(part));
  }
  return ranges;
}

absl::Status CheckPeerAddress(absl::string_view host_port, const std::vector<AddressRange>& ranges) {
  const size_t colon = host_port.rfind(':');
  const absl::string_view port_text = colon == absl::string_view::npos ? "" : host_port.substr(colon + 1);
  int port = 0;
  const bool digits =
      port_text.size() <= 5 && port_text.find_first_not_of("0123456789") == absl::string_view::npos;
  absl::string_view host = host_port.substr(0, colon);
  const bool bracketed =
      absl::StartsWith(host, "[") && absl::EndsWith(host, "]") && absl::StrContains(host, ":");
  if (bracketed) host = host.substr(1, host.size() - 2);
  if (!digits || !absl::SimpleAtoi(port_text, &port) || port < 1 || port > 65535 ||
      !(bracketed ? host.find_first_not_of("0123456789abcdefABCDEF:.") == absl::string_view::npos
                  : IsName(host, kMaxHostLength))) {
    return absl::InvalidArgumentError("host:port");
  }
  const std::string text(host);
  const std::optional<Address> address = ParseAddress(text);
  in_addr other_spelling = {};
  if (!address.has_value() && (bracketed || inet_aton(text.c_str(), &other_spelling) != 0)) {
    return absl::InvalidArgumentError("host:port with an IPv4 address of four numbers or [an IPv6 address]");
  }
  if (address.has_value() && IsInAny(*address, NeverPeers())) {
    return absl::InvalidArgumentError(
        "host:port with no wildcard, link-local, multicast or broadcast address");
  }
  if (ranges.empty() || (address.has_value() && IsInAny(*address, ranges))) return absl::OkStatus();
  return absl::InvalidArgumentError("host:port with an address in the ranges of --decode_cidrs");
}

}  // namespace headwater
