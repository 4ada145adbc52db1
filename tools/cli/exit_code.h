// Exit codes of the `headwater` command, and how errors are shown.
#ifndef HW_TOOLS_CLI_EXIT_CODE_H_
#define HW_TOOLS_CLI_EXIT_CODE_H_

#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace headwater {

enum ExitCode : int {
  kExitOk = 0,
  kExitOther = 1,
  kExitUsage = 2,         // the message names the flag or the value
  kExitRefused = 3,       // the request as it is will not be served
  kExitRetryable = 4,     // unavailable, deadline, exhausted, aborted: later it may be
  kExitCancelled = 5,     // by somebody else
  kExitInterrupted = 130  // by Ctrl-C
};

// Of an error that a service answered.
int ExitCodeOf(const absl::Status& status);

// The variable parts that came with an error, "retry_after" among them.
std::map<std::string, std::string> ErrorMetadata(const absl::Status& status);

// "NOT_FOUND UNKNOWN_DECODE_NODE: message", then one "  key: value" line for each piece of metadata. Control
// characters are shown as '?'.
std::string DescribeError(const absl::Status& status);

// `text` without control characters, for the terminal.
std::string Printable(absl::string_view text);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_EXIT_CODE_H_
