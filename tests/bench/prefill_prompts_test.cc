#include "bench/prefill_prompts.h"

#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::vector<BenchPrompt>> Read(const std::string& text) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/prompts_",
                                        ::testing::UnitTest::GetInstance()->current_test_info()->name());
  std::ofstream(path, std::ios::binary) << text;
  return ReadBenchPrompts(path);
}

std::string ErrorOf(const std::string& text) {
  const auto prompts = Read(text);
  EXPECT_EQ(prompts.status().code(), absl::StatusCode::kInvalidArgument) << text;
  return std::string(prompts.status().message());
}

TEST(ReadBenchPromptsTest, TakesListsAndPackedIds) {
  const auto prompts = Read(
      "{\"name\": \"a\", \"tokens\": [0, 70000, 2147483647]}\n\n"
      "{\"tokens_u16_b64\": \"AQD//wABAgA=\", \"name\": \"b\"}");

  ASSERT_TRUE(prompts.ok()) << prompts.status();
  ASSERT_EQ(prompts->size(), 2);
  EXPECT_EQ((*prompts)[0].name, "a");
  EXPECT_THAT((*prompts)[0].tokens, ElementsAre(0, 70000, 2147483647));
  EXPECT_EQ((*prompts)[1].name, "b");
  EXPECT_THAT((*prompts)[1].tokens, ElementsAre(1, 65535, 256, 2));
}

TEST(ReadBenchPromptsTest, NamesFileLineAndWhatIsWrong) {
  const std::string good = "{\"name\": \"a\", \"tokens\": [1]}\n";
  EXPECT_THAT(ErrorOf(good + "\n{\"name\": \"b\"}"),
              AllOf(HasSubstr("--prompts="), HasSubstr("line 3"), HasSubstr("one of them")));
  EXPECT_THAT(ErrorOf(good + good), AllOf(HasSubstr("line 2"), HasSubstr("\"a\" is there twice")));
  EXPECT_THAT(ErrorOf("[1]"), HasSubstr("line 1"));
  EXPECT_THAT(ErrorOf("{\"tokens\": [1]}"), HasSubstr("name"));
  EXPECT_THAT(ErrorOf("{\"name\": \"\", \"tokens\": [1]}"), HasSubstr("1 to 256 bytes"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens\": []}"), HasSubstr("1 to 1048576 token ids"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens\": [1, -1]}"), HasSubstr("not -1"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens\": [2147483648]}"), HasSubstr("not 2147483648"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens\": [1.5]}"), HasSubstr("not 1.5"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens\": [1], \"tokens_u16_b64\": \"AQA=\"}"),
              HasSubstr("one of them"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens_u16_b64\": \"AQ==\"}"), HasSubstr("uint16"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens_u16_b64\": \"?\"}"), HasSubstr("base64"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens_u16_b64\": \"\"}"), HasSubstr("base64"));
  EXPECT_THAT(ErrorOf("{\"name\": \"a\", \"tokens\": [1], \"kind\": \"x\"}"), HasSubstr("\"kind\""));
  EXPECT_THAT(ErrorOf("\n \n"), HasSubstr("no prompts"));
  EXPECT_EQ(ReadBenchPrompts("/nowhere").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace headwater
