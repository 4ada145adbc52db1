// The service under faults: killed processes and flipped bits. Every fault is repeated HW_FAULT_RUNS times
// (default 2).
#include <cstdlib>
#include <map>
#include <memory>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <signal.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/chaos_proxy.h"
#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

// Long enough that progress is seen at several layers.
constexpr int kPromptTokens = 6000;
constexpr int kLayers = 12;
// As many as there are egress buffers: when a checkpoint is taken, the one before has been reported.
constexpr uint32_t kCheckpointLayers = 3;
constexpr char kStored[] = "headwater_kv_ingress_blocks_total{result=\"stored\"}";
constexpr char kDuplicate[] = "headwater_kv_ingress_blocks_total{result=\"duplicate\"}";
constexpr char kCorrupt[] = "headwater_kv_ingress_blocks_total{result=\"corrupt\"}";

int FaultRuns() {
  int runs = 2;
  const char* text = std::getenv("HW_FAULT_RUNS");
  if (text != nullptr && (!absl::SimpleAtoi(text, &runs) || runs < 1))
    ADD_FAILURE() << "HW_FAULT_RUNS=" << text;
  return runs;
}

class FaultTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string directory = MakeTempDirectory();
    WriteTinyModel(TinyModel{.layers = kLayers}, directory);
    ClusterOptions options;
    options.model_directory = directory;
    options.worker_flags = {absl::StrCat("--checkpoint_layers=", kCheckpointLayers)};
    options.kv_proxy_port = [this](int decode_port) {
      proxy_ = std::make_unique<ChaosProxy>(decode_port);
      return proxy_->port();
    };
    cluster_ = std::make_unique<Cluster>(options);
    const auto undisturbed = cluster_->Prefill(Request());
    ASSERT_TRUE(undisturbed.ok()) << undisturbed.status() << cluster_->Logs();
    undisturbed_ = *undisturbed;
    const auto tokens = cluster_->Generate(undisturbed_, 4);
    ASSERT_TRUE(tokens.ok()) << tokens.status();
    text_ = *tokens;
    ASSERT_TRUE(cluster_->Release(undisturbed_).ok());
  }

  void TearDown() override {
    if (HasFailure() && cluster_ != nullptr) std::fprintf(stderr, "%s", cluster_->Logs().c_str());
    proxy_.reset();
    cluster_.reset();
  }

  static v1::PrefillRequest Request() { return MakeRequest(RandomTokens(11, kPromptTokens)); }

  double DecodeMetric(const std::string& name) { return ReadMetric(cluster_->decode_metrics_port(), name); }

  // Waits until the proxy has let through all that it may and the decode node's count of stored blocks has
  // stood still for half a second; returns it.
  double WaitUntilIngressStands(uint64_t proxy_limit) {
    double last = -1;
    int same = 0;
    for (int i = 0; i < 2000 && same < 25; ++i) {
      const double now = DecodeMetric(kStored);
      same = proxy_->forwarded_bytes() >= proxy_limit && now == last && now > 0 ? same + 1 : 0;
      last = now;
      absl::SleepFor(absl::Milliseconds(20));
    }
    return last;
  }

  void ExpectUndisturbedText(const v1::PrefillCompleted& completed) {
    const auto tokens = cluster_->Generate(completed, 4);
    ASSERT_TRUE(tokens.ok()) << tokens.status();
    EXPECT_EQ(*tokens, text_);
    ASSERT_TRUE(cluster_->Release(completed).ok());
  }

  std::unique_ptr<ChaosProxy> proxy_;
  std::unique_ptr<Cluster> cluster_;
  v1::PrefillCompleted undisturbed_;
  std::vector<uint32_t> text_;
};

