#include "base/rpc/server.h"

#include <set>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

#include "headwater/v1/prefill.grpc.pb.h"

namespace headwater {
namespace {

TEST(StartServerTest, PortZeroTakesAFreePort) {
  v1::PrefillService::Service service;
  auto running = StartServer("127.0.0.1:0", {&service});

  ASSERT_TRUE(running.ok()) << running.status();
  EXPECT_GT(running->port, 0);
  EXPECT_TRUE(absl::EndsWith(running->address, std::to_string(running->port)));
}

TEST(StartServerTest, PortInUseIsNamed) {
  v1::PrefillService::Service service;
  auto first = StartServer("127.0.0.1:0", {&service});
  ASSERT_TRUE(first.ok()) << first.status();

  auto second = StartServer(first->address, {&service});

  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(second.status().message(), first->address)) << second.status();
}

TEST(StartServerTest, APortThatIsNoneIsNamed) {
  const auto server = StartServer("127.0.0.1:99999", {});

  EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(server.status().message(), "127.0.0.1:99999")) << server.status();
}

TEST(RandomIdTest, IdsAre32HexDigitsAndDiffer) {
  std::set<std::string> ids;
  for (int i = 0; i < 100; ++i) ids.insert(RandomId());

  EXPECT_EQ(ids.size(), 100u);
  for (const std::string& id : ids) {
    EXPECT_EQ(id.size(), 32u);
    EXPECT_EQ(id.find_first_not_of("0123456789abcdef"), std::string::npos);
  }
}

}  // namespace
}  // namespace headwater
