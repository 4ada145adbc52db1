#include "decode/registry_client.h"

#include <atomic>
#include <thread>

#include "gtest/gtest.h"

#include "tests/decode/fake_coordinator.h"

namespace headwater::testing {
namespace {

class RegistryClientTest : public ::testing::Test {
 protected:
  RegistryClient::Options MakeOptions() {
    RegistryClient::Options options;
    options.coordinator = coordinator_.address();
    options.registration.set_decode_node("d0");
    options.registration.set_kv_budget_bytes(123);
    options.heartbeat = [this] {
      v1::DecodeHeartbeat heartbeat;
      heartbeat.set_sessions(++beats_);
      return heartbeat;
    };
    options.max_backoff = absl::Milliseconds(200);
    options.metrics = &metrics_;
    return options;
  }
  static bool WaitConnected(const RegistryClient& client, bool connected) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (client.connected() != connected && std::chrono::steady_clock::now() < end)
      std::this_thread::yield();
    return client.connected() == connected;
  }

  FakeCoordinator coordinator_;
  Metrics metrics_{"test"};
  std::atomic<uint32_t> beats_{0};
};

TEST_F(RegistryClientTest, RegistersAndSendsHeartbeats) {
  const auto client = RegistryClient::Start(MakeOptions());

  ASSERT_TRUE(coordinator_.WaitForHeartbeats(3));

  EXPECT_TRUE(client->connected());
  ASSERT_EQ(coordinator_.registrations().size(), 1u);
  EXPECT_EQ(coordinator_.registrations()[0].decode_node(), "d0");
  EXPECT_EQ(coordinator_.registrations()[0].kv_budget_bytes(), 123u);
  const auto heartbeats = coordinator_.heartbeats();
  EXPECT_EQ(heartbeats[0].sessions(), 1u);
  EXPECT_EQ(heartbeats[2].sessions(), 3u);
}

TEST_F(RegistryClientTest, RegistersAgainAfterTheCoordinatorRestarts) {
  const auto client = RegistryClient::Start(MakeOptions());
  ASSERT_TRUE(coordinator_.WaitForHeartbeats(1));

  for (size_t restart = 1; restart <= 2; ++restart) {
    coordinator_.Stop();
    EXPECT_TRUE(WaitConnected(*client, false));
    coordinator_.Start();
    ASSERT_TRUE(coordinator_.WaitForRegistrations(restart + 1));
    EXPECT_TRUE(WaitConnected(*client, true));
  }
}

TEST_F(RegistryClientTest, WaitsForACoordinatorThatStartsLater) {
  const RegistryClient::Options options = MakeOptions();
  coordinator_.Stop();

  const auto client = RegistryClient::Start(options);
  EXPECT_FALSE(client->connected());
  coordinator_.Start();

  EXPECT_TRUE(coordinator_.WaitForRegistrations(1));
}

TEST_F(RegistryClientTest, TriesAgainWhenItIsRefused) {
  coordinator_.Refuse(grpc::Status(grpc::StatusCode::ALREADY_EXISTS, "d0 is taken"));
  const auto client = RegistryClient::Start(MakeOptions());
  ASSERT_TRUE(coordinator_.WaitForRegistrations(3));
  EXPECT_FALSE(client->connected());

  coordinator_.Refuse(grpc::Status::OK);

  EXPECT_TRUE(WaitConnected(*client, true));
}

TEST_F(RegistryClientTest, TriesAgainWhenNothingIsAnswered) {
  RegistryClient::Options options = MakeOptions();
  options.answer_timeout = absl::Milliseconds(300);
  coordinator_.KeepSilent(true);
  const auto client = RegistryClient::Start(options);
  ASSERT_TRUE(coordinator_.WaitForRegistrations(2));
  EXPECT_FALSE(client->connected());

  coordinator_.KeepSilent(false);

  EXPECT_TRUE(WaitConnected(*client, true));
}

TEST_F(RegistryClientTest, ItsEndEndsTheStreamSoon) {
  auto client = RegistryClient::Start(MakeOptions());
  ASSERT_TRUE(coordinator_.WaitForHeartbeats(1));

  const auto start = std::chrono::steady_clock::now();
  client = nullptr;

  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_TRUE(coordinator_.WaitForStreamsEnded(1));
}

}  // namespace
}  // namespace headwater::testing
