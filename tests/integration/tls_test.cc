// The whole service over mutual TLS.
#include <atomic>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <signal.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/cluster.h"
#include "tests/support/certificates.h"
#include "tests/support/dial.h"
#include "tests/support/health.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

// Long enough for two workers, which then form a group.
constexpr int kPromptTokens = 3000;
// Until every process has read its files again, which it looks at each second, and gRPC has taken them.
constexpr absl::Duration kRead = absl::Seconds(4);

std::vector<std::string> Flags(const IdentityFiles& files) {
  const TransportOptions options = files.options();
  return {"--tls_cert=" + options.cert, "--tls_key=" + options.key, "--tls_ca=" + options.ca,
          "--tls_refresh=1s"};
}

std::shared_ptr<const Transport> Make(const IdentityFiles& files) {
  auto made = Transport::Create(files.options());
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *made : nullptr;
}

class TlsTest : public ::testing::Test {
 protected:
  void StartCluster(std::vector<std::string> coordinator_flags = {}) {
    ClusterOptions options;
    options.model_directory = MakeTempDirectory();
    WriteTinyModel(TinyModel{}, options.model_directory);
    options.transport = Make(admin_);
    options.coordinator_flags = Flags(coordinator_);
    for (const std::string& flag : coordinator_flags) options.coordinator_flags.push_back(flag);
    options.worker_flags = Flags(worker_);
    options.decode_flags = Flags(decode_);
    for (int i = 0; i < 2; ++i) health_.push_back(absl::StrCat("127.0.0.1:", PickFreePort()));
    options.coordinator_flags.push_back("--health=" + health_[0]);
    options.decode_flags.push_back("--health=" + health_[1]);
    cluster_ = std::make_unique<Cluster>(options);
  }

  absl::StatusOr<v1::PrefillCompleted> Prefill(uint64_t seed) {
    return cluster_->Prefill(MakeRequest(RandomTokens(seed, kPromptTokens)));
  }

  // Of a client with these files.
  absl::Status PrefillAs(const Transport* transport) {
    const auto stub = v1::PrefillService::NewStub(
        DialPrivate(cluster_->coordinator_address(), transport, Role::kCoordinator));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const auto reader = stub->Prefill(&context, MakeRequest(RandomTokens(9, 100)));
    v1::PrefillResponse event, last;
    while (reader->Read(&event)) last = event;
    const absl::Status status = FromGrpcStatus(reader->Finish());
    return status.ok() && last.has_failed() ? FromRpcStatus(last.failed().error()) : status;
  }

  int Cli(const IdentityFiles* files, std::vector<std::string> words, std::string* output) {
    words.insert(words.begin(), BinaryPath("headwater"));
    words.push_back("--coordinator=" + cluster_->coordinator_address());
    words.push_back("--connect_timeout=3s");
    if (files != nullptr) {
      for (const std::string& flag : Flags(*files)) words.push_back(flag);
    }
    Process process(words, MakeTempDirectory() + "/log");
    const auto status = process.Wait(absl::Seconds(30));
    *output = process.Log();
    return status.value_or(-1);
  }

  CertificateAuthority authority_{"ours"};
  IdentityFiles coordinator_{authority_, "coordinator"}, worker_{authority_, "worker"},
      decode_{authority_, "decode"}, admin_{authority_, "admin"}, client_{authority_, "client"};
  std::vector<std::string> health_;  // of the coordinator and the decode node
  std::unique_ptr<Cluster> cluster_;
};

