#include "base/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

namespace headwater {
namespace {

int EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

absl::Status Bad(absl::string_view value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat("'", value, "' is not ", allowed));
}

// The one spelling of a value that was accepted.
std::string Canonical(FlagKind kind, absl::string_view text) {
  bool truth = false;
  int64_t number = 0;
  double real = 0;
  if (kind == FlagKind::kBool && absl::SimpleAtob(text, &truth)) return truth ? "true" : "false";
  if (kind == FlagKind::kInt && absl::SimpleAtoi(text, &number)) return absl::StrCat(number);
  if (kind == FlagKind::kReal && absl::SimpleAtod(text, &real)) {
    char shortest[32];
    const auto end = std::to_chars(shortest, shortest + sizeof(shortest), real);
    return std::string(shortest, end.ptr);
  }
  return std::string(text);
}

std::string FormatBytes(uint64_t bytes) {
  constexpr absl::string_view kSuffixes[] = {"", "KiB", "MiB", "GiB", "TiB"};
  size_t i = 0;
  while (bytes != 0 && bytes % 1024 == 0 && i + 1 < std::size(kSuffixes)) {
    bytes /= 1024;
    ++i;
  }
  return absl::StrCat(bytes, kSuffixes[i]);
}

}  // namespace

bool ParseBytes(absl::string_view text, uint64_t* bytes) {
  text = absl::StripAsciiWhitespace(text);
  struct Suffix {
    absl::string_view text;
    double factor;
  };
  constexpr double kKilo = 1024;
  const Suffix suffixes[] = {
      {"K", kKilo}, {"M", kKilo * kKilo}, {"G", kKilo * kKilo * kKilo}, {"T", kKilo * kKilo * kKilo * kKilo}};
  constexpr uint64_t kMost = uint64_t{1} << 62;
  const absl::string_view short_form = absl::StripSuffix(text, "iB");
  for (const Suffix& suffix : suffixes) {
    absl::string_view number = short_form;
    if (!absl::ConsumeSuffix(&number, suffix.text)) continue;
    double value = 0;
    if (!absl::SimpleAtod(number, &value) || !(value >= 0)) return false;
    value *= suffix.factor;
    if (!(value <= static_cast<double>(kMost))) return false;
    *bytes = static_cast<uint64_t>(std::llround(value));
    return true;
  }
  return absl::SimpleAtoi(text, bytes) && *bytes <= kMost;
}

std::string NearestWord(absl::string_view word, const std::vector<std::string>& known) {
  constexpr size_t kLongest = 64;
  if (word.size() > kLongest) return "";
  std::string nearest;
  int least = 3;
  for (const std::string& candidate : known) {
    const int distance = EditDistance(word, candidate);
    if (distance < least) {
      least = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

void FlagSet::String(absl::string_view name, std::string* value, absl::string_view help) {
  Custom(name, *value, help, [value](absl::string_view text) {
    *value = std::string(text);
    return absl::OkStatus();
  });
}

void FlagSet::Bool(absl::string_view name, bool* value, absl::string_view help) {
  Custom(
      name, *value ? "true" : "false", help,
      [value](absl::string_view text) {
        return absl::SimpleAtob(text, value) ? absl::OkStatus() : Bad(text, "true or false");
      },
      FlagKind::kBool);
}

void FlagSet::Int(absl::string_view name, int64_t* value, int64_t least, int64_t most,
                  absl::string_view help) {
  const auto set = [value, least, most](absl::string_view text) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(text, &number) || number < least || number > most) {
      return Bad(text, absl::StrCat("a whole number from ", least, " to ", most));
    }
    *value = number;
    return absl::OkStatus();
  };
  Custom(name, absl::StrCat(*value), help, set, FlagKind::kInt);
}

void FlagSet::Bytes(absl::string_view name, uint64_t* value, absl::string_view default_text,
                    absl::string_view help) {
  Custom(name, default_text, help, [value](absl::string_view text) {
    return ParseBytes(text, value) ? absl::OkStatus()
                                   : Bad(text, "a number of bytes (such as 1073741824, 512MiB or 4GiB)");
  });
  Flag& flag = flags_.back();
  flag.show = [value] { return FormatBytes(*value); };
  uint64_t bytes = 0;
  if (!ParseBytes(default_text, &bytes) || bytes != *value) flag.initial.reset();
  flag.value.text = flag.initial;
}

void FlagSet::Duration(absl::string_view name, absl::Duration* value, absl::Duration least,
                       absl::Duration most, absl::string_view help) {
  Custom(name, absl::FormatDuration(*value), help, [value, least, most](absl::string_view text) {
    absl::Duration duration;
    double seconds = 0;
    if (absl::SimpleAtod(text, &seconds)) {
      duration = absl::Seconds(seconds);
    } else if (!absl::ParseDuration(text, &duration)) {
      return Bad(text, "a duration (such as 500ms, 30s or 5m)");
    }
    if (!(duration >= least && duration <= most)) {
      return Bad(text, absl::StrCat("a duration from ", absl::FormatDuration(least), " to ",
                                    absl::FormatDuration(most)));
    }
    *value = duration;
    return absl::OkStatus();
  });
  flags_.back().show = [value] { return absl::FormatDuration(*value); };
}

void FlagSet::Choice(absl::string_view name, std::string* value, std::vector<std::string> choices,
                     absl::string_view help) {
  const std::string shown = absl::StrCat(help, " (", absl::StrJoin(choices, ", "), ")");
  Custom(name, *value, shown, [value, choices = std::move(choices)](absl::string_view text) {
    if (std::find(choices.begin(), choices.end(), std::string(text)) == choices.end()) {
      return Bad(text, absl::StrCat("one of ", absl::StrJoin(choices, ", ")));
    }
    *value = std::string(text);
    return absl::OkStatus();
  });
}

void FlagSet::Custom(absl::string_view name, absl::string_view default_text, absl::string_view help,
                     std::function<absl::Status(absl::string_view)> set, FlagKind kind) {
  Flag flag;
  flag.value.name = std::string(name);
  flag.value.kind = kind;
  flag.value.default_text = std::string(default_text);
  flag.initial = flag.value.text = Canonical(kind, default_text);
  flag.help = std::string(help);
  flag.set = std::move(set);
  flags_.push_back(std::move(flag));
}

FlagSet::Flag* FlagSet::Find(absl::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.value.name == name) return &flag;
  }
  return nullptr;
}

