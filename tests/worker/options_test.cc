#include "worker/options.h"

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace headwater {
namespace {

using testing::HasSubstr;

absl::Status Parse(const std::vector<std::string>& arguments, WorkerOptions* options) {
  std::string help;
  return ParseWorkerOptions(arguments, options, &help);
}

TEST(WorkerOptionsTest, FillsInDefaults) {
  WorkerOptions options;
  ASSERT_TRUE(Parse({"--model=/models/My Model/"}, &options).ok());

  EXPECT_EQ(options.model_name, "My-Model");
  EXPECT_FALSE(options.worker_id.empty());
  EXPECT_GE(options.threads, 1);
  EXPECT_EQ(options.coordinator, "127.0.0.1:7070");
  EXPECT_EQ(options.listen, "127.0.0.1:7071");
  EXPECT_EQ(options.metrics, "127.0.0.1:9071");
  EXPECT_EQ(options.kv_channels, 2);
  EXPECT_EQ(options.egress_buffers, 3);
  EXPECT_EQ(options.checkpoint_layers, 8);
  EXPECT_EQ(options.collective_timeout, absl::Seconds(30));
}

TEST(WorkerOptionsTest, TakesWhatIsGiven) {
  WorkerOptions options;
  const absl::Status status =
      Parse({"--model=m", "--model_name=smol", "--threads=3", "--memory_budget=2GiB", "--compute=bf16",
             "--kv_stall_timeout=1500ms", "--worker_id=w7", "--metrics=", "--log_format=json",
             "--measure_rates=false", "--link_gbytes_per_s=2.5", "--egress_gbytes_per_s=1e-3"},
            &options);

  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(options.model_name, "smol");
  EXPECT_EQ(options.threads, 3);
  EXPECT_EQ(options.memory_budget_bytes, uint64_t{2} << 30);
  EXPECT_EQ(options.kv_stall_timeout, absl::Milliseconds(1500));
  EXPECT_EQ(options.worker_id, "w7");
  EXPECT_EQ(options.metrics, "");
  EXPECT_FALSE(options.measure_rates);
  EXPECT_EQ(options.link_gbytes_per_s, 2.5);
  EXPECT_EQ(options.egress_gbytes_per_s, 1e-3);
}

TEST(WorkerOptionsTest, AGpuTakesFp8LinearLayers) {
  WorkerOptions options;
  EXPECT_EQ(options.linear, "bf16");
  const absl::Status status = Parse({"--model=m", "--device=cuda:0", "--linear=fp8"}, &options);

  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(options.linear, "fp8");
}

TEST(WorkerOptionsTest, NamesTheFlagAndTheValueThatIsWrong) {
  const struct {
    std::vector<std::string> arguments;
    std::vector<std::string> says;
  } rows[] = {
      {{}, {"--model"}},
      {{"--modle=x"}, {"modle"}},
      {{"--model=m", "--threads=-1"}, {"threads", "-1"}},
      {{"--model=m", "--threads=many"}, {"threads", "many"}},
      {{"--model=m", "--compute=f64"}, {"compute", "f64"}},
      {{"--model=m", "--kv_channels=-1"}, {"kv_channels", "-1"}},
      {{"--model=m", "--egress_buffers=1000"}, {"egress_buffers", "1000"}},
      {{"--model=m", "--checkpoint_layers=-1"}, {"checkpoint_layers", "-1"}},
      {{"--model=m", "--listen=7071"}, {"listen", "7071"}},
      {{"--model=m", "--coordinator=host:99999"}, {"coordinator", "host:99999"}},
      {{"--model=m", "--worker_id=a b"}, {"worker_id", "a b"}},
      {{"--model=m", "--collective_timeout=soon"}, {"collective_timeout", "soon"}},
      {{"--model=m", "--device=tpu"}, {"device", "tpu"}},
      {{"--model=m", "--device=cuda:x"}, {"device", "cuda:x", "cpu or cuda:N"}},
      {{"--model=m", "--device=cuda:0", "--linear=int8"}, {"linear", "int8"}},
      {{"--model=m", "--linear=fp8"}, {"--linear: 'fp8'", "--device=cpu"}},
      {{"--model=m", "--link_gbytes_per_s=-1"}, {"link_gbytes_per_s", "-1", "0 to 1e+06"}},
      {{"--model=m", "--egress_gbytes_per_s=nan"}, {"egress_gbytes_per_s", "nan"}},
      {{"--model=m", "extra"}, {"extra"}},
  };
  for (const auto& row : rows) {
    WorkerOptions options;
    const absl::Status status = Parse(row.arguments, &options);
    EXPECT_FALSE(status.ok());
    for (const std::string& says : row.says) EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  }
}

TEST(WorkerOptionsTest, HelpNamesEveryFlag) {
  WorkerOptions options;
  std::string help;
  ASSERT_TRUE(ParseWorkerOptions(std::vector<std::string>{"--help"}, &options, &help).ok());

  for (const char* flag : {"model",
                           "coordinator",
                           "listen",
                           "advertise",
                           "metrics",
                           "device",
                           "compute",
                           "linear",
                           "threads",
                           "memory_budget",
                           "kv_channels",
                           "egress_buffers",
                           "checkpoint_layers",
                           "collective_timeout",
                           "kv_stall_timeout",
                           "drain_timeout",
                           "log_format",
                           "measure_rates",
                           "link_gbytes_per_s",
                           "egress_gbytes_per_s"}) {
    EXPECT_THAT(help, HasSubstr(flag));
  }
}

}  // namespace
}  // namespace headwater
