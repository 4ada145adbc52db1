// How the processes answer when they are started wrongly or stopped.
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

// Runs the arguments to their end and expects `exit_code` and `in_output`.
void ExpectEnds(const std::vector<std::string>& arguments, int exit_code, const std::string& in_output) {
  const std::string log = MakeTempDirectory() + "/log";
  Process process(arguments, log);
  const auto status = process.Wait(absl::Seconds(20));
  ASSERT_TRUE(status.has_value()) << arguments[0] << " still runs:\n" << process.Log();
  EXPECT_EQ(*status, exit_code) << process.Log();
  EXPECT_TRUE(absl::StrContains(process.Log(), in_output)) << "wanted '" << in_output << "' in:\n"
                                                           << process.Log();
}

std::string TinyDirectory() {
  const std::string directory = MakeTempDirectory();
  WriteTinyModel(TinyModel{}, directory);
  return directory;
}

TEST(StartupTest, WrongFlagsAreNamed) {
  for (const char* binary : {"headwater-coordinator", "headwater-worker", "headwater-decode"}) {
    const std::string log = MakeTempDirectory() + "/log";
    Process process({BinaryPath(binary), "--no_such_flag=1"}, log);
    const auto status = process.Wait(absl::Seconds(20));
    ASSERT_TRUE(status.has_value());
    EXPECT_EQ(*status, 2);
    EXPECT_TRUE(absl::StrContains(process.Log(), "no_such_flag")) << process.Log();
  }
  ExpectEnds({BinaryPath("headwater"), "frobnicate"}, 2, "frobnicate");
}

TEST(StartupTest, MissingModelIsNamed) {
  const std::string none = "/nonexistent/model";
  ExpectEnds({BinaryPath("headwater-worker"), "--model=" + none, "--listen=127.0.0.1:0", "--metrics="}, 2,
             none);
  ExpectEnds({BinaryPath("headwater-decode"), "--model=" + none, "--listen=127.0.0.1:0",
              "--metrics=", "--kv_dir=" + MakeTempDirectory()},
             2, none);
}

TEST(StartupTest, PortInUseIsNamed) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t length = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  const std::string taken = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  const std::string model = TinyDirectory();

  ExpectEnds({BinaryPath("headwater-coordinator"), "--listen=" + taken, "--metrics="}, 2, taken);
  ExpectEnds({BinaryPath("headwater-coordinator"), "--listen=127.0.0.1:0", "--metrics=" + taken}, 2, taken);
  ExpectEnds({BinaryPath("headwater-worker"), "--model=" + model, "--listen=" + taken, "--metrics="}, 2,
             taken);
  ExpectEnds({BinaryPath("headwater-decode"), "--model=" + model, "--listen=" + taken,
              "--metrics=", "--kv_dir=" + MakeTempDirectory()},
             2, taken);
  close(fd);
}

TEST(StartupTest, MissingCoordinatorIsAClearErrorOfTheCommandLine) {
  const std::string nowhere = absl::StrCat("127.0.0.1:", PickFreePort());
  ExpectEnds({BinaryPath("headwater"), "submit", "--coordinator=" + nowhere, "--token_ids=1,2,3",
              "--connect_timeout=1s"},
             4, nowhere);
}

TEST(StartupTest, AWorkerThatNeverComesIsAnErrorInTime) {
  ClusterOptions options;
  options.workers = 0;
  options.model_directory = TinyDirectory();
  options.coordinator_flags = {"--worker_wait=1s"};
  Cluster cluster(options);

  const absl::Time start = absl::Now();
  const auto result = cluster.Prefill(MakeRequest({1, 2, 3}));

  EXPECT_EQ(result.status().code(), absl::StatusCode::kUnavailable) << result.status();
  EXPECT_EQ(ReasonOf(result.status()), v1::ERROR_REASON_NO_WORKERS) << result.status();
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST(StartupTest, SigtermEndsIdleProcessesWithZero) {
  ClusterOptions options;
  options.workers = 1;
  options.model_directory = TinyDirectory();
  Cluster cluster(options);

  for (Process* process : {&cluster.worker(0), &cluster.decode(), &cluster.coordinator()}) {
    process->Signal(SIGTERM);
    const auto status = process->Wait(absl::Seconds(10));
    ASSERT_TRUE(status.has_value()) << process->Log();
    EXPECT_EQ(*status, 0) << process->Log();
  }
}

TEST(StartupTest, PromptsOverEveryMemoryPlanAreRefusedWithBytes) {
  ClusterOptions options;
  options.workers = 1;
  options.model_directory = TinyDirectory();
  options.worker_flags = {"--memory_budget=100000000"};
  Cluster cluster(options);

  const auto result = cluster.Prefill(MakeRequest(RandomTokens(1, 65000)));

  EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition) << result.status();
  EXPECT_EQ(ReasonOf(result.status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE) << result.status();
  const auto small = cluster.Prefill(MakeRequest(RandomTokens(1, 100)));
  EXPECT_TRUE(small.ok()) << small.status();
}

}  // namespace
}  // namespace headwater::testing
