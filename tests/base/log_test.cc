#include "base/log.h"

#include "gtest/gtest.h"

namespace headwater {
namespace {

std::string Escaped(absl::string_view text) {
  std::string out;
  AppendJsonEscaped(text, &out);
  return out;
}

TEST(JsonEscapeTest, EscapesQuotesBackslashesAndControlCharacters) {
  EXPECT_EQ(Escaped("a\"b\\c\n\x01"), "a\\\"b\\\\c\\u000a\\u0001");
}

TEST(JsonEscapeTest, KeepsValidUtf8) {
  EXPECT_EQ(Escaped("\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80"), "\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80");
}

TEST(JsonEscapeTest, ReplacesInvalidBytes) {
  EXPECT_EQ(Escaped("\xFF"), "\\ufffd");
  EXPECT_EQ(Escaped("\xC3"), "\\ufffd") << "truncated sequence";
  EXPECT_EQ(Escaped("\xC0\xAF"), "\\ufffd\\ufffd") << "overlong";
  EXPECT_EQ(Escaped("\xED\xA0\x80"), "\\ufffd\\ufffd\\ufffd") << "surrogate";
  EXPECT_EQ(Escaped("\xF4\x90\x80\x80"), "\\ufffd\\ufffd\\ufffd\\ufffd") << "past U+10FFFF";
}

TEST(LogTest, JsonLinesCarryMessageFieldsAndSource) {
  InitLogging(LogFormat::kJson, LogSeverity::kINFO, "test");
  ::testing::internal::CaptureStderr();

  HW_LOG(INFO).Field("request_id", "a\"b").Field("rank", 3) << "said \"" << 7 << "\"";
  HW_LOG(DEBUG) << "not written";

  const std::string line = ::testing::internal::GetCapturedStderr();
  InitLogging(LogFormat::kText, LogSeverity::kINFO, "");
  EXPECT_NE(
      line.find(
          "\"severity\":\"INFO\",\"component\":\"test\",\"msg\":\"said \\\"7\\\"\",\"request_id\":\"a\\\"b\","
          "\"rank\":3,\"src\":\"log_test.cc:"),
      std::string::npos)
      << line;
  EXPECT_EQ(line.find("not written"), std::string::npos);
}

TEST(LogTest, CountsWarningsAndErrors) {
  const int64_t before = NumLogProblems();
  ::testing::internal::CaptureStderr();

  HW_LOG(INFO) << "fine";
  HW_LOG(WARNING) << "hm";
  HW_LOG(ERROR) << "oh";

  ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(NumLogProblems(), before + 2);
}

TEST(LogTest, ParsesFormats) {
  LogFormat format = LogFormat::kText;
  EXPECT_TRUE(ParseLogFormat("json", &format));
  EXPECT_EQ(format, LogFormat::kJson);
  EXPECT_TRUE(ParseLogFormat("text", &format));
  EXPECT_FALSE(ParseLogFormat("xml", &format));
}

}  // namespace
}  // namespace headwater
