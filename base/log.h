// Structured logs: one line per event on stderr, as text or as one JSON object.
//
//   HW_LOG(INFO).Field("request_id", id).Field("rank", rank) << "prefill started, " << n << " tokens";
//
// Prompts and token ids never go into logs. Whoever stops the propagation of an error logs it, once.
#ifndef HW_BASE_LOG_H_
#define HW_BASE_LOG_H_

#include <cstdint>
#include <sstream>
#include <string>

#include "absl/strings/string_view.h"

namespace headwater {

enum class LogSeverity { kDEBUG, kINFO, kWARNING, kERROR };
enum class LogFormat { kText, kJson };

// Sets the process-wide format, the least severity written, and the component that every line names
// ("worker"). Call before threads start; the defaults are text, INFO and "".
void InitLogging(LogFormat format, LogSeverity least, absl::string_view component);

// Parses "text" or "json"; false: neither.
bool ParseLogFormat(absl::string_view text, LogFormat* format);

// Lines written at WARNING or above since the start; tests use it to find the unexpected ones.
int64_t NumLogProblems();

// One line; written by the destructor. Not for storing.
class LogLine {
 public:
  LogLine(LogSeverity severity, const char* file, int line);
  ~LogLine();
  LogLine(const LogLine&) = delete;
  LogLine& operator=(const LogLine&) = delete;

  LogLine& Field(absl::string_view key, absl::string_view value);
  LogLine& Field(absl::string_view key, const char* value) { return Field(key, absl::string_view(value)); }
  LogLine& Field(absl::string_view key, const std::string& value) {
    return Field(key, absl::string_view(value));
  }
  LogLine& Field(absl::string_view key, int64_t value);
  LogLine& Field(absl::string_view key, int value) { return Field(key, static_cast<int64_t>(value)); }
  LogLine& Field(absl::string_view key, uint32_t value) { return Field(key, static_cast<int64_t>(value)); }
  LogLine& Field(absl::string_view key, double value);

  template <typename T>
  LogLine& operator<<(const T& value) {
    message_ << value;
    return *this;
  }

 private:
  const LogSeverity severity_;
  const char* const file_;
  const int line_;
  std::string text_fields_;
  std::string json_fields_;
  std::ostringstream message_;
};

// Appends `text` to `out` as the inside of a JSON string; invalid UTF-8 bytes become U+FFFD.
void AppendJsonEscaped(absl::string_view text, std::string* out);

// Writes the message and file:line, then aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);

}  // namespace headwater

#define HW_LOG(severity) ::headwater::LogLine(::headwater::LogSeverity::k##severity, __FILE__, __LINE__)

// For this process's own invariants; never on input from a peer.
#define HW_CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::headwater::CheckFailed(__FILE__, __LINE__, #condition))

#endif  // HW_BASE_LOG_H_