TEST_F(FaultTest, KilledDecodeNodeGetsOnlyTheMissingBlocksAfterItsRestart) {
  for (int run = 0; run < FaultRuns(); ++run) {
    SCOPED_TRACE(absl::StrCat("run ", run));
    const double stored_before_run = DecodeMetric(kStored);
    // Between a fifth and four fifths of the cache.
    const uint64_t share = undisturbed_.kv_bytes() / 5 * static_cast<uint64_t>(1 + run % 4);
    const uint64_t limit = proxy_->forwarded_bytes() + share;
    proxy_->LimitForwardedBytes(limit);
    double stored_before_kill = 0;
    std::thread killer([&] {
      stored_before_kill = WaitUntilIngressStands(limit) - stored_before_run;
      cluster_->decode().Kill();
      proxy_->LimitForwardedBytes(UINT64_MAX);
      cluster_->StartDecode();
    });
    const auto completed = cluster_->Prefill(Request());
    killer.join();

    ASSERT_TRUE(completed.ok()) << completed.status();
    EXPECT_EQ(completed->epoch(), 1u) << "a resumed stream needs no new epoch";
    EXPECT_GE(completed->kv_stream_resumes(), 1u);
    EXPECT_EQ(completed->kv_digest(), undisturbed_.kv_digest());
    EXPECT_GT(stored_before_kill, 0);
    EXPECT_EQ(DecodeMetric(kStored), static_cast<double>(completed->kv_blocks()) - stored_before_kill)
        << "exactly the missing blocks";
    EXPECT_EQ(DecodeMetric(kDuplicate), 0) << "no stored block was sent again";
    ExpectUndisturbedText(*completed);
  }
}

TEST_F(FaultTest, PromptOfAKilledWorkerGoesOnWithTheLivingOne) {
  std::map<uint32_t, std::string> digests;  // by the layer that was gone on from
  for (int run = 0; run < FaultRuns(); ++run) {
    SCOPED_TRACE(absl::StrCat("run ", run));
    const uint32_t kill_at_layer = (6 + static_cast<uint32_t>(run)) % 9 + 1;
    const int victim = run % 2;
    bool killed = false;

    const auto completed = cluster_->Prefill(Request(), [&](const v1::PrefillResponse& event) {
      if (killed || !event.has_progress() || event.progress().layers_done() < kill_at_layer) return;
      killed = true;
      cluster_->worker(victim).Kill();
    });

    ASSERT_TRUE(killed) << "the prompt was too fast to be disturbed";
    ASSERT_TRUE(completed.ok()) << completed.status();
    EXPECT_EQ(completed->epoch(), 2u);
    EXPECT_EQ(completed->retries(), 1u);
    EXPECT_EQ(completed->plan().world_size(), 1u);
    EXPECT_EQ(completed->resume_layer() % kCheckpointLayers, 0u);
    EXPECT_LT(completed->resume_layer(), kLayers);
    if (kill_at_layer > 2 * kCheckpointLayers) {
      EXPECT_GE(completed->resume_layer(), kCheckpointLayers);
    }
    EXPECT_EQ(completed->kv_bytes(), undisturbed_.kv_bytes());
    EXPECT_EQ(completed->kv_blocks(), undisturbed_.kv_blocks());
    const auto same = digests.emplace(completed->resume_layer(), completed->kv_digest()).first;
    EXPECT_EQ(same->second, completed->kv_digest()) << "of the same layers by the same ranks";
    ExpectUndisturbedText(*completed);
    cluster_->StartWorker(victim);
    cluster_->WaitForMembers(2, 1);
  }
}

TEST_F(FaultTest, AFlippedBitIsDetectedAndTheBlockResent) {
  for (int run = 0; run < FaultRuns(); ++run) {
    SCOPED_TRACE(absl::StrCat("run ", run));
    const double corrupt_before = DecodeMetric(kCorrupt);
    const int flips_before = proxy_->flips_done();
    // Pieces of this size are payload all through: frame headers are a few bytes in 64 KiB.
    proxy_->FlipBitInNextPiece(32 << 10);

    const auto completed = cluster_->Prefill(Request());

    ASSERT_TRUE(completed.ok()) << completed.status();
    ASSERT_EQ(proxy_->flips_done(), flips_before + 1) << "no piece was large enough";
    EXPECT_EQ(DecodeMetric(kCorrupt), corrupt_before + 1);
    EXPECT_EQ(completed->kv_blocks_resent(), 1u);
    EXPECT_EQ(completed->kv_digest(), undisturbed_.kv_digest());
    ExpectUndisturbedText(*completed);
  }
}

}  // namespace
}  // namespace headwater::testing
