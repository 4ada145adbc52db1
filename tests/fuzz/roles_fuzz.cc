// The file that says who may call what.
#include <string>

#include "absl/strings/match.h"

#include "base/rpc/roles.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

void Run(absl::string_view input) {
  const absl::StatusOr<Roles> roles = Roles::Parse(std::string(input));
  if (!roles.ok()) {
    FUZZ_EXPECT(absl::IsInvalidArgument(roles.status()), roles.status().ToString().c_str());
    return;
  }
  FUZZ_EXPECT(!roles->Allows("", "") || absl::StrContains(input, "*"), "nothing is allowed to nobody");
  roles->Allows("spiffe://prod/client", "/headwater.v1.PrefillService/Prefill");
  roles->Allows(input, input);
}

std::vector<std::string> Seeds() {
  return {
      DefaultRoles(),
      "rules { name: \"a\" principals: \"spiffe://x/*\" principals: \"*\" methods: \"/a.B/C\" }",
      "rules { principals: \"\\001\\377\" methods: '*' } # comment\nrules: <principals: 'p' methods: 'm'>"};
}

const Registration kTarget({"roles", Run, Seeds, nullptr});

}  // namespace
}  // namespace headwater::fuzz
