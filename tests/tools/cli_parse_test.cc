// Command line and file parsing, exit codes, and what is drawn: all without a service.
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "base/flags.h"
#include "base/rpc/grpc_status.h"
#include "tests/support/fake_clock.h"
#include "tools/cli/cli.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/progress.h"
#include "tools/cli/render.h"
#include "tools/cli/request_flags.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

// Runs the command with nothing to talk to.
struct Outcome {
  int exit_code = 0;
  std::string out;
  std::string err;
};
Outcome RunCommand(const std::vector<std::string>& arguments, const std::string& standard_in = "") {
  std::istringstream in(standard_in);
  std::ostringstream out;
  std::ostringstream err;
  Interrupt interrupt;
  Outcome outcome;
  outcome.exit_code = RunCli(arguments, Console{in, out, err, false, 80, &interrupt});
  outcome.out = out.str();
  outcome.err = err.str();
  return outcome;
}

TEST(FlagSetTest, TakesBothSpellingsAndKeepsTheLastValue) {
  std::string text = "default";
  int64_t number = 5;
  bool on = false;
  bool off = true;
  uint64_t bytes = 0;
  FlagSet flags("x");
  flags.String("text", &text, "");
  flags.Int("number", &number, -10, 10, "");
  flags.Bool("on", &on, "");
  flags.Bool("off", &off, "");
  flags.Bytes("bytes", &bytes, "", "");

  const absl::Status status = flags.Parse({"--text=a", "one", "--number", "-7", "--on", "--nooff", "--text",
                                           "b=c", "--bytes=2KiB", "--", "--two"});

  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(text, "b=c");
  EXPECT_EQ(number, -7);
  EXPECT_TRUE(on);
  EXPECT_FALSE(off);
  EXPECT_EQ(bytes, 2048u);
  EXPECT_TRUE(flags.IsSet("on"));
  EXPECT_FALSE(flags.IsSet("nothing"));
  EXPECT_THAT(flags.positional(), ElementsAre("one", "--two"));
}

TEST(FlagSetTest, TakesHyphensInNames) {
  int64_t number = 0;
  bool on = true;
  FlagSet flags("x");
  flags.Int("two_words", &number, -10, 10, "");
  flags.Bool("is_on", &on, "");
  const absl::Status status = flags.Parse({"--two-words=-7", "--nois-on"});
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(number, -7);
  EXPECT_FALSE(on);
}

TEST(FlagSetTest, NamesTheFlagAndTheValueOfAnError) {
  const auto error = [](const std::vector<std::string>& arguments) {
    std::string text;
    int64_t number = 0;
    bool on = false;
    absl::Duration time;
    FlagSet flags("x");
    flags.String("text", &text, "");
    flags.Int("number", &number, -10, 10, "");
    flags.Bool("on", &on, "");
    flags.Duration("time", &time, absl::Seconds(1), absl::Seconds(9), "");
    return MessageOf(flags.Parse(arguments));
  };

  EXPECT_THAT(error({"--number=11"}),
              AllOf(HasSubstr("--number"), HasSubstr("'11'"), HasSubstr("-10 to 10")));
  EXPECT_THAT(error({"--number=99999999999999999999"}), HasSubstr("99999999999999999999"));
  EXPECT_THAT(error({"--on=perhaps"}), AllOf(HasSubstr("--on"), HasSubstr("'perhaps'")));
  EXPECT_THAT(error({"--time=10s"}), AllOf(HasSubstr("--time"), HasSubstr("1s to 9s")));
  EXPECT_THAT(error({"--time=nan"}), HasSubstr("--time"));
  EXPECT_THAT(error({"--text"}), HasSubstr("--text needs a value"));
  EXPECT_THAT(error({"--notext"}), HasSubstr("unknown flag --notext"));
  EXPECT_THAT(error({"--numbr=1"}), HasSubstr("did you mean --number?"));
  EXPECT_THAT(error({"-n"}), HasSubstr("unknown flag"));
}

