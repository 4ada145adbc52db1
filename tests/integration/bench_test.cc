// `headwater bench prefill` as users start it, on the CPU.
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <nlohmann/json.hpp>
#include <signal.h>

#include "tests/integration/process.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Outcome {
  int status = -1;
  std::string log;
};

std::vector<std::string> Command(const std::vector<std::string>& flags) {
  std::vector<std::string> words = {BinaryPath("headwater"), "bench", "prefill"};
  words.insert(words.end(), flags.begin(), flags.end());
  return words;
}

Outcome RunBench(const std::vector<std::string>& flags) {
  Process process(Command(flags), MakeTempDirectory() + "/log");
  const auto status = process.Wait(absl::Seconds(60));
  EXPECT_TRUE(status.has_value()) << process.Log();
  return {status.value_or(-1), process.Log()};
}

std::string TinyDirectory() {
  const std::string directory = MakeTempDirectory();
  WriteTinyModel(TinyModel{}, directory);
  return directory;
}

TEST(BenchTest, WrongFlagsEndWithStatusTwoAndAreNamed) {
  const Outcome help = RunBench({"--help"});
  EXPECT_EQ(help.status, 0);
  EXPECT_THAT(help.log, AllOf(HasSubstr("usage: headwater bench prefill"), HasSubstr("--attention_tflops")));

  const std::string model = TinyDirectory();
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--tokens=many"}, "--tokens: 'many'"},
      {{"--frobnicate"}, "unknown flag --frobnicate"},
      {{"--device=cpu", "--model=/nonexistent"}, "--model=/nonexistent"},
      {{"--device=cpu", "--model=" + model, "--tokens=64K,128K"},
       "131072 is over the model's maximum of 65536"},
      {{"--device=cpu", "--model=" + model, "--output=/nonexistent/rows"}, "--output=/nonexistent/rows"}};
  for (const auto& [flags, words] : cases) {
    const Outcome outcome = RunBench(flags);
    EXPECT_EQ(outcome.status, 2) << outcome.log;
    EXPECT_THAT(outcome.log, HasSubstr(words));
  }
}

TEST(BenchTest, ADeviceThatIsNotThereIsNamed) {
  const Outcome outcome = RunBench({"--device=cuda:99"});
  // 1 where there is no driver, 2 where there are fewer GPUs or none was built for.
  EXPECT_THAT(outcome.status, ::testing::AnyOf(1, 2)) << outcome.log;
  EXPECT_THAT(outcome.log, HasSubstr("--device=cuda:99"));
}

TEST(BenchTest, BlocksAreKeptWhereThatIsAskedFor) {
  const std::string directory = MakeTempDirectory() + "/kv";
  const Outcome kept = RunBench({"--device=cpu", "--model=" + TinyDirectory(), "--tokens=300", "--repeat=2",
                                 "--sink=memory", "--kv_dir=" + directory, "--json"});
  ASSERT_EQ(kept.status, 0) << kept.log;
  const auto row = nlohmann::json::parse(kept.log);
  EXPECT_EQ(row["params"]["sink"], "memory");
  EXPECT_GE(row["metrics"]["kv_acked_s"], row["metrics"]["ttft_s"]);
  EXPECT_TRUE(std::filesystem::is_directory(directory));
  const Outcome nowhere = RunBench(
      {"--device=cpu", "--model=" + TinyDirectory(), "--tokens=300", "--sink=memory", "--kv_dir=/proc/none"});
  EXPECT_NE(nowhere.status, 0);
  EXPECT_THAT(nowhere.log, HasSubstr("/proc/none"));
}

TEST(BenchTest, RowsAreWrittenAndAppended) {
  const std::string model = TinyDirectory(), output = MakeTempDirectory() + "/rows";
  const std::vector<std::string> flags = {"--device=cpu", "--model=" + model, "--tokens=256..512",
                                          "--repeat=1",   "--sink=verify",    "--output=" + output};
  const Outcome table = RunBench(flags);
  ASSERT_EQ(table.status, 0) << table.log;
  EXPECT_THAT(table.log, AllOf(HasSubstr("sink verify"), HasSubstr("TTFT s")));
  const std::vector<std::string> lines = absl::StrSplit(ReadFile(output), '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 2u);

  std::vector<std::string> more = flags;
  more.insert(more.end(), {"--json", "--policy=a_shape", "--commit=c0ffee"});
  const Outcome json = RunBench(more);
  ASSERT_EQ(json.status, 0) << json.log;
  EXPECT_TRUE(absl::EndsWith(ReadFile(output), json.log)) << json.log;
  const std::vector<std::string> rows = absl::StrSplit(json.log, '\n', absl::SkipEmpty());
  ASSERT_EQ(rows.size(), 2u) << json.log;
  const auto row = nlohmann::json::parse(rows[1]);
  EXPECT_EQ(row["bench"], "prefill");
  EXPECT_EQ(row["commit"], "c0ffee");
  EXPECT_EQ(row["params"]["tokens"], 512);
  EXPECT_EQ(row["params"]["policy"], "a_shape");
  EXPECT_EQ(row["metrics"]["density"], 1.0);  // 512 tokens lie within the policy's window
  EXPECT_GT(row["metrics"]["ttft_s"].get<double>(), 0);
  EXPECT_GT(row["predicted"]["ttft_s"].get<double>(), 0);
  EXPECT_GT(row["predicted"]["egress_s"].get<double>(), 0);
  EXPECT_GE(row["metrics"]["kv_acked_s"], row["metrics"]["ttft_s"]);
  EXPECT_GT(row["metrics"]["peak_device_bytes"].get<double>(), 1 << 20);
}

TEST(BenchTest, CtrlCEndsItSoon) {
  Process process(Command({"--device=cpu", "--model=" + TinyDirectory(), "--tokens=256,64K", "--repeat=100"}),
                  MakeTempDirectory() + "/log");
  // The first length's row shows that it computes.
  for (int i = 0; i < 600 && !absl::StrContains(process.Log(), "TTFT"); ++i) {
    ASSERT_TRUE(process.running()) << process.Log();
    absl::SleepFor(absl::Milliseconds(100));
  }
  process.Signal(SIGINT);
  const auto status = process.Wait(absl::Seconds(10));
  ASSERT_TRUE(status.has_value()) << process.Log();
  EXPECT_EQ(*status, 130) << process.Log();
  EXPECT_THAT(process.Log(), HasSubstr("interrupted"));
}

}  // namespace
}  // namespace headwater::testing
