#include "bench/prefill_options.h"

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

std::string ErrorOf(const std::vector<std::string>& arguments) {
  PrefillBenchOptions options;
  std::string help;
  const absl::Status status = ParsePrefillBenchOptions(arguments, &options, &help);
  if (!status.ok()) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
  return std::string(status.message());
}

TEST(ParseLengthsTest, TakesListsSuffixesAndDoubling) {
  EXPECT_THAT(*ParseLengths("8192"), ElementsAre(8192));
  EXPECT_THAT(*ParseLengths("1M,64K,7"), ElementsAre(1 << 20, 64 << 10, 7));
  EXPECT_THAT(*ParseLengths("8K..64K"), ElementsAre(8 << 10, 16 << 10, 32 << 10, 64 << 10));
  EXPECT_THAT(*ParseLengths("1..1,3..12"), ElementsAre(1, 3, 6, 12));
  EXPECT_THAT(*ParseLengths("16M"), ElementsAre(1 << 24));
}

TEST(ParseLengthsTest, NamesThePartThatIsWrong) {
  for (const char* bad : {"", "0", "-1", "+1", "8k", "8KiB", "1.5K", "K", "17M", "16777217", "8192,", "1...2",
                          "9223372036854775807", "9007199254740993K", "99999999999999999999"}) {
    const auto lengths = ParseLengths(bad);
    ASSERT_FALSE(lengths.ok()) << bad;
    EXPECT_THAT(std::string(lengths.status().message()), HasSubstr("1 to 16777216")) << bad;
  }
  EXPECT_THAT(std::string(ParseLengths("4,5..11").status().message()),
              AllOf(HasSubstr("'5..11'"), HasSubstr("11")));
  EXPECT_THAT(std::string(ParseLengths("8K..4K").status().message()), HasSubstr("ends before it begins"));
}

TEST(PrefillBenchOptionsTest, DefaultsAndSpellings) {
  PrefillBenchOptions options;
  std::string help;
  ASSERT_TRUE(ParsePrefillBenchOptions(
                  {"--device=cuda:3", "--tokens=1K,4K,2K", "--attention-tflops=640", "--policy=a_shape"},
                  &options, &help)
                  .ok());
  EXPECT_EQ(options.gpu, 3);
  EXPECT_EQ(options.longest(), 4096);
  EXPECT_EQ(options.model_name(), "llama-3-8b");
  EXPECT_EQ(options.policy.name, "a_shape");
  EXPECT_EQ(options.policy.density, 0);
  EXPECT_DOUBLE_EQ(options.attention_tflops, 640);
  EXPECT_TRUE(help.empty());

  options = {};
  ASSERT_TRUE(ParsePrefillBenchOptions({"--device=cpu", "--model=/a/b/"}, &options, &help).ok());
  EXPECT_EQ(options.gpu, PrefillBenchOptions::kCpu);
  EXPECT_EQ(options.model_name(), "b");
}

TEST(PrefillBenchOptionsTest, QualityParametersAndPrompts) {
  const std::vector<std::string> arguments = {"--policy=headwater", "--model=m",
                                              "--policy_parameters=threshold=0.2,window_blocks=8",
                                              "--prompts=p.jsonl", "--headwater_calibration=c.json"};
  const auto parse = [&](const std::string& bound) {
    PrefillBenchOptions options;
    std::string help;
    std::vector<std::string> all = arguments;
    all.push_back(bound);
    EXPECT_TRUE(ParsePrefillBenchOptions(all, &options, &help).ok()) << bound;
    return options;
  };
  const PrefillBenchOptions options = parse("--min_recall=0.95");
  EXPECT_EQ(options.quality.min_recall, 0.95);
  EXPECT_EQ(options.prompts, "p.jsonl");
  EXPECT_EQ(options.headwater_calibration, "c.json");
  EXPECT_THAT(options.policy.parameters, ElementsAre(Pair("threshold", 0.2), Pair("window_blocks", 8)));
  EXPECT_EQ(parse("--max_density=1").quality.max_density, 1);
  EXPECT_EQ(parse("--time_budget=1500ms").quality.time_budget, absl::Milliseconds(1500));
  EXPECT_FALSE(parse("--share_clusters=s.json").quality.any());
}

TEST(PrefillBenchOptionsTest, AJobWithAQualityIsAsTheServiceMakesIt) {
  PrefillBenchOptions options;
  std::string help;
  ASSERT_TRUE(ParsePrefillBenchOptions({"--policy=headwater", "--max_density=0.25"}, &options, &help).ok());
  ModelConfig config;
  config.num_layers = config.num_kv_heads = 1;
  config.head_dim = 64;
  const auto job = MakeBenchJob(config, {1, 2, 3}, v1::KV_DTYPE_BF16, options.policy, {}, options.quality);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->quality.max_density, 0.25);
  EXPECT_EQ(kernels::DenseBelowTokens(job->policy->parameters()), 0) << "a short prompt is bound, too";
}

