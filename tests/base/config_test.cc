#include "base/config/config.h"

#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <google/protobuf/struct.pb.h>
#include <openssl/sha.h>

#include "headwater/v1/config.pb.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// Flags of a worker, some of them with what a worker has for defaults.
class Program {
 public:
  explicit Program(std::vector<std::string> arguments = {}, std::vector<std::string> environment = {}) {
    const google::protobuf::Descriptor* const fields = v1::WorkerConfig::descriptor();
    for (int i = 0; i < fields->field_count(); ++i) Declare(fields->field(i)->name());
    status = config.Read(arguments, environment);
  }

  std::string error() const { return std::string(status.message()); }

  std::string model = "m";
  std::string worker_id;
  std::string others;
  int64_t threads = 4;
  int64_t other_numbers = 1;
  bool measure_rates = true;
  bool other_bool = false;
  double link_rate = 0;
  double other_rate = 0;
  uint64_t memory_budget = 0;
  absl::Duration drain_timeout = absl::Seconds(45);
  FlagSet flags{"program"};
  Config config{v1::WorkerConfig::default_instance(), kOwn, &flags};
  absl::Status status;

 private:
  static constexpr absl::string_view kOwn[] = {"worker_id"};

  void Declare(const std::string& name) {
    const auto type = v1::WorkerConfig::descriptor()->FindFieldByName(name)->type();
    if (name == "memory_budget") {
      flags.Bytes(name, &memory_budget, "most of it", "");
    } else if (name == "drain_timeout") {
      flags.Duration(name, &drain_timeout, absl::ZeroDuration(), absl::Hours(1), "");
    } else if (type == google::protobuf::FieldDescriptor::TYPE_INT64) {
      flags.Int(name, name == "threads" ? &threads : &other_numbers, 0, 64, "");
    } else if (type == google::protobuf::FieldDescriptor::TYPE_BOOL) {
      flags.Bool(name, name == "measure_rates" ? &measure_rates : &other_bool, "");
    } else if (type == google::protobuf::FieldDescriptor::TYPE_DOUBLE) {
      double* const rate = name == "link_gbytes_per_s" ? &link_rate : &other_rate;
      const auto take = [rate](absl::string_view text) {
        return absl::SimpleAtod(text, rate) ? absl::OkStatus() : absl::InvalidArgumentError("no number");
      };
      flags.Custom(name, "0", "", take, FlagKind::kReal);
    } else {
      flags.String(name, name == "model" ? &model : name == "worker_id" ? &worker_id : &others, "");
    }
  }
};

