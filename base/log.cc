#include "base/log.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace headwater {
namespace {

struct Settings {
  LogFormat format = LogFormat::kText;
  LogSeverity least = LogSeverity::kINFO;
  std::string component;
};

Settings& GlobalSettings() {
  static Settings* const settings = new Settings();
  return *settings;
}

std::atomic<int64_t> g_problems{0};

const char* SeverityName(LogSeverity severity) {
  switch (severity) {
    case LogSeverity::kDEBUG:
      return "DEBUG";
    case LogSeverity::kINFO:
      return "INFO";
    case LogSeverity::kWARNING:
      return "WARNING";
    case LogSeverity::kERROR:
      return "ERROR";
  }
  return "?";
}

const char* BaseName(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// Length of the valid UTF-8 sequence at the start of `text`, 0 if there is none.
size_t Utf8Length(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  size_t length = 0;
  if (first >= 0xC2 && first <= 0xDF) length = 2;
  if (first >= 0xE0 && first <= 0xEF) length = 3;
  if (first >= 0xF0 && first <= 0xF4) length = 4;
  if (length == 0 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  if (first == 0xE0 && byte(1) < 0xA0) return 0;
  if (first == 0xED && byte(1) > 0x9F) return 0;
  if (first == 0xF0 && byte(1) < 0x90) return 0;
  if (first == 0xF4 && byte(1) > 0x8F) return 0;
  return length;
}

}  // namespace

void AppendJsonEscaped(absl::string_view text, std::string* out) {
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '"' || c == '\\') {
      out->push_back('\\');
      out->push_back(c);
      ++i;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppendFormat(out, "\\u%04x", static_cast<unsigned>(c));
      ++i;
    } else {
      const size_t length = Utf8Length(text.substr(i));
      if (length == 0) {
        out->append("\\ufffd");
        ++i;
      } else {
        out->append(text.data() + i, length);
        i += length;
      }
    }
  }
}

void InitLogging(LogFormat format, LogSeverity least, absl::string_view component) {
  GlobalSettings() = Settings{format, least, std::string(component)};
}

bool ParseLogFormat(absl::string_view text, LogFormat* format) {
  if (text == "text") {
    *format = LogFormat::kText;
  } else if (text == "json") {
    *format = LogFormat::kJson;
  } else {
    return false;
  }
  return true;
}

int64_t NumLogProblems() { return g_problems.load(); }

LogLine::LogLine(LogSeverity severity, const char* file, int line)
    : severity_(severity), file_(BaseName(file)), line_(line) {}

LogLine& LogLine::Field(absl::string_view key, absl::string_view value) {
  absl::StrAppend(&text_fields_, " ", key, "=", value);
  absl::StrAppend(&json_fields_, ",\"", key, "\":\"");
  AppendJsonEscaped(value, &json_fields_);
  json_fields_.push_back('"');
  return *this;
}

LogLine& LogLine::Field(absl::string_view key, int64_t value) {
  absl::StrAppend(&text_fields_, " ", key, "=", value);
  absl::StrAppend(&json_fields_, ",\"", key, "\":", value);
  return *this;
}

LogLine& LogLine::Field(absl::string_view key, double value) {
  absl::StrAppend(&text_fields_, " ", key, "=", value);
  absl::StrAppend(&json_fields_, ",\"", key, "\":", value);
  return *this;
}

LogLine::~LogLine() {
  if (severity_ >= LogSeverity::kWARNING) g_problems.fetch_add(1);
  const Settings& settings = GlobalSettings();
  if (severity_ < settings.least) return;
  const std::string now = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  const std::string message = message_.str();
  std::string line;
  if (settings.format == LogFormat::kJson) {
    line = absl::StrCat("{\"ts\":\"", now, "\",\"severity\":\"", SeverityName(severity_),
                        "\",\"component\":\"", settings.component, "\",\"msg\":\"");
    AppendJsonEscaped(message, &line);
    absl::StrAppend(&line, "\"", json_fields_, ",\"src\":\"", file_, ":", line_, "\"}\n");
  } else {
    line = absl::StrCat(now, " ", SeverityName(severity_), " ", settings.component, " ", message,
                        text_fields_, " (", file_, ":", line_, ")\n");
  }
  // One write keeps lines of different threads whole.
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void CheckFailed(const char* file, int line, const char* condition) {
  { LogLine(LogSeverity::kERROR, file, line) << "check failed: " << condition; }
  std::abort();
}

}  // namespace headwater