TEST(PrefillBenchOptionsTest, WrongQualitiesAreNamed) {
  const auto error = [](std::vector<std::string> arguments) {
    arguments.push_back("--policy=headwater");
    return ErrorOf(arguments);
  };
  for (const char* const value : {"0", "1", "-1", "nan", "2"}) {
    EXPECT_THAT(error({absl::StrCat("--min_recall=", value)}),
                AllOf(HasSubstr("--min_recall"), HasSubstr("over 0 and below 1")));
  }
  EXPECT_THAT(error({"--min_recall=x"}), AllOf(HasSubstr("--min_recall"), HasSubstr("'x'")));
  EXPECT_THAT(error({"--max_density=1.01"}), AllOf(HasSubstr("--max_density"), HasSubstr("at most 1")));
  for (const char* const value : {"0s", "-1s", "721h", "inf"}) {
    EXPECT_THAT(error({absl::StrCat("--time_budget=", value)}),
                AllOf(HasSubstr("--time_budget"), HasSubstr("30 days")));
  }
  EXPECT_THAT(error({"--time_budget=soon"}), HasSubstr("'soon'"));
  EXPECT_THAT(error({"--min_recall=0.9", "--max_density=0.1"}),
              AllOf(HasSubstr("--min_recall"), HasSubstr("--max_density")));
  EXPECT_THAT(ErrorOf({"--min_recall=0.9", "--policy=flex"}),
              AllOf(HasSubstr("--min_recall"), HasSubstr("--policy=flex")));
  EXPECT_THAT(error({"--time_budget=1s", "--device=cpu", "--model=x"}),
              AllOf(HasSubstr("--time_budget"), HasSubstr("GPU")));
}

TEST(PrefillBenchOptionsTest, WrongParametersAndPromptsAreNamed) {
  EXPECT_THAT(ErrorOf({"--policy=headwater", "--policy_parameters=threshold"}), HasSubstr("'threshold'"));
  EXPECT_THAT(ErrorOf({"--policy=headwater", "--policy_parameters=threshold=0.1,"}), HasSubstr("''"));
  EXPECT_THAT(ErrorOf({"--policy=headwater", "--policy_parameters=threshold=x"}),
              AllOf(HasSubstr("--policy_parameters"), HasSubstr("'threshold=x'")));
  EXPECT_THAT(ErrorOf({"--policy=headwater", "--policy_parameters=threshold=0.1,threshold=0.2"}),
              HasSubstr("twice"));
  EXPECT_THAT(ErrorOf({"--policy=headwater", "--policy_parameters=threshold=2"}),
              AllOf(HasSubstr("--policy=headwater"), HasSubstr("threshold 2 is")));
  EXPECT_THAT(ErrorOf({"--policy=probe", "--density=0.1", "--policy_parameters=density=0.2"}),
              HasSubstr("give one of them"));
  EXPECT_THAT(ErrorOf({"--prompts=p", "--model=m", "--tokens=8K"}),
              AllOf(HasSubstr("--prompts=p"), HasSubstr("--tokens")));
  EXPECT_THAT(ErrorOf({"--prompts=p"}), AllOf(HasSubstr("--prompts=p"), HasSubstr("--model")));
}