TEST(FlagSetTest, ParsesBytes) {
  uint64_t bytes = 0;
  EXPECT_TRUE(ParseBytes("0", &bytes) && bytes == 0);
  EXPECT_TRUE(ParseBytes("1.5GiB", &bytes) && bytes == uint64_t{3} << 29);
  EXPECT_TRUE(ParseBytes("2M", &bytes) && bytes == uint64_t{2} << 20);
  EXPECT_TRUE(ParseBytes("4611686018427387904", &bytes) && bytes == uint64_t{1} << 62);
  for (const char* bad : {"", "-1", "1.5", "GiB", "1XB", "nanGiB", "infGiB", "-1GiB", "4611686018427387905",
                          "99999999TiB", "18446744073709551616"}) {
    EXPECT_FALSE(ParseBytes(bad, &bytes)) << bad;
  }
}

TEST(TokenIdsTest, TakesWhitespaceAndCommas) {
  EXPECT_THAT(*ParseTokenIds("1, 2\n3\t4,,5\r\n"), ElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(*ParseTokenIds("0 4294967295"), ElementsAre(0u, 4294967295u));
}

TEST(TokenIdsTest, NamesTheWordThatIsNoId) {
  EXPECT_THAT(MessageOf(ParseTokenIds("1 2 x3").status()), AllOf(HasSubstr("token id 3"), HasSubstr("'x3'")));
  EXPECT_THAT(MessageOf(ParseTokenIds("4294967296").status()), HasSubstr("4294967296"));
  EXPECT_THAT(MessageOf(ParseTokenIds("1 -2").status()), HasSubstr("'-2'"));
  EXPECT_THAT(MessageOf(ParseTokenIds("1.5").status()), HasSubstr("'1.5'"));
  EXPECT_THAT(MessageOf(ParseTokenIds("+1").status()), HasSubstr("'+1'"));
  EXPECT_THAT(MessageOf(ParseTokenIds(" \n,").status()), HasSubstr("no token ids"));
  EXPECT_THAT(MessageOf(ParseTokenIds(std::string("1\0", 2)).status()), HasSubstr("'1?'"));
  EXPECT_LT(MessageOf(ParseTokenIds(std::string(10000, 'z')).status()).size(), 200u);
}

TEST(TokenIdsTest, ReadsFilesWithinTheirLimit) {
  std::istringstream in("7 8 9");
  EXPECT_THAT(*ReadTokenFile("-", in), ElementsAre(7, 8, 9));
  std::istringstream large("1 2 3 4 5 6");
  EXPECT_THAT(MessageOf(ReadTokenFile("-", large, /*max_bytes=*/10).status()),
              HasSubstr("more than 10 bytes"));
  std::istringstream empty;
  EXPECT_THAT(MessageOf(ReadTokenFile("-", empty).status()), HasSubstr("no token ids"));
  EXPECT_THAT(MessageOf(ReadTokenFile("/no/such/file", in).status()), HasSubstr("/no/such/file"));
  EXPECT_THAT(MessageOf(ReadTokenFile("/tmp", in).status()), HasSubstr("/tmp"));
}

TEST(RequestFlagsTest, ParsesPolicies) {
  const auto policy = ParsePolicy("a_shape:sink_tokens=128,window_tokens=1024");
  ASSERT_TRUE(policy.ok());
  EXPECT_EQ(policy->name(), "a_shape");
  EXPECT_EQ(policy->parameters().at("sink_tokens"), 128);
  EXPECT_EQ(policy->parameters().at("window_tokens"), 1024);
  EXPECT_EQ(ParsePolicy("dense")->parameters_size(), 0);
  for (const char* bad : {"", ":a=1", "p:a", "p:a=", "p:=1", "p:a=x", "p:a=1,a=2", "p:a=inf"}) {
    EXPECT_FALSE(ParsePolicy(bad).ok()) << bad;
  }
}

TEST(RequestFlagsTest, ReadsBatchLinesOverDefaults) {
  v1::PrefillRequest defaults;
  defaults.set_model("m");
  defaults.set_decode_node("d0");

  const auto requests = ParseBatch(
      "{\"token_ids\":[1,2],\"request_id\":\"a\",\"priority\":-3,\"deadline\":1.5,\"policy\":\"dense\"}\n"
      "\n"
      "{\"token_ids\":[3],\"decode_pool\":\"p\",\"kv_dtype\":\"f16\",\"partition\":\"zigzag\","
      "\"strategy\":\"sparse\",\"block_tokens\":64,"
      "\"world_size\":2,\"top_logprobs\":5,\"model\":\"n\",\"tenant\":\"t\"}",
      defaults);

  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 2u);
  const v1::PrefillRequest& first = (*requests)[0];
  EXPECT_THAT(first.token_ids(), ElementsAre(1, 2));
  EXPECT_EQ(first.request_id(), "a");
  EXPECT_EQ(first.priority(), -3);
  EXPECT_EQ(first.deadline().nanos(), 500'000'000);
  EXPECT_EQ(first.model(), "m");
  EXPECT_EQ(first.decode_node(), "d0");
  const v1::PrefillRequest& second = (*requests)[1];
  EXPECT_EQ(second.decode_pool(), "p");
  EXPECT_EQ(second.kv_dtype(), v1::KV_DTYPE_F16);
  EXPECT_EQ(second.partition(), v1::PARTITION_ZIGZAG);
  EXPECT_EQ(second.strategy(), v1::STRATEGY_SPARSE);
  EXPECT_EQ(second.block_tokens(), 64u);
  EXPECT_EQ(second.world_size(), 2u);
  EXPECT_EQ(second.top_logprobs(), 5u);
  EXPECT_EQ(second.model(), "n");
  EXPECT_EQ(second.tenant(), "t");
}

