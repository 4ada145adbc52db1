// The service with a decode node that checks caches and drops them (--sink=verify).
#include <memory>
#include <thread>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/chaos_proxy.h"
#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

constexpr char kVerified[] = "headwater_kv_ingress_blocks_total{result=\"verified\"}";

class SinkTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string directory = MakeTempDirectory();
    WriteTinyModel(TinyModel{.layers = 12}, directory);
    ClusterOptions options;
    options.model_directory = directory;
    // Of checksums: a small part of the cache.
    options.decode_flags = {"--sink=verify", "--kv_budget=64KiB"};
    options.kv_proxy_port = [this](int decode_port) {
      proxy_ = std::make_unique<ChaosProxy>(decode_port);
      return proxy_->port();
    };
    cluster_ = std::make_unique<Cluster>(options);
  }

  void TearDown() override {
    if (HasFailure() && cluster_ != nullptr) std::fprintf(stderr, "%s", cluster_->Logs().c_str());
    proxy_.reset();
    cluster_.reset();
  }

  static v1::PrefillRequest Request() { return MakeRequest(RandomTokens(11, 6000)); }
  double DecodeMetric(const std::string& name) { return ReadMetric(cluster_->decode_metrics_port(), name); }

  std::unique_ptr<ChaosProxy> proxy_;
  std::unique_ptr<Cluster> cluster_;
};

TEST_F(SinkTest, APrefillIsVerifiedAndCannotBeGeneratedFrom) {
  const auto completed = cluster_->Prefill(Request());

  ASSERT_TRUE(completed.ok()) << completed.status();
  EXPECT_GT(completed->kv_bytes(), 100u * (64 << 10));
  EXPECT_EQ(DecodeMetric(kVerified), static_cast<double>(completed->kv_blocks()));
  EXPECT_EQ(DecodeMetric("headwater_kv_ingress_bytes_total"), static_cast<double>(completed->kv_bytes()));
  const absl::Status refused = cluster_->Generate(*completed, 1).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_TRUE(absl::StrContains(refused.message(), "--sink=verify")) << refused;
  const auto reclaimed = cluster_->Release(*completed);
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  EXPECT_EQ(*reclaimed, 16384 + 8 * completed->kv_blocks());
}

TEST_F(SinkTest, AKilledNodeHasLostTheSessionAndThePrefillBeginsAgain) {
  const auto undisturbed = cluster_->Prefill(Request());
  ASSERT_TRUE(undisturbed.ok()) << undisturbed.status();
  ASSERT_TRUE(cluster_->Release(*undisturbed).ok());
  const double before = DecodeMetric(kVerified);
  const uint64_t limit = proxy_->forwarded_bytes() + undisturbed->kv_bytes() / 2;
  proxy_->LimitForwardedBytes(limit);
  std::thread killer([&] {
    const absl::Time end = absl::Now() + absl::Seconds(60);
    while ((proxy_->forwarded_bytes() < limit || DecodeMetric(kVerified) <= before) && absl::Now() < end) {
      absl::SleepFor(absl::Milliseconds(20));
    }
    cluster_->decode().Kill();
    proxy_->LimitForwardedBytes(UINT64_MAX);
    cluster_->StartDecode();
  });

  const auto completed = cluster_->Prefill(Request());
  killer.join();

  ASSERT_TRUE(completed.ok()) << completed.status();
  EXPECT_GT(completed->epoch(), 1u);
  EXPECT_EQ(completed->kv_digest(), undisturbed->kv_digest());
  EXPECT_EQ(DecodeMetric(kVerified), static_cast<double>(completed->kv_blocks())) << "all blocks anew";
}

}  // namespace
}  // namespace headwater::testing
