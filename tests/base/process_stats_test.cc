#include "base/process_stats.h"

#include <cstdio>
#include <map>
#include <string>
#include <thread>

#include "gtest/gtest.h"

namespace headwater {
namespace {

std::map<std::string, double> Read() {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : ProcessStats().Collect()) {
    EXPECT_EQ(family.metric.size(), 1u) << family.name;
    const prometheus::ClientMetric& metric = family.metric.at(0);
    values[family.name] =
        family.type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  return values;
}

TEST(ProcessStatsTest, MovesWithWhatTheProcessDoes) {
  const std::map<std::string, double> before = Read();
  EXPECT_EQ(before.size(), 6u);
  constexpr size_t kBytes = size_t{64} << 20;
  const std::string touched(kBytes, 'x');
  std::FILE* const file = std::fopen("/proc/self/status", "r");
  ASSERT_NE(file, nullptr);
  volatile double sum = 0;
  std::map<std::string, double> after;
  std::thread other([&] {
    // Until the kernel has counted some of it.
    do {
      for (int i = 0; i < 10'000'000; ++i) sum = sum + i;
      after = Read();
    } while (after.at("process_cpu_seconds_total") < before.at("process_cpu_seconds_total") + 0.02);
  });
  other.join();
  std::fclose(file);
  EXPECT_EQ(touched[kBytes / 2], 'x');
  EXPECT_EQ(after.at("process_open_fds"), before.at("process_open_fds") + 1);
  EXPECT_EQ(after.at("process_threads"), before.at("process_threads") + 1);
  EXPECT_GE(after.at("process_resident_memory_bytes"),
            before.at("process_resident_memory_bytes") + kBytes * 0.9);
  EXPECT_GE(after.at("process_virtual_memory_bytes"), after.at("process_resident_memory_bytes"));
  EXPECT_GT(after.at("process_max_fds"), after.at("process_open_fds"));
}

}  // namespace
}  // namespace headwater