TEST(RequestFlagsTest, ALinesBoundTakesThePlaceOfTheFlags) {
  v1::PrefillRequest defaults;
  defaults.mutable_quality()->set_min_recall(0.9);

  const auto requests = ParseBatch(
      "{\"token_ids\":[1],\"max_density\":0.25}\n{\"token_ids\":[1],\"time_budget\":\"1500ms\"}\n"
      "{\"token_ids\":[1]}",
      defaults);

  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_EQ((*requests)[0].quality().max_density(), 0.25);
  EXPECT_EQ((*requests)[1].quality().time_budget().nanos(), 500'000'000);
  EXPECT_EQ((*requests)[2].quality().min_recall(), 0.9);
  EXPECT_THAT(
      MessageOf(ParseBatch("{\"token_ids\":[1],\"max_density\":0.25,\"min_recall\":0.9}", {}).status()),
      HasSubstr("exclude each other"));
}

TEST(RequestFlagsTest, NamesTheLineAndTheKeyOfABadBatch) {
  const auto error = [](const std::string& text) { return MessageOf(ParseBatch(text, {}).status()); };

  EXPECT_THAT(error(""), HasSubstr("no requests"));
  EXPECT_THAT(error("{\"token_ids\":[1]}\n{"), HasSubstr("line 2"));
  EXPECT_THAT(error("[1]"), HasSubstr("line 1"));
  EXPECT_THAT(error("{\"request_id\":\"a\"}"), HasSubstr("token_ids"));
  EXPECT_THAT(error("{\"token_ids\":[]}"), HasSubstr("no token ids"));
  EXPECT_THAT(error("{\"token_ids\":\"1\"}"), HasSubstr("is not an array"));
  EXPECT_THAT(error("{\"token_ids\":[1,-1]}"), HasSubstr("token id 2"));
  EXPECT_THAT(error("{\"token_ids\":[1.5]}"), HasSubstr("token id 1"));
  EXPECT_THAT(error("{\"token_ids\":[4294967296]}"), HasSubstr("token id 1"));
  EXPECT_THAT(error("{\"token_ids\":[1],\"colour\":1}"),
              AllOf(HasSubstr("colour"), HasSubstr("not a known key")));
  EXPECT_THAT(error("{\"token_ids\":[1],\"priority\":101}"), AllOf(HasSubstr("priority"), HasSubstr("101")));
  EXPECT_THAT(error("{\"token_ids\":[1],\"model\":{}}"), HasSubstr("model"));
  EXPECT_THAT(error("{\"token_ids\":[1],\"decode_node\":\"a\",\"decode_pool\":\"b\"}"), HasSubstr("both"));
}