TEST(PrefillBenchOptionsTest, WrongFlagsAreNamed) {
  EXPECT_THAT(ErrorOf({"--tokens=8192,x"}), AllOf(HasSubstr("--tokens"), HasSubstr("'x'")));
  EXPECT_THAT(ErrorOf({"--tokns=8192"}), HasSubstr("did you mean --tokens?"));
  EXPECT_THAT(ErrorOf({"--device=gpu"}), AllOf(HasSubstr("--device"), HasSubstr("'gpu'")));
  EXPECT_THAT(ErrorOf({"--device=cuda:-1"}), HasSubstr("'cuda:-1'"));
  EXPECT_THAT(ErrorOf({"--device=cpu"}), AllOf(HasSubstr("--device=cpu"), HasSubstr("--model")));
  EXPECT_THAT(ErrorOf({"--measure_recall", "--device=cpu", "--model=x"}), HasSubstr("--measure_recall with"));
  EXPECT_THAT(ErrorOf({"--preset=llama-3-8b", "--model=x"}),
              AllOf(HasSubstr("--preset"), HasSubstr("--model=x")));
  EXPECT_THAT(ErrorOf({"--preset=gpt"}), AllOf(HasSubstr("--preset"), HasSubstr("llama-3-8b")));
  EXPECT_THAT(ErrorOf({"--policy=magic"}), AllOf(HasSubstr("--policy=magic"), HasSubstr("a_shape")));
  EXPECT_THAT(ErrorOf({"--policy=dense", "--density=0.5"}),
              AllOf(HasSubstr("--policy=dense"), HasSubstr("density")));
  EXPECT_THAT(ErrorOf({"--density=1.5"}), AllOf(HasSubstr("--density"), HasSubstr("'1.5'")));
  EXPECT_THAT(ErrorOf({"--density=nan"}), HasSubstr("'nan'"));
  EXPECT_THAT(ErrorOf({"--linear=f32"}), HasSubstr("--linear=f32"));
  EXPECT_THAT(ErrorOf({"--linear=fp8", "--device=cpu", "--model=x"}), HasSubstr("--linear=fp8"));
  EXPECT_THAT(ErrorOf({"--gpus=2", "--device=cpu", "--model=x"}), HasSubstr("--gpus=2 with --device=cpu"));
  EXPECT_THAT(ErrorOf({"--gpus=0"}), HasSubstr("--gpus"));
  EXPECT_THAT(ErrorOf({"--partition=zigzag"}), AllOf(HasSubstr("--partition"), HasSubstr("--gpus")));
  EXPECT_THAT(ErrorOf({"--strategy=ring"}), AllOf(HasSubstr("--strategy"), HasSubstr("--gpus")));
  EXPECT_THAT(ErrorOf({"--strategy=sparse", "--gpus=2"}), HasSubstr("--strategy"));
  EXPECT_THAT(ErrorOf({"--partition=odd", "--gpus=2"}), HasSubstr("--partition"));
  EXPECT_THAT(ErrorOf({"--linear=int4"}), HasSubstr("'int4'"));
  EXPECT_THAT(ErrorOf({"--sink=disk"}), AllOf(HasSubstr("--sink"), HasSubstr("none, verify, memory")));
  EXPECT_THAT(ErrorOf({"--sink=memory"}), AllOf(HasSubstr("--sink=memory"), HasSubstr("has a directory")));
  EXPECT_THAT(ErrorOf({"--sink=verify", "--kv_dir=/tmp/x"}), HasSubstr("--kv_dir=/tmp/x"));
  EXPECT_THAT(ErrorOf({"--checkpoint_layers=8"}), HasSubstr("--gpus=2 or more"));
  EXPECT_THAT(ErrorOf({"--chunk_tokens=1000"}), AllOf(HasSubstr("1000"), HasSubstr("multiple of 128")));
  EXPECT_THAT(ErrorOf({"--repeat=0"}), AllOf(HasSubstr("--repeat"), HasSubstr("1 to 1000")));
  EXPECT_THAT(ErrorOf({"--attention_tflops=-5"}), HasSubstr("'-5'"));
  EXPECT_THAT(ErrorOf({"--link_gbytes_per_s=0"}), AllOf(HasSubstr("--link_gbytes_per_s"), HasSubstr("'0'")));
  EXPECT_THAT(ErrorOf({"--egress_gbytes_per_s=x"}), HasSubstr("--egress_gbytes_per_s"));
  EXPECT_THAT(ErrorOf({"stray"}), HasSubstr("'stray'"));
}

TEST(PrefillBenchOptionsTest, EmulationWantsRanksThatNeedNothingOfEachOther) {
  PrefillBenchOptions options;
  std::string help;
  ASSERT_TRUE(
      ParsePrefillBenchOptions({"--emulate", "--gpus=8", "--link_gbytes_per_s=250"}, &options, &help).ok());
  EXPECT_TRUE(options.emulate);
  EXPECT_EQ(options.gpus, 8);
  EXPECT_DOUBLE_EQ(options.link_gbytes_per_s, 250);
  options = {};
  ASSERT_TRUE(ParsePrefillBenchOptions({"--emulate", "--gpus=8"}, &options, &help).ok());
  EXPECT_DOUBLE_EQ(options.link_gbytes_per_s, 100);  // as workers
  EXPECT_THAT(ErrorOf({"--emulate"}), AllOf(HasSubstr("--emulate"), HasSubstr("--gpus=2 or more")));
  EXPECT_THAT(ErrorOf({"--emulate", "--gpus=2", "--measure_recall"}), HasSubstr("--emulate: recall"));
  EXPECT_THAT(ErrorOf({"--emulate", "--gpus=2", "--policy=headwater", "--max_density=0.1"}),
              HasSubstr("--emulate: a quality"));
  EXPECT_THAT(ErrorOf({"--emulate", "--gpus=2", "--device=cpu", "--model=x"}), HasSubstr("--device=cpu"));
}

}  // namespace
}  // namespace headwater
