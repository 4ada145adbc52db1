#include "model/json_fields.h"

#include "absl/strings/str_cat.h"

#include "model/json.h"

namespace headwater {

using nlohmann::json;

const json* JsonFields::Find(absl::string_view name) const {
  const auto found = object_.find(std::string(name));
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool JsonFields::Contains(absl::string_view name) const { return object_.contains(std::string(name)); }

std::string JsonFields::Named(absl::string_view name) const {
  const json* const value = Find(name);
  const std::string shown = value != nullptr ? Describe(*value) : Contains(name) ? "null" : "absent";
  return absl::StrCat(prefix_, name, " is ", shown);
}

absl::Status JsonFields::Wrong(absl::string_view name, absl::string_view wanted) const {
  return absl::InvalidArgumentError(absl::StrCat(Named(name), "; must be ", wanted));
}

absl::Status JsonFields::NotSupported(absl::string_view name, absl::string_view supported) const {
  return absl::UnimplementedError(
      absl::StrCat(Named(name), ", which is not supported; supported: ", supported));
}

absl::StatusOr<int64_t> JsonFields::Integer(absl::string_view name, int64_t least, int64_t most,
                                            std::optional<int64_t> fallback) const {
  const json* const value = Find(name);
  if (value == nullptr && fallback.has_value()) return *fallback;
  const std::string wanted = absl::StrCat("an integer from ", least, " to ", most);
  if (value == nullptr || !value->is_number_integer()) return Wrong(name, wanted);
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    return Wrong(name, wanted);
  }
  const int64_t number = value->get<int64_t>();
  if (number < least || number > most) return Wrong(name, wanted);
  return number;
}

absl::StatusOr<double> JsonFields::Number(absl::string_view name, double least, double most,
                                          std::optional<double> fallback) const {
  const json* const value = Find(name);
  if (value == nullptr && fallback.has_value()) return *fallback;
  const std::string wanted = absl::StrCat("a number from ", least, " to ", most);
  if (value == nullptr || !value->is_number()) return Wrong(name, wanted);
  const double number = value->get<double>();
  if (!(number >= least && number <= most)) return Wrong(name, wanted);
  return number;
}

absl::StatusOr<bool> JsonFields::Boolean(absl::string_view name, bool fallback) const {
  const json* const value = Find(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return Wrong(name, "true or false");
  return value->get<bool>();
}

absl::StatusOr<std::string> JsonFields::String(absl::string_view name, absl::string_view fallback) const {
  const json* const value = Find(name);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) return Wrong(name, "a string");
  return value->get<std::string>();
}

}  // namespace headwater