TEST(ExitCodeTest, FollowsWhoMustAct) {
  using absl::StatusCode;
  const std::vector<std::pair<StatusCode, int>> table = {
      {StatusCode::kOk, 0},          {StatusCode::kInvalidArgument, 3},  {StatusCode::kFailedPrecondition, 3},
      {StatusCode::kNotFound, 3},    {StatusCode::kUnimplemented, 3},    {StatusCode::kAlreadyExists, 3},
      {StatusCode::kUnavailable, 4}, {StatusCode::kDeadlineExceeded, 4}, {StatusCode::kResourceExhausted, 4},
      {StatusCode::kAborted, 4},     {StatusCode::kCancelled, 5},        {StatusCode::kInternal, 1},
      {StatusCode::kDataLoss, 1},    {StatusCode::kUnknown, 1}};
  for (const auto& [code, exit_code] : table) {
    EXPECT_EQ(ExitCodeOf(absl::Status(code, "x")), exit_code) << absl::StatusCodeToString(code);
  }
}

TEST(ExitCodeTest, ErrorsShowCodeReasonMessageAndMetadata) {
  const absl::Status status =
      WithRetryAfter(MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                               "no\x1b[2Jroom", {{"limit", "7"}}),
                     absl::Seconds(2));

  EXPECT_EQ(DescribeError(status),
            "RESOURCE_EXHAUSTED QUEUE_FULL: no?[2Jroom\n  limit: 7\n  retry_after: 2s\n");
  const Json json = ErrorToJson(status);
  EXPECT_EQ(json["code"], "RESOURCE_EXHAUSTED");
  EXPECT_EQ(json["reason"], "QUEUE_FULL");
  EXPECT_EQ(json["metadata"]["limit"], "7");
}

v1::PrefillProgress MakeProgress(uint32_t layers_done, uint32_t epoch = 1) {
  v1::PrefillProgress progress;
  progress.set_epoch(epoch);
  progress.set_layers_done(layers_done);
  progress.set_num_layers(30);
  progress.set_tokens_per_second(1234.4);
  progress.set_bytes_acked(10 << 20);
  progress.set_bytes_total(20 << 20);
  progress.mutable_eta()->set_seconds(12);
  return progress;
}

TEST(ProgressTest, DrawsTheBarWithinTheWidth) {
  EXPECT_EQ(RenderBar(MakeProgress(15), 120),
            "[####################--------------------] layer 15/30  1234 tokens/s  ETA 12s  KV 10.0 MiB of "
            "20.0 MiB "
            "acked");
  EXPECT_THAT(RenderBar(MakeProgress(30), 200), HasSubstr("[########################################]"));
  EXPECT_THAT(RenderBar(MakeProgress(0), 120), HasSubstr("[----------------------------------------]"));
  EXPECT_THAT(RenderBar(MakeProgress(3, 2), 120), HasSubstr("epoch 2"));
  EXPECT_THAT(RenderBar(MakeProgress(3, 1), 120), Not(HasSubstr("epoch")));
  for (int width = 0; width < 150; ++width) {
    EXPECT_LE(RenderBar(MakeProgress(7, 2), width).size(), static_cast<size_t>(width));
  }
}

