#include "bench/prefill_prompts.h"

#include <limits>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr size_t kMostBytes = size_t{1} << 30, kMostNameBytes = 256;
constexpr size_t kMostIds = size_t{1} << 20, kMostU16 = size_t{1} << 24;
constexpr JsonLimits kLimits{size_t{64} << 20, 2, kMostIds + 8};

absl::Status Wrong(const std::string& message) { return absl::InvalidArgumentError(message); }

absl::StatusOr<std::vector<int32_t>> Ids(const json& list) {
  const std::string wanted = absl::StrCat("tokens: 1 to ", kMostIds, " token ids are wanted, not ");
  if (!list.is_array() || list.empty() || list.size() > kMostIds) return Wrong(wanted + Describe(list));
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<int32_t>::max()) {
      return Wrong(wanted + Describe(id));
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> IdsOfBase64(const json& text) {
  std::string bytes;
  if (!text.is_string() || !absl::Base64Unescape(text.get_ref<const std::string&>(), &bytes) ||
      bytes.empty() || bytes.size() % 2 != 0 || bytes.size() / 2 > kMostU16) {
    return Wrong(
        absl::StrCat("tokens_u16_b64: base64 of 1 to ", kMostU16, " uint16 is wanted, not ", Describe(text)));
  }
  std::vector<int32_t> ids(bytes.size() / 2);
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<uint8_t>(bytes[2 * i]) | static_cast<uint8_t>(bytes[2 * i + 1]) << 8;
  }
  return ids;
}

absl::StatusOr<BenchPrompt> ReadLine(absl::string_view line) {
  HW_ASSIGN_OR_RETURN(const json object, ParseJsonObject(line, kLimits, "it"));
  const JsonFields fields(object);
  for (const auto& [key, value] : object.items()) {
    if (key != "name" && key != "tokens" && key != "tokens_u16_b64") {
      return Wrong(absl::StrCat("unknown key ", Quoted(key)));
    }
  }
  const json* const name = fields.Find("name");
  if (name == nullptr || !name->is_string() || name->get_ref<const std::string&>().empty() ||
      name->get_ref<const std::string&>().size() > kMostNameBytes) {
    return Wrong(absl::StrCat("name: a text of 1 to ", kMostNameBytes, " bytes is wanted"));
  }
  const json* const ids = fields.Find("tokens");
  const json* const packed = fields.Find("tokens_u16_b64");
  if ((ids == nullptr) == (packed == nullptr)) {
    return Wrong("tokens and tokens_u16_b64: one of them is wanted");
  }
  BenchPrompt prompt;
  prompt.name = name->get<std::string>();
  HW_ASSIGN_OR_RETURN(prompt.tokens, ids != nullptr ? Ids(*ids) : IdsOfBase64(*packed));
  return prompt;
}

}  // namespace

absl::StatusOr<std::vector<BenchPrompt>> ReadBenchPrompts(const std::string& path) {
  const std::string where = absl::StrCat("--prompts=", path, ": ");
  absl::StatusOr<std::string> text = ReadFileUpTo(path, kMostBytes);
  if (!text.ok()) {
    return absl::Status(text.status().code(), absl::StrCat(where, text.status().message()));
  }
  std::vector<BenchPrompt> prompts;
  absl::flat_hash_set<std::string> names;
  int64_t number = 0;
  for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
    ++number;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    absl::StatusOr<BenchPrompt> prompt = ReadLine(line);
    if (prompt.ok() && !names.insert(prompt->name).second) {
      prompt = Wrong(absl::StrCat("name ", Quoted(prompt->name), " is there twice"));
    }
    if (!prompt.ok()) return Wrong(absl::StrCat(where, "line ", number, ": ", prompt.status().message()));
    prompts.push_back(*std::move(prompt));
  }
  if (prompts.empty()) return Wrong(where + "no prompts");
  return prompts;
}

}  // namespace headwater
