// What a worker shows to push an epoch's blocks.
#ifndef HW_BASE_RPC_EPOCH_TOKEN_H_
#define HW_BASE_RPC_EPOCH_TOKEN_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace headwater {

// HMAC-SHA-256 (RFC 2104) by the session's token, which coordinator and decode node alone know, of the
// session and the epoch, in hex: it opens, commits and aborts nothing, and is of no use for another epoch,
// session or node.
std::string EpochToken(absl::string_view session_token, absl::string_view session_id, uint32_t epoch);

}  // namespace headwater

#endif  // HW_BASE_RPC_EPOCH_TOKEN_H_