TEST_F(TlsTest, APromptOfTwoWorkersIsPrefilledAndContinued) {
  StartCluster();
  const auto completed = Prefill(1);
  ASSERT_TRUE(completed.ok()) << completed.status() << "\n" << cluster_->Logs();
  EXPECT_EQ(completed->plan().world_size(), 2u);
  const auto tokens = cluster_->Generate(*completed, 4);
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  EXPECT_EQ(tokens->size(), 4u);
  EXPECT_TRUE(cluster_->Release(*completed).ok());

  const auto client = Make(client_), worker = Make(worker_);
  EXPECT_TRUE(PrefillAs(client.get()).ok());
  EXPECT_EQ(PrefillAs(worker.get()).code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(PrefillAs(nullptr).code(), absl::StatusCode::kUnavailable) << "in plaintext";

  for (const int port : {cluster_->coordinator_metrics_port(), cluster_->decode_metrics_port(),
                         cluster_->worker_metrics_port(0)}) {
    const double end = ReadMetric(port, "headwater_tls_certificate_expiry_seconds");
    EXPECT_NEAR(end, static_cast<double>(absl::ToUnixSeconds(absl::Now())) + 3600, 600) << port;
    EXPECT_EQ(ReadMetric(port, "headwater_tls_reload_failures_total"), 0) << port;
  }

  std::string output;
  EXPECT_EQ(Cli(&admin_, {"workers"}, &output), 0) << output;
  EXPECT_THAT(output, ::testing::HasSubstr("w1"));
  EXPECT_NE(Cli(&client_, {"workers"}, &output), 0) << "a client may not administer";
  EXPECT_THAT(output, ::testing::HasSubstr("PERMISSION_DENIED"));
  EXPECT_NE(Cli(nullptr, {"workers"}, &output), 0);

  for (const std::string& address : health_) {
    EXPECT_EQ(AskHealth(address, "/livez"), Health::kServing) << address;
    EXPECT_EQ(AskHealth(address, "/readyz"), Health::kServing) << address;
  }
  cluster_->coordinator().Kill();
  const absl::Time end = absl::Now() + absl::Seconds(15);
  while (AskHealth(health_[1], "/readyz") != Health::kNotServing && absl::Now() < end) {
    absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_EQ(AskHealth(health_[1], "/readyz"), Health::kNotServing) << "nobody has it registered";
  EXPECT_EQ(AskHealth(health_[1], "/livez"), Health::kServing);
}

TEST_F(TlsTest, RotationOfEverythingFailsNoPrompt) {
  StartCluster();
  std::atomic<bool> stop{false};
  std::atomic<int> prompts{0};
  absl::Status failed;
  std::thread load([&] {
    for (uint64_t seed = 1; !stop; ++seed) {
      const auto completed = Prefill(seed);
      if (completed.ok()) (void)cluster_->Release(*completed);
      failed.Update(completed.status());
      ++prompts;
    }
  });
  const CertificateAuthority next("next");
  const std::string both = authority_.pem() + next.pem();
  const auto rewrite = [&](const CertificateAuthority& issuer, const std::string& ca) {
    coordinator_.Rewrite(issuer.Issue({SpiffeId("coordinator")}), ca);
    worker_.Rewrite(issuer.Issue({SpiffeId("worker")}), ca);
    decode_.Rewrite(issuer.Issue({SpiffeId("decode")}), ca);
    admin_.Rewrite(issuer.Issue({SpiffeId("admin")}), ca);
    absl::SleepFor(kRead);
  };
  rewrite(authority_, both);
  rewrite(next, both);
  rewrite(next, next.pem());
  stop = true;
  load.join();
  EXPECT_TRUE(failed.ok()) << failed << " of " << prompts << " prompts\n" << cluster_->Logs();
  EXPECT_GT(prompts, 5);
  EXPECT_EQ(PrefillAs(Make(client_).get()).code(), absl::StatusCode::kUnavailable) << "its authority is gone";
}

TEST_F(TlsTest, ADecodeNodeWhoseCertificateHasBecomeWrongGetsNothing) {
  StartCluster({"--decode_grace=3s"});
  const CertificateAuthority other("theirs");
  decode_.Rewrite(other.Issue({SpiffeId("decode")}), authority_.pem());
  absl::SleepFor(kRead);
  const auto completed = Prefill(1);
  EXPECT_FALSE(completed.ok());
  EXPECT_EQ(completed.status().code(), absl::StatusCode::kUnavailable) << completed.status();
  EXPECT_LE(ReadMetric(cluster_->decode_metrics_port(), "headwater_kv_ingress_bytes_total"), 0);
}

}  // namespace
}  // namespace headwater::testing
