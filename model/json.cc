#include "model/json.h"

#include <cerrno>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace headwater {
namespace {

using nlohmann::json;

class BoundedSax : public nlohmann::json_sax<json> {
 public:
  explicit BoundedSax(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return Add(json(nullptr)) != nullptr; }
  bool boolean(bool value) override { return Add(json(value)) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(json(value)) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(json(value)) != nullptr; }
  bool number_float(number_float_t value, const string_t& /*text*/) override {
    return Add(json(value)) != nullptr;
  }
  bool string(string_t& value) override { return Add(json(std::move(value))) != nullptr; }
  bool binary(binary_t& /*value*/) override { return Fail("binary values are not JSON"); }

  bool start_object(size_t /*elements*/) override { return Open(json::object()); }
  bool end_object() override { return Close(); }
  bool start_array(size_t /*elements*/) override { return Open(json::array()); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    auto [place, inserted] = open_.back()->get_ref<json::object_t&>().emplace(name, nullptr);
    if (!inserted) return Fail(absl::StrCat("the key ", Quoted(name), " appears twice in one object"));
    slot_ = &place->second;
    return true;
  }

  bool parse_error(size_t position, const std::string& /*last_token*/,
                   const nlohmann::detail::exception& error) override {
    return Fail(absl::StrCat("not JSON at byte ", position, ": ", Quoted(error.what())));
  }

  const std::string& error() const { return error_; }
  json Take() { return std::move(root_); }

 private:
  bool Fail(std::string error) {
    error_ = std::move(error);
    return false;
  }

  // Puts `value` where the parser stands; null: too many values.
  json* Add(json value) {
    if (++values_ > limits_.max_values) {
      Fail(absl::StrCat("more than ", limits_.max_values, " values"));
      return nullptr;
    }
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& array = open_.back()->get_ref<json::array_t&>();
      array.push_back(std::move(value));
      return &array.back();
    }
    *slot_ = std::move(value);
    return slot_;
  }

  bool Open(json container) {
    if (open_.size() >= static_cast<size_t>(limits_.max_depth)) {
      return Fail(absl::StrCat("nested deeper than ", limits_.max_depth));
    }
    json* const place = Add(std::move(container));
    if (place == nullptr) return false;
    open_.push_back(place);
    return true;
  }

  bool Close() {
    open_.pop_back();
    return true;
  }

  const JsonLimits limits_;
  json root_;
  // An open container's parent does not grow until the container is closed, so the pointers stay valid.
  std::vector<json*> open_;
  json* slot_ = nullptr;
  size_t values_ = 0;
  std::string error_;
};

absl::Status SystemError(absl::string_view what, const std::string& path) {
  const int error = errno;
  return absl::ErrnoToStatus(error, absl::StrCat(what, " ", Quoted(path)));
}

}  // namespace

absl::StatusOr<json> ParseJsonObject(absl::string_view text, const JsonLimits& limits,
                                     absl::string_view what) {
  if (text.size() > limits.max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": ", text.size(), " bytes; at most ", limits.max_bytes));
  }
  try {
    BoundedSax sax(limits);
    if (!json::sax_parse(text.begin(), text.end(), &sax)) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": ", sax.error()));
    }
    json root = sax.Take();
    if (!root.is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": the outermost value is ", Describe(root), "; must be an object"));
    }
    return root;
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": ", Quoted(error.what())));
  }
}

absl::StatusOr<std::string> ReadFileUpTo(const std::string& path, size_t max_bytes) {
  // Not blocking: a FIFO without a writer would hold open() for ever.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return SystemError("open", path);
  const absl::Cleanup closer = [fd] { close(fd); };
  struct stat info;
  if (fstat(fd, &info) != 0) return SystemError("stat", path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(Quoted(path), " is not a regular file"));
  }
  if (static_cast<uint64_t>(info.st_size) > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(Quoted(path), ": ", info.st_size, " bytes; at most ", max_bytes));
  }
  std::string contents(static_cast<size_t>(info.st_size), '\0');
  size_t have = 0;
  while (have < contents.size()) {
    const ssize_t count = read(fd, contents.data() + have, contents.size() - have);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return SystemError("read", path);
    if (count == 0) break;
    have += static_cast<size_t>(count);
  }
  contents.resize(have);
  return contents;
}

std::string Quoted(absl::string_view text) {
  constexpr size_t kMostCharacters = 96;
  const bool cut = text.size() > kMostCharacters;
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, kMostCharacters)), cut ? "...\"" : "\"");
}

std::string Describe(const json& value) {
  if (value.is_string()) return Quoted(value.get_ref<const std::string&>());
  constexpr size_t kMostCharacters = 96;
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kMostCharacters) {
    text.resize(kMostCharacters);
    text += "...";
  }
  return text;
}

}  // namespace headwater
