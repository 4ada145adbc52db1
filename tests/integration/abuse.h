// What the tests of abuse share: a cluster whose coordinator is abused, and probes of its health meanwhile.
//
// HW_ABUSE_FULL=1 takes the full numbers (5,000 connections, 100,000 streams); else a tenth or less.
#ifndef HW_TESTS_INTEGRATION_ABUSE_H_
#define HW_TESTS_INTEGRATION_ABUSE_H_

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <sys/resource.h>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "tests/integration/cluster.h"
#include "tests/support/certificates.h"
#include "tests/support/health.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {

// On a machine that does nothing else; where others keep it busy, a multiple of what health takes in peace.
inline constexpr absl::Duration kHealthLimit = absl::Milliseconds(100);
inline constexpr int kBusyFactor = 10;
inline constexpr absl::Duration kBackLimit = absl::Seconds(2);
// How much it may grow: what the server may buffer, and half as much for itself.
inline constexpr double kRssCapMiB = 768;
inline constexpr char kPrefill[] = "/headwater.v1.PrefillService/Prefill";
inline constexpr int kVocab = 256;

inline bool Full() { return std::getenv("HW_ABUSE_FULL") != nullptr; }

inline double PeakRssMiB(const Process& process) {
  const std::string status = ReadFile(absl::StrCat("/proc/", process.pid(), "/status"));
  const size_t at = status.find("VmHWM:");
  return at == std::string::npos ? 0 : std::atof(status.c_str() + at + 6) / 1024;
}

// Asks for health again and again, each time on a connection of its own.
class HealthProbe {
 public:
  explicit HealthProbe(std::string address) : address_(std::move(address)), thread_([this] { Run(); }) {}
  ~HealthProbe() { Stop(); }

  void Stop() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }
  // After Stop().
  absl::Duration Percentile99() {
    std::sort(times_.begin(), times_.end());
    return times_.empty() ? absl::InfiniteDuration() : times_[times_.size() * 99 / 100];
  }
  int failures() const { return failures_; }
  size_t count() const { return times_.size(); }

 private:
  void Run() {
    while (!stop_) {
      const absl::Time begin = absl::Now();
      if (AskHealth(address_, "/readyz") != Health::kServing) ++failures_;
      times_.push_back(absl::Now() - begin);
      absl::SleepFor(absl::Milliseconds(10));
    }
  }

  const std::string address_;
  std::atomic<bool> stop_{false};
  std::vector<absl::Duration> times_;
  int failures_ = 0;
  std::thread thread_;
};

class AbuseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    // This test's own end of the connections.
    rlimit files = {};
    ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    ASSERT_GE(files.rlim_cur, static_cast<rlim_t>(Connections() + 200)) << "raise the limit of open files";
  }
  void TearDown() override {
    if (HasFailure() && cluster_ != nullptr) std::fprintf(stderr, "%s", cluster_->Logs().c_str());
  }

  void Start(ClusterOptions options = {}) {
    options.model_directory = MakeTempDirectory();
    WriteTinyModel(TinyModel{.layers = 2}, options.model_directory);
    options.workers = 1;
    health_ = absl::StrCat("127.0.0.1:", PickFreePort());
    options.coordinator_flags.push_back("--health=" + health_);
    // So few open files that the cut-down flood passes the limit, too.
    if (!Full()) options.command_prefix = {"/usr/bin/prlimit", "--nofile=640:640"};
    cluster_ = std::make_unique<Cluster>(std::move(options));
    const std::string& address = cluster_->coordinator_address();
    ASSERT_TRUE(absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &port_));
    ExpectFullService();
    rss_before_ = PeakRssMiB(cluster_->coordinator());
    HealthProbe quiet(health_);
    absl::SleepFor(absl::Seconds(1));
    quiet.Stop();
    quiet_ = quiet.Percentile99();
    probe_ = std::make_unique<HealthProbe>(health_);
  }

  // The same with certificates; this test has that of an admin.
  void StartPrivate() {
    const auto flags = [](const IdentityFiles& files) -> std::vector<std::string> {
      const TransportOptions options = files.options();
      return {"--tls_cert=" + options.cert, "--tls_key=" + options.key, "--tls_ca=" + options.ca};
    };
    auto transport = Transport::Create(admin_.options());
    ASSERT_TRUE(transport.ok()) << transport.status();
    transport_ = *transport;
    ClusterOptions options;
    options.transport = transport_;
    options.coordinator_flags = flags(coordinator_files_);
    options.worker_flags = flags(worker_files_);
    options.decode_flags = flags(decode_files_);
    Start(std::move(options));
  }

  static int Connections() { return Full() ? 5000 : 500; }

  // Stops probing and judges what the probes saw, and the most memory that there was.
  void ExpectHealthy(const char* what) {
    probe_->Stop();
    const double rss = PeakRssMiB(cluster_->coordinator());
    std::printf(
        "%s: health p99 %s of %zu probes (%s in peace), %d unanswered, RSS %.0f MiB at most, %.0f before\n",
        what, absl::FormatDuration(probe_->Percentile99()).c_str(), probe_->count(),
        absl::FormatDuration(quiet_).c_str(), probe_->failures(), rss, rss_before_);
    EXPECT_LE(rss - rss_before_, kRssCapMiB) << what;
    EXPECT_TRUE(cluster_->coordinator().running()) << what;
    EXPECT_EQ(probe_->failures(), 0) << what;
    EXPECT_GE(probe_->count(), 20u) << what;
    EXPECT_LE(probe_->Percentile99(), std::max(kHealthLimit, kBusyFactor * quiet_)) << what;
  }

  void ExpectFullService() {
    const absl::Time begin = absl::Now();
    const auto completed =
        cluster_->Prefill(MakeRequest(RandomTokens(3, 200, kVocab)), nullptr, kBackLimit * 5);
    ASSERT_TRUE(completed.ok()) << completed.status();
    EXPECT_LE(absl::Now() - begin, kBackLimit);
    EXPECT_TRUE(cluster_->Release(*completed).ok());
  }

  // The same on a connection that did not exist before.
  void ExpectFullServiceToNewcomers() {
    const absl::Time begin = absl::Now();
    const auto stub = v1::AdminService::NewStub(
        DialPrivate(cluster_->coordinator_address(), transport_.get(), Role::kCoordinator));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(kBackLimit));
    context.set_wait_for_ready(true);
    v1::ListWorkersResponse workers;
    const grpc::Status status = stub->ListWorkers(&context, {}, &workers);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(workers.workers_size(), 1);
    ExpectFullService();
    EXPECT_LE(absl::Now() - begin, kBackLimit);
  }

  const CertificateAuthority authority_{"ca"};
  const IdentityFiles admin_{authority_, "admin"}, coordinator_files_{authority_, "coordinator"},
      worker_files_{authority_, "worker"}, decode_files_{authority_, "decode"};
  std::shared_ptr<const Transport> transport_;  // null: plaintext
  int port_ = 0;
  std::string health_;
  double rss_before_ = 0;
  absl::Duration quiet_;
  std::unique_ptr<Cluster> cluster_;
  std::unique_ptr<HealthProbe> probe_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_INTEGRATION_ABUSE_H_