TEST(ProgressTest, DrawsHostileNumbersToo) {
  v1::PrefillProgress progress;
  progress.set_layers_done(4000000000u);
  progress.set_num_layers(1);
  progress.set_tokens_per_second(1e300);
  progress.set_bytes_acked(UINT64_MAX);
  progress.mutable_eta()->set_seconds(INT64_MAX);
  EXPECT_LE(RenderBar(progress, 80).size(), 80u);
  progress.set_num_layers(0);
  progress.mutable_eta()->set_seconds(-5);
  EXPECT_THAT(RenderLine(progress), HasSubstr("ETA 0s"));
}

TEST(ProgressTest, ShowsUnitsThatFit) {
  EXPECT_EQ(RenderBytes(0), "0 B");
  EXPECT_EQ(RenderBytes(1023), "1023 B");
  EXPECT_EQ(RenderBytes(1536), "1.5 KiB");
  EXPECT_EQ(RenderBytes((1 << 20) - 1), "1.0 MiB");
  EXPECT_EQ(RenderBytes(uint64_t{5} << 40), "5.0 TiB");
  EXPECT_EQ(RenderDuration(absl::Microseconds(850)), "850us");
  EXPECT_EQ(RenderDuration(absl::Milliseconds(12.34)), "12.3ms");
  EXPECT_EQ(RenderDuration(absl::Seconds(4.561)), "4.56s");
  EXPECT_EQ(RenderDuration(absl::Seconds(59.999)), "1m00s");
  EXPECT_EQ(RenderDuration(absl::Seconds(123)), "2m03s");
  EXPECT_EQ(RenderDuration(absl::Seconds(3725)), "1h02m");
}

TEST(ProgressTest, WritesLinesAtASaneRateWhereThereIsNoTerminal) {
  FakeClock clock;
  std::ostringstream out;
  ProgressPrinter printer(&out, /*is_terminal=*/false, 80, &clock);

  for (uint32_t layer = 0; layer < 30; ++layer) {
    printer.Update(MakeProgress(layer));
    clock.Advance(absl::Milliseconds(500));
  }
  printer.Update(MakeProgress(3, /*epoch=*/2));

  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 9) << text;
  EXPECT_THAT(text, Not(HasSubstr("\r")));
  EXPECT_THAT(text, HasSubstr("epoch 2"));
}

TEST(ProgressTest, DrawsOverItsLineOnATerminal) {
  FakeClock clock;
  std::ostringstream out;
  {
    ProgressPrinter printer(&out, /*is_terminal=*/true, 80, &clock);
    for (uint32_t layer = 0; layer < 30; ++layer) {
      printer.Update(MakeProgress(layer));
      clock.Advance(absl::Milliseconds(10));
    }
    printer.Note("a note");
  }
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\r'), 4) << "three drawn, one cleared for the note";
  EXPECT_THAT(text, HasSubstr("\r\x1b[Ka note\n"));
}

TEST(CliTest, UsageErrorsEndWithTwoAndName) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{}, "usage"},
      {{"frobnicate"}, "frobnicate"},
      {{"sumbit"}, "did you mean 'submit'?"},
      {{"submit"}, "--tokens"},
      {{"submit", "--tokens=a", "--token_ids=1"}, "--token_ids"},
      {{"submit", "--token_ids=1,x"}, "'x'"},
      {{"submit", "--token_ids="}, "no token ids"},
      {{"submit", "--tokens=/no/such/file"}, "/no/such/file"},
      {{"submit", "--token_ids=1", "--colour=red"}, "--colour"},
      {{"submit", "--token_ids=1", "--policy=a:b"}, "--policy"},
      {{"submit", "--token_ids=1", "--kv_dtype=f64"}, "f64"},
      {{"submit", "--token_ids=1", "--partition=diagonal"}, "diagonal"},
      {{"submit", "--token_ids=1", "--strategy=broadcast"}, "broadcast"},
      {{"submit", "--token_ids=1", "--priority=101"}, "101"},
      {{"submit", "--token_ids=1", "--deadline=-1s"}, "-1s"},
      {{"submit", "--token_ids=1", "--min_recall=high"}, "'high'"},
      {{"submit", "--token_ids=1", "--min_recall=0.9", "--max_density=0.1"}, "exclude each other"},
      {{"submit", "--token_ids=1", "--generate=70000"}, "70000"},
      {{"submit", "--token_ids=1", "--stop_token_ids=a"}, "--stop_token_ids"},
      {{"submit", "--token_ids=1", "--decode_node=a", "--decode_pool=b"}, "--decode_pool"},
      {{"submit", "--token_ids=1", "stray"}, "stray"},
      {{"batch"}, "--requests"},
      {{"batch", "--requests=/no/such/file"}, "/no/such/file"},
      {{"cancel"}, "REQUEST_ID"},
      {{"generate", "--session=s"}, "--decode_address"},
      {{"generate", "--decode_address=a:1"}, "--session"},
      {{"release", "--session=s", "--decode_address=a:1", "--decode_node=b"}, "--decode_node"},
      {{"workers", "--jsno"}, "--json"},
  };
  for (const auto& [arguments, words] : cases) {
    const Outcome outcome = RunCommand(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << ::testing::PrintToString(arguments);
    EXPECT_THAT(outcome.err, HasSubstr(words)) << ::testing::PrintToString(arguments);
    EXPECT_EQ(outcome.out, "") << ::testing::PrintToString(arguments);
  }
}

