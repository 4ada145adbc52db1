#include "tests/fuzz/fuzz.h"

#include <algorithm>

#include "base/rpc/grpc_status.h"

namespace headwater::fuzz {

std::vector<Target>& Targets() {
  static std::vector<Target>* const targets = new std::vector<Target>();
  return *targets;
}

void ExpectRefusal(const absl::Status& status, std::initializer_list<absl::StatusCode> codes) {
  constexpr size_t kLongestMessage = 2048;
  FUZZ_EXPECT(std::find(codes.begin(), codes.end(), status.code()) != codes.end(), status.ToString().c_str());
  FUZZ_EXPECT(ReasonOf(status) != v1::ERROR_REASON_UNSPECIFIED, status.ToString().c_str());
  FUZZ_EXPECT(ReasonOf(status) != v1::ERROR_REASON_INTERNAL, status.ToString().c_str());
  FUZZ_EXPECT(status.message().size() < kLongestMessage, "a message that grows with its input");
}

}  // namespace headwater::fuzz
