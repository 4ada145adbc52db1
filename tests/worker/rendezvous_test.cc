#include "worker/rendezvous.h"

#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "headwater/v1/worker.grpc.pb.h"
#include "tests/support/dial.h"
#include "tests/support/fake_clock.h"

namespace headwater {
namespace {

constexpr absl::Duration kPlenty = absl::Seconds(20);

class RendezvousTest : public testing::Test {
 protected:
  void StartWith(const RendezvousLimits& limits) {
    service_ = MakeRendezvousService(limits, &clock_);
    auto server = StartServer("127.0.0.1:0", {service_.get()});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    client_ = RendezvousClient::Dial(server_.address, nullptr);
  }
  ~RendezvousTest() override {
    if (server_.server != nullptr) server_.server->Shutdown(std::chrono::system_clock::now());
  }

  FakeClock clock_;
  std::unique_ptr<grpc::Service> service_;
  RunningServer server_;
  std::unique_ptr<RendezvousClient> client_;
};

TEST_F(RendezvousTest, GivesWhatWasPutAndKeepsTheFirstValue) {
  StartWith({});
  ASSERT_TRUE(client_->Put("k", "v", kPlenty).ok());

  EXPECT_EQ(client_->Get("k", kPlenty).value(), "v");
  EXPECT_TRUE(client_->Put("k", "v", kPlenty).ok());
  EXPECT_EQ(client_->Put("k", "other", kPlenty).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(client_->Get("k", kPlenty).value(), "v");
}

TEST_F(RendezvousTest, GetWaitsForThePut) {
  StartWith({});
  std::vector<std::thread> waiters;
  std::vector<absl::StatusOr<std::string>> got(20, absl::UnknownError(""));
  for (size_t i = 0; i < got.size(); ++i) {
    waiters.emplace_back([&, i] { got[i] = client_->Get(absl::StrCat("k", i % 2), kPlenty); });
  }

  ASSERT_TRUE(client_->Put("k0", "zero", kPlenty).ok());
  ASSERT_TRUE(client_->Put("k1", "one", kPlenty).ok());
  for (std::thread& waiter : waiters) waiter.join();

  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(got[i].ok()) << got[i].status();
    EXPECT_EQ(*got[i], i % 2 == 0 ? "zero" : "one");
  }
}

TEST_F(RendezvousTest, GetEndsAtItsDeadlineAndLeavesNothingBehind) {
  RendezvousLimits limits;
  limits.max_waiting = 1;
  StartWith(limits);
  EXPECT_EQ(client_->Get("never", absl::Milliseconds(50)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  std::thread put([&] { EXPECT_TRUE(client_->Put("k", "v", kPlenty).ok()); });
  // The place of the call that ended is free, at the latest when the server has noticed.
  absl::StatusOr<std::string> got = absl::UnknownError("");
  const absl::Time end = absl::Now() + kPlenty;
  while (!got.ok() && absl::Now() < end) got = client_->Get("k", kPlenty);
  put.join();
  EXPECT_EQ(got.value(), "v");
}

TEST_F(RendezvousTest, BoundsCallsThatWait) {
  RendezvousLimits limits;
  limits.max_waiting = 3;
  StartWith(limits);
  std::vector<std::thread> waiters;
  std::atomic<int> exhausted{0};
  for (int i = 0; i < 5; ++i) {
    waiters.emplace_back([&] {
      const auto got = client_->Get("k", kPlenty);
      if (absl::IsResourceExhausted(got.status())) ++exhausted;
    });
  }
  const absl::Time end = absl::Now() + kPlenty;
  while (exhausted < 2 && absl::Now() < end) std::this_thread::yield();
  ASSERT_TRUE(client_->Put("k", "v", kPlenty).ok());
  for (std::thread& waiter : waiters) waiter.join();

  EXPECT_EQ(exhausted, 2);
}

TEST_F(RendezvousTest, BoundsKeysAndForgetsThemAfterTheirLifetime) {
  RendezvousLimits limits;
  limits.max_keys = 2;
  limits.key_lifetime = absl::Seconds(10);
  StartWith(limits);
  ASSERT_TRUE(client_->Put("a", "1", kPlenty).ok());
  clock_.Advance(absl::Seconds(5));
  ASSERT_TRUE(client_->Put("b", "2", kPlenty).ok());
  EXPECT_EQ(client_->Put("c", "3", kPlenty).code(), absl::StatusCode::kResourceExhausted);

  clock_.Advance(absl::Seconds(6));

  EXPECT_TRUE(client_->Put("c", "3", kPlenty).ok());
  EXPECT_EQ(client_->Get("b", kPlenty).value(), "2");
  EXPECT_FALSE(client_->Get("a", absl::Milliseconds(50)).ok());
}

TEST_F(RendezvousTest, RefusesKeysAndValuesOverTheLimits) {
  StartWith({});
  const std::string long_key(257, 'k');
  EXPECT_EQ(client_->Put("", "v", kPlenty).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client_->Put(long_key, "v", kPlenty).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client_->Get(long_key, kPlenty).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client_->Put("k", std::string((64 << 10) + 1, 'v'), kPlenty).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(client_->Put("k", std::string(64 << 10, 'v'), kPlenty).ok());
}

TEST_F(RendezvousTest, RefusesAGetWithoutADeadline) {
  StartWith({});
  const auto stub = v1::RendezvousService::NewStub(DialPlaintext(server_.address));
  grpc::ClientContext context;
  v1::GetRequest request;
  request.set_key("k");
  v1::GetResponse response;

  EXPECT_EQ(stub->Get(&context, request, &response).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(RendezvousTest, AbortEndsACallThatWaitsAndAllLaterOnes) {
  StartWith({});
  absl::Status status;
  std::thread waiter([&] { status = client_->Get("k", kPlenty).status(); });

  client_->Abort();
  waiter.join();

  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(client_->Put("k", "v", kPlenty).code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace headwater
