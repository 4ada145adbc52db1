#include "base/metrics.h"

#include "absl/strings/match.h"
#include "gtest/gtest.h"

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

TEST(MetricsTest, EmptyAddressServesNothing) { EXPECT_TRUE(Metrics("test").Serve("").ok()); }

}  // namespace
}  // namespace headwater
