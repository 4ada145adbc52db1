// A program's configuration: its flags, given by a file, by the environment and by the command line. A later
// one of these replaces what an earlier one gave; a wrong value is refused wherever it is, also where it
// would be replaced.
//
//   --config=FILE             textproto of the program's message in headwater/v1/config.proto
//   HEADWATER_FLAG_MAX_EPOCHS=5   as --max_epochs=5
//   --print_config            prints what is in effect, as such a file
#ifndef HW_BASE_CONFIG_CONFIG_H_
#define HW_BASE_CONFIG_CONFIG_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

#include "base/flags.h"

namespace google::protobuf {
class Message;
}

namespace headwater {

// What a process tells of its configuration.
struct ConfigSummary {
  std::string file;     // empty: none
  int num_changed = 0;  // flags whose value is not the default
  std::string sha256 =
      {};  // first 16 hex digits, of Print() without comments and flags of its own; empty: not known
};

class Config {
 public:
  // Declares --config and --print_config. `message` has a field for each of the other flags, of its name.
  // `own`: flags that differ between replicas by their nature (addresses, names), which the hash leaves out.
  // All outlive this.
  Config(const google::protobuf::Message& message, absl::Span<const absl::string_view> own, FlagSet* flags);

  // Takes the arguments after the program's name, and the environment as "NAME=value". INVALID_ARGUMENT
  // begins with where the wrong value is from ("FILE:LINE:COLUMN", variable or flag), and has the value and
  // what is allowed. On --help only the arguments are looked at.
  absl::Status Read(absl::Span<const std::string> arguments, absl::Span<const std::string> environment);

  bool print_requested() const { return print_; }
  // What --config takes: every flag that has a value, with comments that name where it is from. A default
  // that is found at the start is a comment alone.
  std::string Print() const;
  ConfigSummary Summary() const;

 private:
  absl::Status ReadFile();
  absl::Status ReadEnvironment(absl::Span<const std::string> environment);

  const google::protobuf::Message& message_;
  const absl::Span<const absl::string_view> own_;
  FlagSet* const flags_;
  std::string file_;
  bool print_ = false;
};

// Where a message's fields are not the flags, one `optional` field each of the flag's type; empty: they are.
// Read() holds a program to it.
std::string FieldsThatDiffer(const google::protobuf::Message& message, const FlagSet& flags);

// Of this process.
std::vector<std::string> ProcessEnvironment();

// One line, at the start.
void LogConfig(const ConfigSummary& summary);

}  // namespace headwater

#endif  // HW_BASE_CONFIG_CONFIG_H_
