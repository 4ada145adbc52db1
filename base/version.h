#ifndef HW_BASE_VERSION_H_
#define HW_BASE_VERSION_H_

#include <string>

#include "absl/strings/string_view.h"

namespace headwater {

inline constexpr char kVersion[] = "0.1.0";
// Version of worker.proto, kv.proto and decode.proto's registry; peers of another one are refused.
inline constexpr unsigned kProtocolVersion = 1;

// "headwater-worker 0.1.0 (commit 1234567890ab, protocol 1)\n". The commit has a '+' where the sources were
// changed since, and is "unknown" where they are not in git. In hw_version.
std::string VersionText(absl::string_view program);

}  // namespace headwater

#endif  // HW_BASE_VERSION_H_
