// Typed fields of a JSON object. A field that is absent or null gives the default; a field of another type or
// outside its range is INVALID_ARGUMENT, with the field's name, its value and the range.
#ifndef HW_MODEL_JSON_FIELDS_H_
#define HW_MODEL_JSON_FIELDS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace headwater {

class JsonFields {
 public:
  // `object` must be an object and outlive this. `prefix` goes before names in messages ("rope_scaling.").
  explicit JsonFields(const nlohmann::json& object, absl::string_view prefix = "")
      : object_(object), prefix_(prefix) {}

  // Null: absent, or JSON's null.
  const nlohmann::json* Find(absl::string_view name) const;
  // True where the key is there, even with JSON's null.
  bool Contains(absl::string_view name) const;

  // Without `fallback` the field is required.
  absl::StatusOr<int64_t> Integer(absl::string_view name, int64_t least, int64_t most,
                                  std::optional<int64_t> fallback = std::nullopt) const;
  absl::StatusOr<double> Number(absl::string_view name, double least, double most,
                                std::optional<double> fallback = std::nullopt) const;
  absl::StatusOr<bool> Boolean(absl::string_view name, bool fallback) const;
  absl::StatusOr<std::string> String(absl::string_view name, absl::string_view fallback) const;

  // "prefix + name is VALUE; must be WANTED".
  absl::Status Wrong(absl::string_view name, absl::string_view wanted) const;
  // The same with UNIMPLEMENTED: "... is not supported; supported: WHAT".
  absl::Status NotSupported(absl::string_view name, absl::string_view supported) const;

 private:
  std::string Named(absl::string_view name) const;

  const nlohmann::json& object_;
  const std::string prefix_;
};

}  // namespace headwater

#endif  // HW_MODEL_JSON_FIELDS_H_
