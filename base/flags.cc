#include "base/flags.h"

#include <algorithm>
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

void FlagSet::Add(Flag flag) { flags_.push_back(std::move(flag)); }

void FlagSet::String(absl::string_view name, std::string* value, absl::string_view help) {
  Custom(name, *value, help, [value](absl::string_view text) {
    *value = std::string(text);
    return absl::OkStatus();
  });
}

void FlagSet::Bool(absl::string_view name, bool* value, absl::string_view help) {
  Custom(name, *value ? "true" : "false", help, [value](absl::string_view text) {
    return absl::SimpleAtob(text, value) ? absl::OkStatus() : Bad(text, "true or false");
  });
  flags_.back().is_bool = true;
}

void FlagSet::Int(absl::string_view name, int64_t* value, int64_t least, int64_t most,
                  absl::string_view help) {
  Custom(name, absl::StrCat(*value), help, [value, least, most](absl::string_view text) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(text, &number) || number < least || number > most) {
      return Bad(text, absl::StrCat("a whole number from ", least, " to ", most));
    }
    *value = number;
    return absl::OkStatus();
  });
}

void FlagSet::Bytes(absl::string_view name, uint64_t* value, absl::string_view default_text,
                    absl::string_view help) {
  Custom(name, default_text, help, [value](absl::string_view text) {
    return ParseBytes(text, value) ? absl::OkStatus()
                                   : Bad(text, "a number of bytes (such as 1073741824, 512MiB or 4GiB)");
  });
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
                     std::function<absl::Status(absl::string_view)> set) {
  Flag flag;
  flag.name = std::string(name);
  flag.default_text = std::string(default_text);
  flag.help = std::string(help);
  flag.set = std::move(set);
  Add(std::move(flag));
}

FlagSet::Flag* FlagSet::Find(absl::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

bool FlagSet::IsSet(absl::string_view name) const {
  return std::any_of(flags_.begin(), flags_.end(),
                     [name](const Flag& flag) { return flag.name == name && flag.is_set; });
}

absl::Status FlagSet::Unknown(absl::string_view name) const {
  std::vector<std::string> known;
  for (const Flag& flag : flags_) known.push_back(flag.name);
  const std::string nearest = NearestWord(name, known);
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown flag --", name, nearest.empty() ? "" : absl::StrCat("; did you mean --", nearest, "?"),
      nearest.empty() ? "; --help lists the flags" : ""));
}

absl::Status FlagSet::Parse(absl::Span<const std::string> arguments) {
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
      if (flag != nullptr && flag->is_bool) value = "false";
      if (flag != nullptr && !flag->is_bool) flag = nullptr;
    } else if (flag != nullptr && !has_value) {
      if (flag->is_bool) {
        value = "true";
      } else if (i + 1 < arguments.size()) {
        value = arguments[++i];
      } else {
        return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
      }
    }
    if (flag == nullptr) return Unknown(name);
    const absl::Status status = flag->set(value);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--", flag->name, ": ", status.message()));
    }
    flag->is_set = true;
  }
  return absl::OkStatus();
}

std::string FlagSet::Help() const {
  std::string out = absl::StrCat("usage: ", usage_, "\n\nflags:\n");
  for (const Flag& flag : flags_) {
    absl::StrAppend(&out, "  --", flag.name, flag.is_bool ? "" : "=VALUE");
    if (!flag.default_text.empty()) absl::StrAppend(&out, " (default ", flag.default_text, ")");
    absl::StrAppend(&out, "\n      ", flag.help, "\n");
  }
  return out;
}

}  // namespace headwater
