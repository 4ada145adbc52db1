// The service while the wall clock jumps: leases, heartbeats and deadlines count by clocks that do not. All
// processes run with libfaketime, which gives them a wall clock of this test's; the system's stays as it is.
#include "absl/time/clock.h"

#include <atomic>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>
#include <signal.h>
#include <unistd.h>

#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

// Several times what it takes to declare a silent worker (3.5 heartbeats of 1 s) or decode node lost.
constexpr absl::Duration kAfterJump = absl::Seconds(9);
constexpr char kRetries[] = "headwater_retries_total";

class ClockTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(access(HW_FAKETIME_LIBRARY, R_OK), 0) << HW_FAKETIME_LIBRARY << " (Debian package libfaketime)";
    directory_ = MakeTempDirectory();
    JumpTo("+0");
    const std::string model = MakeTempDirectory();
    WriteTinyModel(TinyModel{.layers = 4}, model);
    ClusterOptions options;
    options.model_directory = model;
    // Sessions that are used less often than this are freed: a jump of the clock must not look like disuse.
    options.decode_flags = {"--kv_lease=120s"};
    options.command_prefix = {"/usr/bin/env",
                              absl::StrCat("LD_PRELOAD=", HW_FAKETIME_LIBRARY),
                              absl::StrCat("FAKETIME_TIMESTAMP_FILE=", OffsetFile()),
                              "FAKETIME_NO_CACHE=1",
                              "DONT_FAKE_MONOTONIC=1",
                              "FAKETIME_DONT_FAKE_MONOTONIC=1"};
    cluster_ = std::make_unique<Cluster>(options);
  }

  void TearDown() override {
    if (HasFailure() && cluster_ != nullptr) std::fprintf(stderr, "%s", cluster_->Logs().c_str());
  }

  std::string OffsetFile() const { return directory_ + "/offset"; }

  // By rename: processes read it at any time.
  void JumpTo(const std::string& offset) {
    const std::string temporary = OffsetFile() + ".new";
    std::ofstream(temporary) << offset << "\n";
    ASSERT_EQ(rename(temporary.c_str(), OffsetFile().c_str()), 0);
  }

  // How far the coordinator's wall clock, by its last log line, is ahead of this test's.
  absl::Duration CoordinatorAhead() const {
    absl::Time last = absl::InfinitePast();
    const std::string log = cluster_->coordinator().Log();
    for (const absl::string_view line : absl::StrSplit(log, '\n')) {
      absl::Time time;
      std::string error;
      const size_t end = line.find('Z');
      if (end == absl::string_view::npos) continue;
      const size_t begin = line.rfind(' ', end) == absl::string_view::npos ? 0 : line.rfind(' ', end) + 1;
      if (absl::ParseTime(absl::RFC3339_full, line.substr(begin, end + 1 - begin), &time, &error))
        last = time;
    }
    return last - absl::Now();
  }

  int Registrations() const {
    int count = 0;
    const std::string log = cluster_->coordinator().Log();
    for (const absl::string_view line : absl::StrSplit(log, '\n')) {
      count += absl::StrContains(line, "registered") ? 1 : 0;
    }
    return count;
  }

  // CPU seconds that the process has used.
  static double CpuSeconds(const Process& process) {
    const std::string stat = ReadFile(absl::StrCat("/proc/", process.pid(), "/stat"));
    const std::vector<std::string> fields = absl::StrSplit(stat.substr(stat.rfind(')') + 2), ' ');
    return (std::stod(fields.at(11)) + std::stod(fields.at(12))) / static_cast<double>(sysconf(_SC_CLK_TCK));
  }

  // Requests, each with a deadline of its own, until `stop`.
  void Load(const std::atomic<bool>* stop, int seed, std::atomic<int>* done) {
    for (int i = 0; !stop->load(); ++i) {
      v1::PrefillRequest request = MakeRequest(RandomTokens(static_cast<uint64_t>(seed * 1000 + i), 600));
      request.mutable_deadline()->set_seconds(50);
      const auto completed = cluster_->Prefill(request);
      ASSERT_TRUE(completed.ok()) << completed.status();
      EXPECT_EQ(completed->retries(), 0u);
      ASSERT_TRUE(cluster_->Release(*completed).ok());
      ++*done;
    }
  }

  // Jumps while requests run; none of them fails, nobody is declared dead, no lease ends.
  void JumpUnderLoad(const std::string& offset, absl::Duration expected) {
    const auto kept = cluster_->Prefill(MakeRequest(RandomTokens(7, 300)));
    ASSERT_TRUE(kept.ok()) << kept.status();
    const int registrations = Registrations();
    std::atomic<bool> stop{false};
    std::atomic<int> done{0};
    std::vector<std::thread> clients;
    for (int seed : {1, 2}) clients.emplace_back([this, &stop, &done, seed] { Load(&stop, seed, &done); });
    absl::SleepFor(absl::Seconds(1));
    JumpTo(offset);
    const int before = done;
    absl::SleepFor(kAfterJump);
    EXPECT_GT(done, before) << "no request ended after the jump";
    stop = true;
    for (std::thread& client : clients) client.join();

    const auto fresh = cluster_->Prefill(MakeRequest(RandomTokens(8, 300)));
    ASSERT_TRUE(fresh.ok()) << fresh.status();
    EXPECT_LT(absl::AbsDuration(CoordinatorAhead() - expected), absl::Minutes(5)) << "the clock did not jump";
    EXPECT_EQ(Registrations(), registrations) << "a worker or decode node was lost";
    EXPECT_EQ(ReadMetric(cluster_->coordinator_metrics_port(), kRetries), 0);
    cluster_->WaitForMembers(2, 1);
    const auto tokens = cluster_->Generate(*kept, 3);
    ASSERT_TRUE(tokens.ok()) << tokens.status() << ": a lease ended";
    const auto released = cluster_->Release(*kept);
    EXPECT_TRUE(released.ok() && *released > 0) << "a lease ended";
    EXPECT_TRUE(cluster_->Release(*fresh).ok());
    ExpectIdle();
  }

  // Waits that end at once instead of at their limit would go round and round.
  void ExpectIdle() {
    const std::vector<Process*> processes = {&cluster_->coordinator(), &cluster_->worker(0),
                                             &cluster_->worker(1), &cluster_->decode()};
    std::vector<double> used;
    for (const Process* process : processes) used.push_back(CpuSeconds(*process));
    absl::SleepFor(absl::Seconds(3));
    for (size_t i = 0; i < processes.size(); ++i) {
      EXPECT_LT(CpuSeconds(*processes[i]) - used[i], 1.0) << "process " << i << " is busy with nothing to do";
    }
  }

  std::string directory_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_F(ClockTest, NothingFailsWhenTheWallClockJumpsAnHourForward) { JumpUnderLoad("+3600", absl::Hours(1)); }

TEST_F(ClockTest, NothingFailsWhenTheWallClockJumpsAnHourBack) { JumpUnderLoad("-3600", -absl::Hours(1)); }

// As a time daemon would: some steps, back and forth, then still.
TEST_F(ClockTest, NothingFailsWhenTheWallClockStepsBackAndForth) {
  std::atomic<bool> stop{false};
  std::atomic<int> done{0};
  const int registrations = Registrations();
  std::thread client([this, &stop, &done] { Load(&stop, 3, &done); });
  for (const char* offset : {"+2", "-2", "+30", "-30", "+0.5", "-0.5", "+0"}) {
    JumpTo(offset);
    absl::SleepFor(absl::Milliseconds(700));
  }
  stop = true;
  client.join();
  EXPECT_GT(done, 0);
  EXPECT_EQ(Registrations(), registrations);
  EXPECT_EQ(ReadMetric(cluster_->coordinator_metrics_port(), kRetries), 0);
  ExpectIdle();
}

}  // namespace
}  // namespace headwater::testing