TEST(CliTest, HelpListsSubcommandsAndTheirFlags) {
  EXPECT_THAT(RunCommand({"help"}).out,
              AllOf(HasSubstr("submit"), HasSubstr("batch"), HasSubstr("exit codes")));
  EXPECT_EQ(RunCommand({"--help"}).exit_code, 0);
  for (const char* command : {"submit", "batch", "cancel", "generate", "release", "workers", "nodes"}) {
    const Outcome outcome = RunCommand({command, "--help"});
    EXPECT_EQ(outcome.exit_code, 0) << command;
    EXPECT_THAT(outcome.out, HasSubstr("--coordinator=VALUE (default 127.0.0.1:7070)")) << command;
    EXPECT_EQ(RunCommand({"help", command}).out, outcome.out);
  }
  EXPECT_EQ(RunCommand({"help", "nothing"}).exit_code, 2);
  EXPECT_THAT(RunCommand({"version"}).out,
              MatchesRegex("headwater 0\\.1\\.0 \\(commit ([0-9a-f]{12}\\+?|unknown), protocol 1\\)\n"));
}

TEST(CliTest, BenchNamesItsBenchmarks) {
  EXPECT_EQ(RunCommand({"bench", "--help"}).exit_code, 0);
  EXPECT_THAT(RunCommand({"bench", "--help"}).out, HasSubstr("prefill"));
  EXPECT_EQ(RunCommand({"help", "bench"}).out, RunCommand({"bench", "--help"}).out);
  EXPECT_EQ(RunCommand({"bench"}).exit_code, 2);
  const Outcome unknown = RunCommand({"bench", "prefil"});
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_THAT(unknown.err, AllOf(HasSubstr("'prefil'"), HasSubstr("did you mean 'prefill'?")));
  // No benchmark lies beside this test.
  const Outcome missing = RunCommand({"bench", "prefill", "--tokens=1"});
  EXPECT_EQ(missing.exit_code, 2);
  EXPECT_THAT(missing.err, AllOf(HasSubstr("/headwater-bench-prefill"), HasSubstr("No such file")));
}

TEST(CliTest, AMissingCoordinatorIsAnErrorInTime) {
  const Outcome outcome = RunCommand(
      {"submit", "--tokens=-", "--coordinator=127.0.0.1:1", "--connect_timeout=200ms", "--json"}, "1 2 3");

  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("127.0.0.1:1"), HasSubstr("UNAVAILABLE")));
  const Json result = Json::parse(outcome.out);
  EXPECT_EQ(result["event"], "result");
  EXPECT_EQ(result["ok"], false);
  EXPECT_EQ(result["exit_code"], 4);
}

}  // namespace
}  // namespace headwater
