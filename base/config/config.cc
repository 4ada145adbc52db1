#include "base/config/config.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>
#include <openssl/sha.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::TextFormat;

constexpr size_t kMostFileBytes = 1 << 20;
constexpr absl::string_view kVariablePrefix = "HEADWATER_FLAG_";
constexpr absl::string_view kConfig = "config";
constexpr absl::string_view kPrintConfig = "print_config";

// The first error, counted from 1 as editors do.
class FirstError final : public google::protobuf::io::ErrorCollector {
 public:
  explicit FirstError(absl::string_view path) : path_(path) {}
  void AddError(int line, int column, const std::string& message) override {
    if (text.empty()) text = absl::StrCat(path_, ":", line + 1, ":", column + 1, ": ", message);
  }
  std::string text;

 private:
  const absl::string_view path_;
};

// INVALID_ARGUMENT says why it cannot be.
absl::Status ReadBounded(const std::string& path, std::string* text) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot be opened: ", std::strerror(errno)));
  text->assign(kMostFileBytes + 1, '\0');
  file.read(text->data(), static_cast<std::streamsize>(text->size()));
  if (file.bad() || (!file && !file.eof())) return absl::InvalidArgumentError("cannot be read");
  const auto bytes = static_cast<size_t>(file.gcount());
  if (bytes > kMostFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat("has more bytes than the limit of ", kMostFileBytes));
  }
  text->resize(bytes);
  return absl::OkStatus();
}

// A field's value as a flag takes it.
std::string TextOf(const Message& message, const FieldDescriptor* field) {
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
    return message.GetReflection()->GetString(message, field);
  }
  std::string text;
  TextFormat::PrintFieldValueToString(message, field, -1, &text);
  return text;
}

FieldDescriptor::Type TypeOf(FlagKind kind) {
  switch (kind) {
    case FlagKind::kBool:
      return FieldDescriptor::TYPE_BOOL;
    case FlagKind::kInt:
      return FieldDescriptor::TYPE_INT64;
    case FlagKind::kReal:
      return FieldDescriptor::TYPE_DOUBLE;
    case FlagKind::kText:
      break;
  }
  return FieldDescriptor::TYPE_STRING;
}

std::string VariableOf(absl::string_view flag) {
  return absl::StrCat(kVariablePrefix, absl::AsciiStrToUpper(flag));
}

bool IsField(const FlagValue& flag) { return flag.name != kConfig && flag.name != kPrintConfig; }

std::string Assignment(const FlagValue& flag) {
  if (flag.kind != FlagKind::kText) return absl::StrCat(flag.name, ": ", *flag.text);
  return absl::StrCat(flag.name, ": \"", absl::Utf8SafeCEscape(*flag.text), "\"");
}

}  // namespace

Config::Config(const Message& message, absl::Span<const absl::string_view> own, FlagSet* flags)
    : message_(message), own_(own), flags_(flags) {
  flags->String(kConfig, &file_,
                "textproto file of these flags (headwater/v1/config.proto), which the environment's "
                "HEADWATER_FLAG_NAME overrules, and the command line both; empty: none");
  flags->Bool(kPrintConfig, &print_, "check all, print the values in effect as such a file, and end");
}

absl::Status Config::Read(absl::Span<const std::string> arguments,
                          absl::Span<const std::string> environment) {
  const std::string differing = FieldsThatDiffer(message_, *flags_);
  if (!differing.empty()) HW_LOG(ERROR) << differing;
  HW_CHECK(differing.empty());
  // Twice: it names the file, and has the last word.
  HW_RETURN_IF_ERROR(flags_->Parse(arguments));
  if (flags_->help_requested()) return absl::OkStatus();
  const bool has_file = flags_->IsSet(kConfig);
  const std::string variable = VariableOf(kConfig);
  for (const std::string& setting : environment) {
    absl::string_view value = setting;
    if (has_file || !absl::ConsumePrefix(&value, absl::StrCat(variable, "="))) continue;
    HW_RETURN_IF_ERROR(flags_->Set(kConfig, value, variable));
  }
  if (!file_.empty()) HW_RETURN_IF_ERROR(ReadFile());
  HW_RETURN_IF_ERROR(ReadEnvironment(environment));
  return flags_->Parse(arguments);
}

