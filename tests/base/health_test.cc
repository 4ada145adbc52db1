#include "base/health.h"

#include <atomic>

#include "gtest/gtest.h"

#include "tests/support/http.h"

namespace headwater::testing {
namespace {

TEST(HealthPortTest, SaysWhatTheProbesSay) {
  std::atomic<bool> live{true}, ready{false};
  const auto port =
      HealthPort::Start("127.0.0.1:0", {[&] { return live.load(); }, [&] { return ready.load(); }});
  ASSERT_TRUE(port.ok()) << port.status();
  const std::string& address = (*port)->address();
  EXPECT_EQ(GetHttp(address, "/livez").status, 200);
  EXPECT_EQ(GetHttp(address, "/readyz").status, 503);
  EXPECT_EQ(GetHttp(address, "/readyz").body, "not ready\n");
  EXPECT_EQ(GetHttp(address, "/").status, 404);
  EXPECT_EQ(GetHttp(address, "/metrics").status, 404);
  ready = true;
  EXPECT_EQ(GetHttp(address, "/readyz?verbose=1").status, 200);
  EXPECT_EQ(GetHttp(address, "/readyz", "HEAD").body, "");
  live = false;
  EXPECT_EQ(GetHttp(address, "/livez").status, 503);
  EXPECT_EQ(GetHttp(address, "/livez").body, "not live\n");
  EXPECT_EQ(GetHttp(address, "/readyz").status, 200);
}

TEST(HealthPortTest, LeavingIsToldAtOnceAndForGood) {
  std::atomic<bool> ready{true};
  const auto port = HealthPort::Start("127.0.0.1:0", {[] { return true; }, [&] { return ready.load(); }});
  ASSERT_TRUE(port.ok()) << port.status();
  EXPECT_EQ(GetHttp((*port)->address(), "/readyz").status, 200);
  (*port)->Leave();
  EXPECT_EQ(GetHttp((*port)->address(), "/readyz").status, 503);
  ready = false;
  ready = true;
  EXPECT_EQ(GetHttp((*port)->address(), "/readyz").status, 503);
  EXPECT_EQ(GetHttp((*port)->address(), "/livez").status, 200);
}

TEST(HealthPortTest, NoneWhereThereIsNoAddressAndAnErrorWhereItIsTaken) {
  const HealthPort::Probes probes = {[] { return true; }, [] { return true; }};
  const auto none = HealthPort::Start("", probes);
  ASSERT_TRUE(none.ok());
  (*none)->Leave();
  EXPECT_EQ((*none)->address(), "");
  const auto first = HealthPort::Start("127.0.0.1:0", probes);
  ASSERT_TRUE(first.ok());
  const auto second = HealthPort::Start((*first)->address(), probes);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(second.status().message(),
            absl::StrCat("health address ", (*first)->address(), " cannot be bound"));
}

}  // namespace
}  // namespace headwater::testing
