// The programs' configuration: a file, the environment and flags; printed, logged and exported.
#include <fstream>
#include <regex>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <stdlib.h>

#include "tests/integration/cluster.h"
#include "tests/integration/process.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// What the program writes before it ends with `exit_code`.
std::string Output(const std::vector<std::string>& arguments, int exit_code) {
  Process process(arguments, MakeTempDirectory() + "/log");
  const auto status = process.Wait(absl::Seconds(20));
  EXPECT_TRUE(status.has_value()) << arguments[0] << " still runs";
  EXPECT_EQ(status.value_or(-1), exit_code) << process.Log();
  return process.Log();
}

std::string WriteFile(const std::string& text) {
  std::string path = MakeTempDirectory() + "/config.txtpb";
  std::ofstream(path) << text;
  return path;
}

TEST(ConfigurationTest, WhatEachProgramPrintsIsReadAgainAsTheSame) {
  for (const char* name : {"headwater-coordinator", "headwater-worker", "headwater-decode"}) {
    const bool has_model = std::string(name) != "headwater-coordinator";
    const std::string file = WriteFile(absl::StrCat(
        "drain_timeout: '5s'\n", has_model ? "model: '/none'\nthreads: 3\n" : "max_epochs: 2\n"));

    const std::string printed = Output({BinaryPath(name), "--config=" + file, "--print_config"}, 0);
    const std::string again = Output({BinaryPath(name), "--config", WriteFile(printed), "--print_config"}, 0);

    EXPECT_THAT(printed, AllOf(HasSubstr("drain_timeout: \"5s\"  # " + file + ":1:1\n"),
                               HasSubstr("log_format: \"text\"\n")));
    EXPECT_THAT(again, HasSubstr("drain_timeout: \"5s\"  # "));
    const auto values = [](const std::string& text) {
      std::string kept;
      for (const absl::string_view line : absl::StrSplit(text, '\n')) {
        absl::StrAppend(&kept, line.substr(0, line.find("  # ")), "\n");
      }
      return kept;
    };
    EXPECT_EQ(values(again), values(printed));
  }
}

TEST(ConfigurationTest, WrongFilesEndTheProgramsWithThePlace) {
  const std::string unknown = WriteFile("log_format: 'json'\n  maximum: 1\n");
  const std::string refused = WriteFile("\nlisten: '7070'\n");
  for (const char* name : {"headwater-coordinator", "headwater-worker", "headwater-decode"}) {
    const bool has_model = std::string(name) != "headwater-coordinator";
    const std::string model = has_model ? "--model=/none" : "--drain_timeout=1s";
    EXPECT_THAT(Output({BinaryPath(name), "--config=" + unknown, model}, 2),
                AllOf(HasSubstr(absl::StrCat(name, ": ", unknown, ":2:10: ")), HasSubstr("\"maximum\"")));
    EXPECT_THAT(Output({BinaryPath(name), "--config=" + refused, model, "--print_config"}, 2),
                HasSubstr(absl::StrCat(name, ": ", refused, ":2:1: listen: '7070' is not HOST:PORT")));
  }
}

TEST(ConfigurationTest, TheEnvironmentSetsFlagsAndIsHeldToThem) {
  const std::string coordinator = BinaryPath("headwater-coordinator");
  ASSERT_EQ(setenv("HEADWATER_FLAG_MAX_EPOCHS", "9", 1), 0);
  EXPECT_THAT(Output({coordinator, "--print_config"}, 0),
              HasSubstr("max_epochs: 9  # HEADWATER_FLAG_MAX_EPOCHS\n"));
  EXPECT_THAT(Output({coordinator, "--print_config", "--max_epochs=8"}, 0),
              HasSubstr("max_epochs: 8  # --max_epochs\n"));
  ASSERT_EQ(setenv("HEADWATER_FLAG_MAX_EPOCHS", "0", 1), 0);
  EXPECT_THAT(Output({coordinator}, 2),
              HasSubstr("HEADWATER_FLAG_MAX_EPOCHS: '0' is not a whole number from 1 to 1000"));
  unsetenv("HEADWATER_FLAG_MAX_EPOCHS");
  ASSERT_EQ(setenv("HEADWATER_FLAG_MODEL", "m", 1), 0);
  EXPECT_THAT(Output({coordinator}, 2),
              HasSubstr("HEADWATER_FLAG_MODEL of the environment is no flag's variable"));
  unsetenv("HEADWATER_FLAG_MODEL");
}

// The hash that a program's log tells.
std::string LoggedHash(const Process& process) {
  std::smatch match;
  const std::string log = process.Log();
  const std::regex line("configuration: ([0-9]+) values are not the defaults.*sha256=([0-9a-f]{16})");
  EXPECT_TRUE(std::regex_search(log, match, line)) << log;
  return match.empty() ? "" : match[2].str();
}

TEST(ConfigurationTest, EachServerLogsAndExportsTheHashThatReplicasShare) {
  ClusterOptions options;
  options.workers = 2;
  options.model_directory = MakeTempDirectory();
  WriteTinyModel(TinyModel{}, options.model_directory);
  Cluster cluster(options);

  const std::string worker = LoggedHash(cluster.worker(0));
  const auto metric = [](const std::string& hash) {
    return absl::StrCat("headwater_config_info{sha256=\"", hash, "\"}");
  };

  EXPECT_EQ(LoggedHash(cluster.worker(1)), worker);
  EXPECT_NE(LoggedHash(cluster.coordinator()), worker);
  EXPECT_EQ(ReadMetric(cluster.worker_metrics_port(0), metric(worker)), 1);
  EXPECT_EQ(ReadMetric(cluster.worker_metrics_port(1), metric(worker)), 1);
  EXPECT_EQ(ReadMetric(cluster.decode_metrics_port(), metric(LoggedHash(cluster.decode()))), 1);
  EXPECT_EQ(ReadMetric(cluster.coordinator_metrics_port(), metric(LoggedHash(cluster.coordinator()))), 1);
}

}  // namespace
}  // namespace headwater::testing
