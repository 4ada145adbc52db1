#include "decode/options.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace headwater {
namespace {

using ::testing::HasSubstr;

TEST(DecodeOptionsTest, TakesAllFlags) {
  DecodeOptions options;
  std::string help;

  const absl::Status status = ParseDecodeOptions(
      {"--model=/m", "--coordinator", "host:1", "--decode_node=d.7", "--pool=p", "--listen=0.0.0.0:80",
       "--advertise=d:81", "--advertise_kv=d:82", "--metrics=", "--compute=bf16", "--threads=3",
       "--sink=verify", "--kv_dir=/k", "--kv_budget=1.5GiB", "--kv_lease=90s", "--max_generations=5",
       "--log_format=json", "--drain_timeout=2"},
      &options, &help);

  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(options.model, "/m");
  EXPECT_EQ(options.coordinator, "host:1");
  EXPECT_EQ(options.decode_node, "d.7");
  EXPECT_EQ(options.pool, "p");
  EXPECT_EQ(options.listen, "0.0.0.0:80");
  EXPECT_EQ(options.advertise, "d:81");
  EXPECT_EQ(options.advertise_kv, "d:82");
  EXPECT_EQ(options.metrics, "");
  EXPECT_EQ(options.compute, "bf16");
  EXPECT_EQ(options.threads, 3);
  EXPECT_EQ(options.sink, "verify");
  EXPECT_EQ(options.kv_dir, "/k");
  EXPECT_EQ(options.kv_budget_bytes, uint64_t{3} << 29);
  EXPECT_EQ(options.kv_lease, absl::Seconds(90));
  EXPECT_EQ(options.max_generations, 5);
  EXPECT_EQ(options.log_format, "json");
  EXPECT_EQ(options.drain_timeout, absl::Seconds(2));
  EXPECT_EQ(help, "");
}

TEST(DecodeOptionsTest, PlacesTheCachesInTheTemporaryFolderByNodeName) {
  DecodeOptions options;
  std::string help;
  ASSERT_EQ(setenv("TMPDIR", "/some/tmp", 1), 0);

  ASSERT_TRUE(ParseDecodeOptions({"--model=/m", "--decode_node=d9"}, &options, &help).ok());

  EXPECT_EQ(options.kv_dir, "/some/tmp/headwater-kv-d9");
  unsetenv("TMPDIR");
  options = DecodeOptions();
  ASSERT_TRUE(ParseDecodeOptions({"--model=/m"}, &options, &help).ok());
  EXPECT_EQ(options.kv_dir, "/tmp/headwater-kv-decode-0");
}

TEST(DecodeOptionsTest, NamesFlagAndValueOfWhatItRefuses) {
  struct Case {
    std::vector<std::string> arguments;
    std::vector<std::string> words;
  };
  const std::vector<Case> cases = {
      {{}, {"--model"}},
      {{"--model=/m", "--listn=a:1"}, {"--listn", "did you mean --listen"}},
      {{"--model=/m", "--nonsense"}, {"--nonsense"}},
      {{"--model=/m", "stray"}, {"stray"}},
      {{"--model=/m", "--threads=-1"}, {"--threads", "-1"}},
      {{"--model=/m", "--threads=2x"}, {"--threads", "2x"}},
      {{"--model=/m", "--compute=f64"}, {"--compute", "f64", "bf16"}},
      {{"--model=/m", "--sink=null"}, {"--sink", "null", "memory", "verify"}},
      {{"--model=/m", "--kv_budget=lots"}, {"--kv_budget", "lots"}},
      {{"--model=/m", "--kv_budget=0"}, {"--kv_budget", "0"}},
      {{"--model=/m", "--kv_lease=0"}, {"--kv_lease", "0"}},
      {{"--model=/m", "--kv_lease=soon"}, {"--kv_lease", "soon"}},
      {{"--model=/m", "--decode_node=a/b"}, {"--decode_node", "a/b"}},
      {{"--model=/m", "--pool="}, {"--pool"}},
      {{"--model=/m", "--listen=7080"}, {"--listen", "7080"}},
      {{"--model=/m", "--listen=h:99999"}, {"--listen", "99999"}},
      {{"--model=/m", "--metrics=h"}, {"--metrics", "'h'"}},
      {{"--model=/m", "--coordinator=:1"}, {"--coordinator", ":1"}},
      {{"--model=/m", "--listen=0.0.0.0:1"}, {"--advertise", "0.0.0.0:1"}},
      {{"--model"}, {"--model needs a value"}},
      {{"--model=/m", "--log_format=xml"}, {"--log_format", "xml"}},
  };
  for (const Case& test : cases) {
    DecodeOptions options;
    std::string help;
    const absl::Status status = ParseDecodeOptions(test.arguments, &options, &help);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << ::testing::PrintToString(test.arguments);
    for (const std::string& word : test.words) EXPECT_THAT(std::string(status.message()), HasSubstr(word));
  }
}

TEST(DecodeOptionsTest, HelpListsFlagsWithDefaults) {
  DecodeOptions options;
  std::string help;

  ASSERT_TRUE(ParseDecodeOptions({"--help"}, &options, &help).ok());

  EXPECT_THAT(help, HasSubstr("--coordinator=VALUE (default 127.0.0.1:7070)"));
  EXPECT_THAT(help, HasSubstr("--sink=VALUE (default memory)"));
  EXPECT_THAT(help, HasSubstr("Generate is refused"));
  EXPECT_THAT(help, HasSubstr("--kv_lease=VALUE (default 5m)"));
  EXPECT_THAT(help, HasSubstr("--drain_timeout=VALUE (default 45s)"));
}

TEST(DefaultKvBudgetTest, TakesTheNearestExistingFolder) {
  uint64_t there = 0;
  uint64_t not_yet = 0;

  ASSERT_TRUE(DefaultKvBudget("/tmp", &there).ok());
  ASSERT_TRUE(DefaultKvBudget("/tmp/no/such/folder/yet", &not_yet).ok());

  EXPECT_GT(there, 0u);
  EXPECT_GT(not_yet, 0u);
}

}  // namespace
}  // namespace headwater
