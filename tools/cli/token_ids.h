// Token ids as text.
#ifndef HW_TOOLS_CLI_TOKEN_IDS_H_
#define HW_TOOLS_CLI_TOKEN_IDS_H_

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headwater {

// Most ids that one prompt may have here: what fits a request message.
inline constexpr uint64_t kMaxTokenIds = 12 << 20;

// Ids separated by whitespace or commas. INVALID_ARGUMENT names the first word that is not a number below
// 2^32 and which one it is; or: no ids; or: more than kMaxTokenIds.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text);

// Reads ids from a file, "-" meaning `standard_in`. NOT_FOUND: cannot be read; INVALID_ARGUMENT: over
// `max_bytes`, or as ParseTokenIds(); both name the file.
absl::StatusOr<std::vector<uint32_t>> ReadTokenFile(const std::string& path, std::istream& standard_in,
                                                    uint64_t max_bytes = 256 << 20);

// The whole text of a file, "-" meaning `standard_in`. Errors as ReadTokenFile().
absl::StatusOr<std::string> ReadTextFile(const std::string& path, std::istream& standard_in,
                                         uint64_t max_bytes);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_TOKEN_IDS_H_
