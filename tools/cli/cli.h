// The `headwater` command, without its main().
#ifndef HW_TOOLS_CLI_CLI_H_
#define HW_TOOLS_CLI_CLI_H_

#include <string>

#include "absl/types/span.h"

#include "tools/cli/console.h"

namespace headwater {

// Runs `arguments` (without the program's name) and returns the exit code: see exit_code.h.
int RunCli(absl::Span<const std::string> arguments, const Console& console);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_CLI_H_
