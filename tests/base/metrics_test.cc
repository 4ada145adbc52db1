#include "base/metrics.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <unistd.h>

#include "tests/support/http.h"

namespace headwater {
namespace {

TEST(MetricsTest, AskingTwiceForTheSameNameAndLabelsGivesTheSameMetric) {
  Metrics metrics("test");

  prometheus::Counter& first = metrics.Counter("headwater_things_total", "Things.", {{"kind", "a"}});
  prometheus::Counter& again = metrics.Counter("headwater_things_total", "Things.", {{"kind", "a"}});
  prometheus::Counter& other = metrics.Counter("headwater_things_total", "Things.", {{"kind", "b"}});
  first.Increment(2);

  EXPECT_EQ(&first, &again);
  EXPECT_EQ(again.Value(), 2);
  EXPECT_EQ(other.Value(), 0);
}

TEST(MetricsTest, ServeNamesAnAddressThatCannotBeBound) {
  Metrics metrics("test");

  const absl::Status status = metrics.Serve("203.0.113.1:9");

  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(status.message(), "203.0.113.1:9")) << status;
}

TEST(MetricsTest, ServesWhatWasCountedBesideClientsThatSayNothing) {
  const int port = testing::FreePort();
  const std::string address = absl::StrCat("127.0.0.1:", port);
  Metrics metrics("test");
  metrics.Counter("headwater_things_total", "Things.", {{"kind", "a"}}).Increment(3);
  ASSERT_TRUE(metrics.Serve(address).ok());

  const int silent[] = {testing::ConnectHttp(address), testing::ConnectHttp(address)};
  const absl::Time begin = absl::Now();
  const testing::HttpResponse response = testing::GetHttp(address, "/metrics");
  EXPECT_LE(absl::Now() - begin, absl::Seconds(1));
  for (const int fd : silent) close(fd);

  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
  EXPECT_TRUE(absl::StrContains(response.body, "headwater_things_total{kind=\"a\"} 3\n")) << response.body;
  EXPECT_TRUE(absl::StrContains(response.body, "process_open_fds ")) << response.body;
  EXPECT_EQ(testing::GetHttp(address, "/").status, 404);
}

TEST(MetricsTest, EmptyAddressServesNothing) { EXPECT_TRUE(Metrics("test").Serve("").ok()); }

}  // namespace
}  // namespace headwater
