#include "base/version.h"

#include "absl/strings/str_cat.h"

#include "hw_commit.h"

namespace headwater {

std::string VersionText(absl::string_view program) {
  return absl::StrCat(program, " ", kVersion, " (commit ", HW_COMMIT, ", protocol ", kProtocolVersion, ")\n");
}

}  // namespace headwater
