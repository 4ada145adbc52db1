// Prompts of `headwater bench prefill` from a file.
#ifndef HW_BENCH_PREFILL_PROMPTS_H_
#define HW_BENCH_PREFILL_PROMPTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace headwater {

struct BenchPrompt {
  std::string name;  // empty: random tokens
  std::vector<int32_t> tokens;
};

// A JSON object a line, of two keys: "name", a text of 1 to 256 bytes that no other line has, and "tokens",
// 1 to 2^20 ids, or "tokens_u16_b64", base64 of 1 to 2^24 of them as little-endian uint16. Ids are not
// checked against a model. Empty lines are passed over; files of up to 1 GiB. INVALID_ARGUMENT names file,
// line and what is wrong; NOT_FOUND.
absl::StatusOr<std::vector<BenchPrompt>> ReadBenchPrompts(const std::string& path);

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_PROMPTS_H_
