// What the counter of stream resets makes of a connection's bytes: the first byte says how they are cut.
#include <algorithm>
#include <string>

#include "base/rpc/reset_limit.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr int64_t kNow = 1'000'000'000;

bool Admit(ResetMeter* meter, absl::string_view bytes, size_t step) {
  ResetBudget budget;
  for (size_t at = 0; at < bytes.size(); at += step) {
    const absl::string_view piece = bytes.substr(at, step);
    const bool admitted = meter->Admit(piece.data(), piece.size(), kNow, &budget);
    FUZZ_EXPECT(admitted == !meter->over(), "what is not admitted is over");
    if (!admitted) return false;
  }
  return true;
}

void Run(absl::string_view input) {
  if (input.empty()) return;
  const size_t step = 1 + static_cast<unsigned char>(input[0]);
  input.remove_prefix(1);
  const std::string connection = std::string(kPreface) + std::string(input);
  ResetMeter whole, cut, other;
  const bool admitted = Admit(&whole, connection, connection.size());
  FUZZ_EXPECT(Admit(&cut, connection, step) == admitted, "cuts do not matter");
  // A reset is 13 bytes, and a thousand are admitted.
  FUZZ_EXPECT(admitted || input.size() >= 1000 * 9, "few bytes hold few resets");
  if (input.empty() || input[0] == kPreface[0]) return;
  FUZZ_EXPECT(Admit(&other, input, step), "what is no HTTP/2 passes");
}

std::vector<std::string> Seeds() {
  const std::string reset("\0\0\4\3\0\0\0\0\1\0\0\0\x08", 13), headers("\0\0\2\1\4\0\0\0\1\x82\x84", 11);
  std::string flood = "\x0c";
  for (int i = 0; i < 1100; ++i) flood += headers + reset;
  return {std::string("\x03") + headers + reset, flood, std::string("\0\x16\x03\x01", 4)};
}

const Registration kTarget({"resets", Run, Seeds, nullptr});

}  // namespace
}  // namespace headwater::fuzz