absl::Status Config::ReadFile() {
  std::string text;
  const absl::Status status = ReadBounded(file_, &text);
  if (!status.ok()) return flags_->Refuse(kConfig, absl::StrCat("'", file_, "' ", status.message()));
  const std::unique_ptr<Message> message(message_.New());
  FirstError error(file_);
  google::protobuf::TextFormat::ParseInfoTree places;
  TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.WriteLocationsTo(&places);
  if (!parser.ParseFromString(text, message.get())) {
    return absl::InvalidArgumentError(error.text.empty() ? absl::StrCat(file_, ": no textproto")
                                                         : error.text);
  }
  std::vector<const FieldDescriptor*> fields;
  message->GetReflection()->ListFields(*message, &fields);
  for (const FieldDescriptor* const field : fields) {
    const TextFormat::ParseLocation place = places.GetLocation(field, -1);
    const std::string source =
        absl::StrCat(file_, ":", place.line + 1, ":", place.column + 1, ": ", field->name());
    HW_RETURN_IF_ERROR(flags_->Set(field->name(), TextOf(*message, field), source));
  }
  return absl::OkStatus();
}

absl::Status Config::ReadEnvironment(absl::Span<const std::string> environment) {
  const std::vector<FlagValue> flags = flags_->Values();
  for (const std::string& setting : environment) {
    const size_t equals = setting.find('=');
    const std::string variable = setting.substr(0, equals);
    absl::string_view word = variable;
    if (equals == std::string::npos || !absl::ConsumePrefix(&word, kVariablePrefix)) continue;
    std::vector<std::string> known;
    for (const FlagValue& flag : flags) known.push_back(VariableOf(flag.name));
    if (std::find(known.begin(), known.end(), variable) == known.end()) {
      const std::string nearest = NearestWord(VariableOf(word), known);
      return absl::InvalidArgumentError(absl::StrCat(
          variable, " of the environment is no flag's variable",
          nearest.empty() ? "; --help lists the flags" : absl::StrCat("; did you mean ", nearest, "?")));
    }
    HW_RETURN_IF_ERROR(
        flags_->Set(absl::AsciiStrToLower(word), absl::string_view(setting).substr(equals + 1), variable));
  }
  return absl::OkStatus();
}

std::string Config::Print() const {
  std::string out = "# proto-file: headwater/v1/config.proto\n# proto-message: ";
  absl::StrAppend(&out, message_.GetDescriptor()->full_name(), "\n");
  for (const FlagValue& flag : flags_->Values()) {
    if (!IsField(flag)) continue;
    if (!flag.text.has_value()) {
      absl::StrAppend(&out, "# ", flag.name, ": found at the start", flag.default_text.empty() ? "" : ": ",
                      flag.default_text, "\n");
      continue;
    }
    // A path may hold a line's end.
    const std::string source = absl::CEscape(absl::StripSuffix(flag.source, absl::StrCat(": ", flag.name)));
    absl::StrAppend(&out, Assignment(flag), flag.is_default ? "" : absl::StrCat("  # ", source), "\n");
  }
  return out;
}

ConfigSummary Config::Summary() const {
  ConfigSummary summary;
  summary.file = file_;
  std::string hashed;
  for (const FlagValue& flag : flags_->Values()) {
    if (!IsField(flag)) continue;
    if (!flag.is_default) ++summary.num_changed;
    const bool is_own = std::find(own_.begin(), own_.end(), flag.name) != own_.end();
    if (!is_own && flag.text.has_value()) absl::StrAppend(&hashed, Assignment(flag), "\n");
  }
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(hashed.data()), hashed.size(), digest);
  summary.sha256 = absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), 8));
  return summary;
}

std::string FieldsThatDiffer(const Message& message, const FlagSet& flags) {
  const google::protobuf::Descriptor* const descriptor = message.GetDescriptor();
  std::string differing;
  int num_found = 0;
  for (const FlagValue& flag : flags.Values()) {
    if (!IsField(flag)) continue;
    const FieldDescriptor* const field = descriptor->FindFieldByName(flag.name);
    if (field != nullptr) ++num_found;
    if (field == nullptr || !field->has_optional_keyword() || field->type() != TypeOf(flag.kind)) {
      absl::StrAppend(&differing, descriptor->name(), " lacks `optional ",
                      FieldDescriptor::TypeName(TypeOf(flag.kind)), " ", flag.name, "`. ");
    }
  }
  if (num_found != descriptor->field_count()) {
    absl::StrAppend(&differing, descriptor->field_count() - num_found, " fields of ", descriptor->name(),
                    " are no flags.");
  }
  return differing;
}

std::vector<std::string> ProcessEnvironment() {
  std::vector<std::string> environment;
  for (char** setting = environ; setting != nullptr && *setting != nullptr; ++setting) {
    environment.emplace_back(*setting);
  }
  return environment;
}

void LogConfig(const ConfigSummary& summary) {
  HW_LOG(INFO).Field("file", summary.file).Field("sha256", summary.sha256)
      << "configuration: " << summary.num_changed << " values are not the defaults";
}

}  // namespace headwater
