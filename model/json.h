// JSON from files that are not trusted: nlohmann's SAX parser under limits.
#ifndef HW_MODEL_JSON_H_
#define HW_MODEL_JSON_H_

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace headwater {

struct JsonLimits {
  size_t max_bytes = size_t{1} << 20;
  // Objects and arrays inside each other; the outermost counts as 1.
  int max_depth = 16;
  // Objects, arrays, strings, numbers, booleans and nulls together. Bounds the memory of the result: about
  // 200 bytes each, plus the text.
  size_t max_values = 100'000;
};

// Parses `text`, whose outermost value must be an object. INVALID_ARGUMENT (the message starts with `what`):
// not JSON, not UTF-8, a key that an object has twice, a number out of range, or over a limit.
absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text, const JsonLimits& limits,
                                               absl::string_view what);

// The contents of a regular file. NOT_FOUND; INVALID_ARGUMENT: not a regular file, or longer than
// `max_bytes`; INTERNAL: the system's error.
absl::StatusOr<std::string> ReadFileUpTo(const std::string& path, size_t max_bytes);

// `text` as one line for an error message: control and non-ASCII characters escaped, cut after 96 characters.
std::string Quoted(absl::string_view text);

// `value` as compact JSON, cut and escaped as Quoted() does.
std::string Describe(const nlohmann::json& value);

}  // namespace headwater

#endif  // HW_MODEL_JSON_H_