// A file of its own for each test that asks.
std::string WriteFile(const std::string& text) {
  std::string path = ::testing::TempDir() + "config_test." +
                     ::testing::UnitTest::GetInstance()->current_test_info()->name() + ".txtpb";
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

std::string ErrorOfFile(const std::string& text, const std::string& path) {
  std::ofstream(path, std::ios::binary) << text;
  return Program({"--config=" + path}).error();
}

TEST(ConfigTest, TheCommandLineComesBeforeTheEnvironmentBeforeTheFileBeforeTheDefault) {
  const std::string file = WriteFile("model: 'f'\nthreads: 5\ndrain_timeout: '7s'\nmeasure_rates: false\n");
  const std::vector<std::string> environment = {"PATH=/bin", "HEADWATER_FLAG_MODEL=e",
                                                "HEADWATER_FLAG_THREADS=6",
                                                "HEADWATER_COORDINATOR_PORT=tcp://1.2.3.4"};

  const Program defaults;
  const Program from_file({"--config", file});
  const Program from_both({"--config", file}, environment);
  const Program from_all({"--model=c", "--config", file}, environment);

  ASSERT_TRUE(defaults.status.ok() && from_file.status.ok() && from_both.status.ok()) << from_both.status;
  ASSERT_TRUE(from_all.status.ok()) << from_all.status;
  EXPECT_EQ(defaults.model, "m");
  EXPECT_EQ(from_file.model, "f");
  EXPECT_EQ(from_both.model, "e");
  EXPECT_EQ(from_all.model, "c");
  EXPECT_EQ(from_file.threads, 5);
  EXPECT_EQ(from_all.threads, 6);
  EXPECT_EQ(from_all.drain_timeout, absl::Seconds(7));
  EXPECT_FALSE(from_all.measure_rates);
  EXPECT_EQ(defaults.config.Summary().num_changed, 0);
  EXPECT_EQ(from_all.config.Summary().num_changed, 4);
  EXPECT_EQ(from_all.config.Summary().file, file);
}

TEST(ConfigTest, TheEnvironmentNamesTheFileUnlessTheCommandLineDoes) {
  const std::string file = WriteFile("model: 'f'");

  EXPECT_EQ(Program({}, {"HEADWATER_FLAG_CONFIG=" + file}).model, "f");
  EXPECT_EQ(Program({"--config="}, {"HEADWATER_FLAG_CONFIG=" + file}).model, "m");
  EXPECT_THAT(Program({}, {"HEADWATER_FLAG_CONFIG=/none"}).error(),
              StartsWith("HEADWATER_FLAG_CONFIG: '/none' cannot be opened: No such file"));
}

TEST(ConfigTest, AFileIsRefusedWithThePlaceOfItsFirstError) {
  const std::string path = WriteFile("");
  const struct {
    std::string text;
    std::string after_path;
  } rows[] = {
      {"model: 'a'\n\n  modle: 'b'\n", ":3:8: Message type \"headwater.v1.WorkerConfig\" has no field named"},
      {"threads: 3\nthreads: 3\n", ":2:8: Non-repeated field \"threads\" is specified multiple times"},
      {"threads: '3'\n", ":1:10: Expected integer"},
      {"model: 3\n", ":1:8: Expected string"},
      {"measure_rates: 'yes'\n", ":1:16: Expected identifier"},
      {"# none\nmodel: 'a\n", ":2:10: String literals cannot cross line boundaries"},
      {"config: 'other'\n", ":1:7: Message type"},
      {"# a value that the flag refuses\n threads: 65\n",
       ":2:2: threads: '65' is not a whole number from 0 to 64"},
      {"drain_timeout: 'soon'", ":1:1: drain_timeout: 'soon' is not a duration"},
      {"memory_budget: '-1'", ":1:1: memory_budget: '-1' is not a number of bytes"},
  };
  for (const auto& row : rows) {
    EXPECT_THAT(ErrorOfFile(row.text, path), StartsWith(path + row.after_path)) << row.text;
  }
}

TEST(ConfigTest, AWrongValueIsRefusedAlsoWhereTheCommandLineReplacesIt) {
  const std::string file = WriteFile("threads: 65");

  EXPECT_THAT(Program({"--threads=3", "--config=" + file}).error(), HasSubstr("'65'"));
  EXPECT_THAT(Program({"--threads=3"}, {"HEADWATER_FLAG_THREADS="}).error(),
              StartsWith("HEADWATER_FLAG_THREADS: '' is not a whole number"));
}

TEST(ConfigTest, AFileOfOneMebibyteIsReadAndALargerOneIsNot) {
  const std::string path = WriteFile("threads: 3\n" + std::string((1 << 20) - 11, '#'));
  EXPECT_EQ(Program({"--config=" + path}).threads, 3);

  std::ofstream(path, std::ios::app) << '#';
  EXPECT_EQ(Program({"--config=" + path}).error(),
            absl::StrCat("--config: '", path, "' has more bytes than the limit of 1048576"));
}

TEST(ConfigTest, AVariableOfNoFlagIsRefusedWithTheNearest) {
  EXPECT_THAT(Program({}, {"HEADWATER_FLAG_THREDS=3"}).error(),
              StartsWith("HEADWATER_FLAG_THREDS of the environment is no flag's variable; did you mean "
                         "HEADWATER_FLAG_THREADS?"));
  EXPECT_THAT(Program({}, {"HEADWATER_FLAG_threads=3"}).error(),
              HasSubstr("did you mean HEADWATER_FLAG_THREADS?"));
  EXPECT_THAT(Program({}, {"HEADWATER_FLAG_=3"}).error(), HasSubstr("--help lists the flags"));
  EXPECT_TRUE(Program({}, {"HEADWATER_FLAGS=3", "headwater_flag_x=3", "odd"}).status.ok());
}

TEST(ConfigTest, AChecksOwnRefusalNamesWhereTheValueIsFrom) {
  const std::string file = WriteFile("\nmodel: 'f'");
  const auto refusal = [](const Program& program) {
    return std::string(program.flags.Refuse("model", "no").message());
  };

  EXPECT_EQ(refusal(Program()), "--model: no");
  EXPECT_EQ(refusal(Program({"--config=" + file})), file + ":2:1: model: no");
  EXPECT_EQ(refusal(Program({"--config=" + file}, {"HEADWATER_FLAG_MODEL=e"})), "HEADWATER_FLAG_MODEL: no");
  EXPECT_EQ(refusal(Program({"--model=c", "--config=" + file})), "--model: no");
}

TEST(ConfigTest, WhatIsPrintedSaysWhereValuesAreFromAndIsReadAsTheSame) {
  const std::string file = WriteFile("model: 'a \"b\"\\n\\303\\274\\377'\n\nthreads: 5");
  const Program one({"--config=" + file, "--link_gbytes_per_s=0.1", "--drain_timeout=90", "--print_config"},
                    {"HEADWATER_FLAG_MEMORY_BUDGET=1572864"});
  ASSERT_TRUE(one.status.ok()) << one.status;
  ASSERT_TRUE(one.config.print_requested());
  const std::string printed = one.config.Print();
  EXPECT_THAT(printed, AllOf(HasSubstr("\nthreads: 5  # " + file + ":3:1\n"),
                             HasSubstr("\nlink_gbytes_per_s: 0.1  # --link_gbytes_per_s\n"),
                             HasSubstr("\ndrain_timeout: \"1m30s\"  # --drain_timeout\n"),
                             HasSubstr("\nmemory_budget: \"1536KiB\"  # HEADWATER_FLAG_MEMORY_BUDGET\n"),
                             HasSubstr("\nmeasure_rates: true\n"), Not(HasSubstr("config:"))));

  const Program two({"--config=" + WriteFile(printed)});

  ASSERT_TRUE(two.status.ok()) << two.status;
  EXPECT_EQ(two.model, "a \"b\"\n\u00fc\xff");
  EXPECT_EQ(two.model, one.model);
  EXPECT_EQ(two.threads, 5);
  EXPECT_EQ(two.link_rate, 0.1);
  EXPECT_EQ(two.drain_timeout, absl::Seconds(90));
  EXPECT_EQ(two.memory_budget, 1572864u);
  EXPECT_EQ(two.config.Summary().num_changed, one.config.Summary().num_changed);
  EXPECT_EQ(two.config.Summary().sha256, one.config.Summary().sha256);
}

TEST(ConfigTest, ADefaultThatIsFoundAtTheStartIsPrintedAsAComment) {
  EXPECT_THAT(Program().config.Print(), HasSubstr("\n# memory_budget: found at the start: most of it\n"));
}

TEST(ConfigTest, ThePathOfAFileCannotEndTheCommentThatNamesIt) {
  const std::string path = ::testing::TempDir() + "config_test\nthreads: 9";
  std::ofstream(path) << "threads: 5";
  const Program program({"--config=" + path});

  ASSERT_TRUE(program.status.ok()) << program.status;
  EXPECT_THAT(program.config.Print(),
              AllOf(HasSubstr("config_test\\nthreads: 9:1:1\n"), Not(HasSubstr("\nthreads: 9"))));
}

TEST(ConfigTest, TheHashIsOfThePrintedLinesButCommentsAndFlagsOfOneProcess) {
  const Program program({"--threads=5", "--worker_id=w1"});
  std::string hashed;
  for (const absl::string_view line : absl::StrSplit(program.config.Print(), '\n', absl::SkipEmpty())) {
    if (absl::StartsWith(line, "#") || absl::StartsWith(line, "worker_id: ")) continue;
    absl::StrAppend(&hashed, line.substr(0, line.find("  # ")), "\n");
  }
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(hashed.data()), hashed.size(), digest);
  const std::string hex =
      absl::BytesToHexString(std::string(reinterpret_cast<const char*>(digest), SHA256_DIGEST_LENGTH));

  EXPECT_THAT(hashed, HasSubstr("\nthreads: 5\n"));
  EXPECT_EQ(program.config.Summary().sha256, hex.substr(0, 16));
}

