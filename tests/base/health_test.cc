#include "base/rpc/health.h"

#include <atomic>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "tests/support/health.h"

namespace headwater {
namespace {

using ::headwater::testing::AskHealth;
using ::headwater::testing::Health;

bool Becomes(const std::string& address, const std::string& service, Health wanted) {
  for (int i = 0; i < 30; ++i) {
    if (AskHealth(address, service) == wanted) return true;
    absl::SleepFor(absl::Milliseconds(50));
  }
  return false;
}

TEST(HealthPortTest, SaysWhatTheProbesSay) {
  std::atomic<bool> live{true}, ready{false};
  const auto port =
      HealthPort::Start("127.0.0.1:0", {[&] { return live.load(); }, [&] { return ready.load(); }});
  ASSERT_TRUE(port.ok()) << port.status();
  const std::string& address = (*port)->address();
  EXPECT_EQ(AskHealth(address, "liveness"), Health::kServing);
  EXPECT_EQ(AskHealth(address, "readiness"), Health::kNotServing);
  EXPECT_EQ(AskHealth(address, ""), Health::kNotServing);
  EXPECT_EQ(AskHealth(address, "nonsense"), Health::kUnknown);
  ready = true;
  EXPECT_TRUE(Becomes(address, "readiness", Health::kServing));
  EXPECT_TRUE(Becomes(address, "", Health::kServing));
  live = false;
  EXPECT_TRUE(Becomes(address, "liveness", Health::kNotServing));
}

TEST(HealthPortTest, LeavingIsToldAtOnceAndForGood) {
  const auto port = HealthPort::Start("127.0.0.1:0", {[] { return true; }, [] { return true; }});
  ASSERT_TRUE(port.ok()) << port.status();
  EXPECT_EQ(AskHealth((*port)->address(), "readiness"), Health::kServing);
  (*port)->Leave();
  EXPECT_EQ(AskHealth((*port)->address(), "readiness"), Health::kNotServing);
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_EQ(AskHealth((*port)->address(), "readiness"), Health::kNotServing);
  EXPECT_EQ(AskHealth((*port)->address(), "liveness"), Health::kServing);
}

TEST(HealthPortTest, NoneWhereThereIsNoAddressAndAnErrorWhereItIsTaken) {
  const auto none = HealthPort::Start("", {[] { return true; }, [] { return true; }});
  ASSERT_TRUE(none.ok());
  (*none)->Leave();
  const auto first = HealthPort::Start("127.0.0.1:0", {[] { return true; }, [] { return true; }});
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(
      HealthPort::Start((*first)->address(), {[] { return true; }, [] { return true; }}).status().code(),
      absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace headwater