absl::Status FlagSet::Assign(absl::string_view value, absl::string_view source, Flag* flag) {
  const absl::Status status = flag->set(value);
  if (!status.ok()) return absl::InvalidArgumentError(absl::StrCat(source, ": ", status.message()));
  FlagValue& now = flag->value;
  now.text = flag->show ? flag->show() : Canonical(now.kind, value);
  now.is_default = now.text == flag->initial;
  now.source = std::string(source);
  return absl::OkStatus();
}

absl::Status FlagSet::Set(absl::string_view name, absl::string_view value, absl::string_view source) {
  Flag* const flag = Find(name);
  if (flag == nullptr) return absl::NotFoundError(absl::StrCat(source, ": there is no flag --", name));
  return Assign(value, source, flag);
}

absl::Status FlagSet::Refuse(absl::string_view name, absl::string_view why) const {
  for (const Flag& flag : flags_) {
    if (flag.value.name == name && !flag.value.source.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(flag.value.source, ": ", why));
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("--", name, ": ", why));
}

std::vector<FlagValue> FlagSet::Values() const {
  std::vector<FlagValue> values;
  for (const Flag& flag : flags_) values.push_back(flag.value);
  return values;
}

bool FlagSet::IsSet(absl::string_view name) const {
  return std::any_of(flags_.begin(), flags_.end(), [name](const Flag& flag) {
    return flag.value.name == name && !flag.value.source.empty();
  });
}

absl::Status FlagSet::Unknown(absl::string_view name) const {
  std::vector<std::string> known;
  for (const Flag& flag : flags_) known.push_back(flag.value.name);
  const std::string nearest = NearestWord(name, known);
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown flag --", name, nearest.empty() ? "" : absl::StrCat("; did you mean --", nearest, "?"),
      nearest.empty() ? "; --help lists the flags" : ""));
}

absl::Status FlagSet::Parse(absl::Span<const std::string> arguments) {
  positional_.clear();
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (argument == "--") {
      positional_.insert(positional_.end(), arguments.begin() + i + 1, arguments.end());
      return absl::OkStatus();
    }
    if (argument == "--help" || argument == "-h") {
      help_requested_ = true;
      return absl::OkStatus();
    }
    if (!absl::ConsumePrefix(&argument, "--")) {
      if (argument.size() > 1 && argument[0] == '-') return Unknown(argument.substr(1));
      positional_.emplace_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const bool has_value = equals != absl::string_view::npos;
    const std::string name = absl::StrReplaceAll(argument.substr(0, equals), {{"-", "_"}});
    absl::string_view value = has_value ? argument.substr(equals + 1) : absl::string_view();
    Flag* flag = Find(name);
    if (flag == nullptr && !has_value && absl::StartsWith(name, "no")) {
      flag = Find(absl::string_view(name).substr(2));
      if (flag != nullptr && flag->is_bool()) value = "false";
      if (flag != nullptr && !flag->is_bool()) flag = nullptr;
    } else if (flag != nullptr && !has_value) {
      if (flag->is_bool()) {
        value = "true";
      } else if (i + 1 < arguments.size()) {
        value = arguments[++i];
      } else {
        return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
      }
    }
    if (flag == nullptr) return Unknown(name);
    const absl::Status status = Assign(value, absl::StrCat("--", flag->value.name), flag);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

std::string FlagSet::Help() const {
  std::string out = absl::StrCat("usage: ", usage_, "\n\nflags:\n");
  for (const Flag& flag : flags_) {
    absl::StrAppend(&out, "  --", flag.value.name, flag.is_bool() ? "" : "=VALUE");
    if (!flag.value.default_text.empty()) absl::StrAppend(&out, " (default ", flag.value.default_text, ")");
    absl::StrAppend(&out, "\n      ", flag.help, "\n");
  }
  return out;
}

}  // namespace headwater
