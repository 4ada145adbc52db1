#include "tests/badinputs/cases.h"

#include <cstdio>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"

namespace headwater::testing {

#define BAD(name, code, reason, text) {#name, absl::StatusCode::code, #reason, text},
const std::vector<BadInput> kPrefillCases = {
#include "tests/badinputs/prefill_cases.inc"
};
const std::vector<BadInput> kPrefillWholeCases = {
#include "tests/badinputs/prefill_whole_cases.inc"
};
const std::vector<BadInput> kBatchCases = {
#include "tests/badinputs/batch_cases.inc"
};
const std::vector<BadInput> kWorkerCases = {
#include "tests/badinputs/worker_cases.inc"
};
const std::vector<BadInput> kDecodeCases = {
#include "tests/badinputs/decode_cases.inc"
};
const std::vector<BadInput> kOpenSessionCases = {
#include "tests/badinputs/open_session_cases.inc"
};
const std::vector<BadInput> kCommitSessionCases = {
#include "tests/badinputs/commit_session_cases.inc"
};
const std::vector<BadInput> kAssignmentCases = {
#include "tests/badinputs/assignment_cases.inc"
};
const std::vector<BadInput> kFlagCases = {
#include "tests/badinputs/flag_cases.inc"
};
const std::vector<BadInput> kConfigCases = {
#include "tests/badinputs/config_cases.inc"
};
const std::vector<BadInput> kSafetensorsCases = {
#include "tests/badinputs/safetensors_cases.inc"
};
const std::vector<BadInput> kRolesCases = {
#include "tests/badinputs/roles_cases.inc"
};
#undef BAD

size_t NumCases() {
  size_t count = 0;
  for (const auto* cases : {&kPrefillCases, &kPrefillWholeCases, &kBatchCases, &kWorkerCases, &kDecodeCases,
                            &kOpenSessionCases, &kCommitSessionCases, &kAssignmentCases, &kFlagCases,
                            &kConfigCases, &kSafetensorsCases, &kRolesCases}) {
    std::set<std::string> names;
    for (const BadInput& bad : *cases) EXPECT_TRUE(names.insert(bad.name).second) << bad.name << " twice";
    count += cases->size();
  }
  return count;
}

std::string Expand(absl::string_view text) {
  std::string out;
  while (true) {
    const size_t begin = text.find('<'), end = text.find('>', begin);
    if (begin == absl::string_view::npos || end == absl::string_view::npos) return absl::StrCat(out, text);
    const absl::string_view inside = text.substr(begin + 1, end - begin - 1);
    const size_t star = inside.rfind('*');
    int times = 0;
    absl::StrAppend(&out, text.substr(0, begin));
    if (star != absl::string_view::npos && absl::SimpleAtoi(inside.substr(star + 1), &times)) {
      for (int i = 0; i < times; ++i) {
        absl::StrAppend(&out, absl::StrReplaceAll(inside.substr(0, star), {{"#", absl::StrCat(i)}}));
      }
    } else {
      absl::StrAppend(&out, "<", inside, ">");
    }
    text.remove_prefix(end + 1);
  }
}

void Override(absl::string_view text, google::protobuf::Message* message) {
  google::protobuf::TextFormat::Parser parser;
  ASSERT_TRUE(parser.MergeFromString(Expand(text), message)) << text;
}

void ExpectRefusals(const std::vector<BadInput>& cases,
                    const std::function<absl::Status(const BadInput&)>& surface) {
  constexpr size_t kLongestMessage = 1024;
  ::testing::internal::CaptureStderr();
  for (const BadInput& bad : cases) {
    const absl::Status status = surface(bad);
    EXPECT_EQ(status.code(), bad.code) << bad.name << ": " << status;
    if (*bad.reason != '\0') {
      EXPECT_EQ(ReasonName(ReasonOf(status)), bad.reason) << bad.name << ": " << status;
    }
    EXPECT_LT(status.message().size(), kLongestMessage) << bad.name;
    EXPECT_FALSE(absl::StrContains(status.message(), "\n")) << bad.name << ": " << status;
  }
  const std::string log = ::testing::internal::GetCapturedStderr();
  for (const char* secret : {"7654321", "211, 223", "211 223", "211,223", "guess", "that nobody guesses"}) {
    EXPECT_FALSE(absl::StrContains(log, secret)) << "the log has \"" << secret << "\":\n" << log;
  }
  std::printf("%zu bad inputs refused\n", cases.size());
}

}  // namespace headwater::testing
