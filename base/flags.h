// Command-line flags of one program or subcommand: declared once, parsed strictly, printed with their
// defaults. Nothing here ends the process or keeps global state.
//
//   FlagSet flags("headwater-decode --model=DIR [flags]");
//   flags.String("model", &options.model, "checkpoint directory");
//   HW_RETURN_IF_ERROR(flags.Parse(arguments));
//   if (flags.help_requested()) print flags.Help()
#ifndef HW_BASE_FLAGS_H_
#define HW_BASE_FLAGS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace headwater {

// What a value is in a typed file.
enum class FlagKind { kText, kBool, kInt, kReal };

// A flag with the value that it has now.
struct FlagValue {
  std::string name;
  FlagKind kind = FlagKind::kText;
  std::string default_text;  // as --help has it
  // As Set() takes it, in one spelling for each value. Nothing: the default, which is found at the start and
  // has no text.
  std::optional<std::string> text;
  bool is_default = true;  // also where it was given
  std::string source;      // as Set() was told; empty: nothing gave it
};

// Flags are written --name=value or --name value; a bool also as --name and --noname; a '-' inside a name
// counts as '_'. "--" ends them. A flag given twice keeps the last value. Not thread-safe. The values pointed
// to must outlive the set; what they hold when a flag is declared is its default.
class FlagSet {
 public:
  explicit FlagSet(absl::string_view usage) : usage_(usage) {}

  void String(absl::string_view name, std::string* value, absl::string_view help);
  void Bool(absl::string_view name, bool* value, absl::string_view help);
  // Refuses values outside [least, most].
  void Int(absl::string_view name, int64_t* value, int64_t least, int64_t most, absl::string_view help);
  // As ParseBytes().
  void Bytes(absl::string_view name, uint64_t* value, absl::string_view default_text, absl::string_view help);
  // As absl::ParseDuration(), a bare number counting as seconds.
  void Duration(absl::string_view name, absl::Duration* value, absl::Duration least, absl::Duration most,
                absl::string_view help);
  void Choice(absl::string_view name, std::string* value, std::vector<std::string> choices,
              absl::string_view help);
  // `set` takes the text; its error is reported with the flag's name in front.
  void Custom(absl::string_view name, absl::string_view default_text, absl::string_view help,
              std::function<absl::Status(absl::string_view)> set, FlagKind kind = FlagKind::kText);

  // Takes the arguments after the program's (or subcommand's) name. INVALID_ARGUMENT names the flag, its
  // value and what is allowed; for an unknown flag, the nearest known one. --help stops parsing. May be
  // called again.
  absl::Status Parse(absl::Span<const std::string> arguments);

  bool help_requested() const { return help_requested_; }
  // Arguments that are not flags, in order.
  const std::vector<std::string>& positional() const { return positional_; }
  // Gives a flag its value from elsewhere than the command line; errors begin with `source`. NOT_FOUND: there
  // is no such flag.
  absl::Status Set(absl::string_view name, absl::string_view value, absl::string_view source);
  // True where something gave that flag a value.
  bool IsSet(absl::string_view name) const;
  // INVALID_ARGUMENT that begins with where that flag's value is from: why a check of its own refuses it.
  absl::Status Refuse(absl::string_view name, absl::string_view why) const;
  // All flags, in the order of their declaration.
  std::vector<FlagValue> Values() const;
  // Usage line, then every flag with its default and help.
  std::string Help() const;

 private:
  struct Flag {
    FlagValue value;
    std::string help;
    std::optional<std::string> initial;  // value.text before anything gave one
    std::function<absl::Status(absl::string_view)> set;
    std::function<std::string()> show;  // the value's text, where that is not the one that was set

    bool is_bool() const { return value.kind == FlagKind::kBool; }
  };

  Flag* Find(absl::string_view name);
  static absl::Status Assign(absl::string_view value, absl::string_view source, Flag* flag);
  absl::Status Unknown(absl::string_view name) const;

  std::string usage_;
  std::vector<Flag> flags_;
  std::vector<std::string> positional_;
  bool help_requested_ = false;
};

// "1048576", "512MiB", "4GiB", "1.5TiB"; suffixes KiB, MiB, GiB, TiB (K, M, G, T mean the same). False: not
// such a number, or over 2^62.
bool ParseBytes(absl::string_view text, uint64_t* bytes);

// The word of `known` with the smallest edit distance to `word`, if that is at most 2; else empty.
std::string NearestWord(absl::string_view word, const std::vector<std::string>& known);

}  // namespace headwater

#endif  // HW_BASE_FLAGS_H_
