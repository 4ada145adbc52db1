// Workers that leave on purpose: nobody's prompt notices (F19 of the reliability plan).
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
#include <signal.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/chaos_proxy.h"
#include "tests/integration/cluster.h"
#include "tests/support/health.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {
namespace {

constexpr int kLayers = 8;
constexpr absl::Duration kDrainTimeout = absl::Seconds(20);
// Of a worker that has nothing left to do.
constexpr absl::Duration kLeave = absl::Seconds(2);
constexpr absl::Duration kHealthFlip = absl::Milliseconds(100);

// Rolls over all workers.
int Rounds() {
  int rounds = 1;
  const char* text = std::getenv("HW_FAULT_RUNS");
  if (text != nullptr && (!absl::SimpleAtoi(text, &rounds) || rounds < 1))
    ADD_FAILURE() << "HW_FAULT_RUNS=" << text;
  return rounds;
}

class DrainTest : public ::testing::Test {
 protected:
  void Start(int workers, absl::Duration drain_timeout = kDrainTimeout) {
    const std::string model = MakeTempDirectory();
    WriteTinyModel(TinyModel{.layers = kLayers}, model);
    for (int i = 0; i < workers; ++i) health_.push_back(absl::StrCat("127.0.0.1:", PickFreePort()));
    ClusterOptions options;
    options.workers = workers;
    options.model_directory = model;
    options.worker_flags = {"--drain_timeout=" + absl::FormatDuration(drain_timeout)};
    options.flags_of_worker = [this](int index) {
      return std::vector<std::string>{"--health=" + health_[static_cast<size_t>(index)]};
    };
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

  void AskToLeave(int index, bool by_signal) {
    if (by_signal) {
      cluster_->worker(index).Signal(SIGTERM);
      return;
    }
    grpc::ClientContext context;
    v1::DrainWorkerRequest request;
    request.set_worker_id(absl::StrCat("w", index));
    v1::DrainWorkerResponse response;
    const absl::Status status = FromGrpcStatus(cluster_->admin().DrainWorker(&context, request, &response));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(response.worker().draining());
  }

  // Until its readiness is anything else than SERVING.
  absl::Duration TimeUntilNotReady(int index) {
    const absl::Time start = absl::Now();
    while (absl::Now() - start < absl::Seconds(5)) {
      if (AskHealth(health_[static_cast<size_t>(index)], "/readyz") != Health::kServing) break;
    }
    return absl::Now() - start;
  }

  // KV streams stop after a few kilobytes.
  void StallKv() {
    stall_at_ = proxy_->forwarded_bytes() + 4096;
    proxy_->LimitForwardedBytes(stall_at_);
  }

  // Waits until a worker's KV stream has stalled; the worker's index.
  int StalledWorker() {
    for (int i = 0; i < 2000; ++i) {
      if (proxy_->forwarded_bytes() < stall_at_) {
        absl::SleepFor(absl::Milliseconds(5));
        continue;
      }
      grpc::ClientContext context;
      v1::ListWorkersResponse response;
      EXPECT_TRUE(cluster_->admin().ListWorkers(&context, {}, &response).ok());
      for (int w = 0; w < response.workers_size(); ++w) {
        if (response.workers(w).num_requests() > 0) return w;
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
    ADD_FAILURE() << "no worker got the request";
    return 0;
  }

  std::vector<std::string> health_;
  uint64_t stall_at_ = 0;
  std::unique_ptr<ChaosProxy> proxy_;
  std::unique_ptr<Cluster> cluster_;
};

// Clients that prefill and release without a pause.
class Load {
 public:
  Load(Cluster* cluster, int clients) : cluster_(cluster) {
    for (int c = 0; c < clients; ++c) threads_.emplace_back([this, c] { Run(c); });
  }
  // The first failure; OK where there was none.
  absl::Status Stop() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    return failure_;
  }
  int completed() const { return completed_; }

 private:
  void Run(int client) {
    for (uint64_t i = 0; !stop_; ++i) {
      const uint64_t seed = 1000 * static_cast<uint64_t>(client) + i;
      // One worker's, and every third time all workers'.
      const int tokens = i % 3 == 2 ? 3000 : 200 + static_cast<int>(seed * 97 % 700);
      const auto completed = cluster_->Prefill(MakeRequest(RandomTokens(seed, tokens)));
      const absl::Status released =
          completed.ok() ? cluster_->Release(*completed).status() : absl::OkStatus();
      const std::lock_guard<std::mutex> lock(mutex_);
      ++completed_;
      if (failure_.ok()) failure_ = completed.ok() ? released : completed.status();
    }
  }

  Cluster* const cluster_;
  std::atomic<bool> stop_{false};
  std::atomic<int> completed_{0};
  std::mutex mutex_;
  absl::Status failure_;
  std::vector<std::thread> threads_;
};

TEST_F(DrainTest, ARollingRestartUnderLoadFailsNoRequest) {
  constexpr int kWorkers = 3;
  Start(kWorkers);
  Load load(cluster_.get(), 3);
  std::vector<absl::Duration> flips;
  absl::Duration longest;
  for (int round = 0; round < Rounds(); ++round) {
    for (int i = 0; i < kWorkers; ++i) {
      SCOPED_TRACE(absl::StrCat("round ", round, ", worker ", i));
      const int before = load.completed();
      const absl::Time start = absl::Now();
      AskToLeave(i, (round + i) % 2 == 0);
      flips.push_back(TimeUntilNotReady(i));
      EXPECT_EQ(cluster_->worker(i).Wait(kDrainTimeout + kLeave), 0);
      longest = std::max(longest, absl::Now() - start);
      cluster_->StartWorker(i);
      cluster_->WaitForMembers(kWorkers, 1);
      while (load.completed() < before + 5) absl::SleepFor(absl::Milliseconds(10));
    }
  }
  const absl::Status failure = load.Stop();
  EXPECT_TRUE(failure.ok()) << failure;
  std::sort(flips.begin(), flips.end());
  // The median: one poll of a loaded machine may be late.
  EXPECT_LE(flips[flips.size() / 2], kHealthFlip);
  std::printf("%d requests, %zu drains: not ready after %s (median; most %s), gone after %s at most\n",
              load.completed(), flips.size(), absl::FormatDuration(flips[flips.size() / 2]).c_str(),
              absl::FormatDuration(flips.back()).c_str(), absl::FormatDuration(longest).c_str());
}

TEST_F(DrainTest, WaitsUntilTheKvStreamIsAcknowledged) {
  Start(1);
  StallKv();
  absl::StatusOr<v1::PrefillCompleted> completed = absl::UnknownError("not run");
  std::thread client([&] { completed = cluster_->Prefill(MakeRequest(RandomTokens(1, 600))); });
  StalledWorker();
  AskToLeave(0, true);
  EXPECT_FALSE(cluster_->worker(0).Wait(absl::Seconds(2)).has_value()) << "KV is not acknowledged";
  EXPECT_NE(AskHealth(health_[0], "/readyz"), Health::kServing);
  proxy_->LimitForwardedBytes(UINT64_MAX);
  client.join();
  EXPECT_EQ(cluster_->worker(0).Wait(kLeave), 0);
  ASSERT_TRUE(completed.ok()) << completed.status();
  EXPECT_EQ(completed->epoch(), 1u);
  const auto tokens = cluster_->Generate(*completed, 2);
  EXPECT_TRUE(tokens.ok()) << tokens.status();
}

TEST_F(DrainTest, ASignalDuringAnAskedDrainIsPatientAndASecondOneIsNot) {
  Start(1);
  StallKv();
  std::thread client([&] { static_cast<void>(cluster_->Prefill(MakeRequest(RandomTokens(1, 600)))); });
  StalledWorker();
  AskToLeave(0, false);
  EXPECT_LT(TimeUntilNotReady(0), absl::Seconds(5));
  cluster_->worker(0).Signal(SIGTERM);
  EXPECT_FALSE(cluster_->worker(0).Wait(absl::Seconds(1)).has_value()) << "what a pod's end sends";
  cluster_->worker(0).Signal(SIGTERM);
  EXPECT_EQ(cluster_->worker(0).Wait(absl::Seconds(2)), 75);
  proxy_->LimitForwardedBytes(UINT64_MAX);
  cluster_->StartWorker(0);
  client.join();
}

TEST_F(DrainTest, WhatIsCutExits75AndItsPromptGoesOnElsewhere) {
  Start(2, absl::Milliseconds(500));
  StallKv();
  absl::StatusOr<v1::PrefillCompleted> completed = absl::UnknownError("not run");
  std::thread client([&] { completed = cluster_->Prefill(MakeRequest(RandomTokens(1, 600))); });
  const int busy = StalledWorker();
  AskToLeave(busy, false);
  EXPECT_EQ(cluster_->worker(busy).Wait(absl::Milliseconds(500) + kLeave), 75);
  proxy_->LimitForwardedBytes(UINT64_MAX);
  client.join();
  ASSERT_TRUE(completed.ok()) << completed.status();
  EXPECT_GE(completed->epoch(), 2u);
}

}  // namespace
}  // namespace headwater::testing