TEST(ConfigTest, TheHashTellsValuesAndNotTheirSpellingSourceOrWhoTheProcessIs) {
  const auto hash = [](const Program& program) { return program.config.Summary().sha256; };
  const std::string plain = hash(Program());

  EXPECT_EQ(hash(Program({"--worker_id=w1", "--threads=4", "--drain_timeout=45000ms"})), plain);
  EXPECT_NE(hash(Program({"--threads=5"})), plain);
  EXPECT_NE(hash(Program({"--memory_budget=0"})), plain);
  EXPECT_EQ(hash(Program({}, {"HEADWATER_FLAG_THREADS=05"})),
            hash(Program({"--config=" + WriteFile("threads: 5")})));
}

TEST(ConfigTest, MessagesThatAreNotTheFlagsAreFound) {
  std::string text;
  int64_t number = 0;
  FlagSet flags("program");
  flags.String("name", &text, "");
  flags.Int("number", &number, 0, 1, "");

  EXPECT_EQ(FieldsThatDiffer(google::protobuf::Value::default_instance(), flags),
            "Value lacks `optional string name`. Value lacks `optional int64 number`. 6 fields of Value are "
            "no flags.");
  EXPECT_EQ(FieldsThatDiffer(v1::WorkerConfig::default_instance(), Program().flags), "");
}

}  // namespace
}  // namespace headwater
