#include "worker/memory_budget.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

namespace headwater {
namespace {

class MemoryBudgetTest : public testing::Test {
 protected:
  MemoryBudgetTest() {
    char name[] = "/tmp/hw_budget_XXXXXX";
    root_ = mkdtemp(name);
    Write("/proc/meminfo", "MemTotal:       8000 kB\nMemAvailable:    4000 kB\n");
  }
  ~MemoryBudgetTest() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  uint64_t Available() {
    const auto bytes = AvailableMemoryBytes(root_);
    EXPECT_TRUE(bytes.ok()) << bytes.status();
    return bytes.value_or(0);
  }

  std::string root_;
};

TEST_F(MemoryBudgetTest, IsWhatTheMachineHasWhenNoGroupLimitsIt) {
  EXPECT_EQ(Available(), 4000u << 10);
  Write("/proc/self/cgroup", "0::/a/b\n");
  Write("/sys/fs/cgroup/a/memory.max", "max\n");
  EXPECT_EQ(Available(), 4000u << 10);
}

TEST_F(MemoryBudgetTest, IsWhatTheTightestGroupAboveLeaves) {
  Write("/proc/self/cgroup", "0::/a/b\n");
  Write("/sys/fs/cgroup/a/memory.max", "1000000\n");
  Write("/sys/fs/cgroup/a/memory.current", "400000\n");
  Write("/sys/fs/cgroup/a/b/memory.max", "max\n");
  EXPECT_EQ(Available(), 600000u);

  Write("/sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 100000\n");
  EXPECT_EQ(Available(), 700000u);
  Write("/sys/fs/cgroup/a/memory.current", "2000000\n");
  EXPECT_EQ(Available(), 0u);
}

TEST_F(MemoryBudgetTest, KnowsVersionOneGroups) {
  Write("/proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/1\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  Write("/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "500000\n");
  Write("/sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", "100000\n");
  Write("/sys/fs/cgroup/memory/docker/1/memory.stat", "inactive_file 7\ntotal_inactive_file 50000\n");
  EXPECT_EQ(Available(), 450000u);
}

TEST_F(MemoryBudgetTest, SaysWhenTheSystemDoesNotTell) {
  std::filesystem::remove_all(root_ + "/proc");
  EXPECT_EQ(AvailableMemoryBytes(root_).status().code(), absl::StatusCode::kUnavailable);
}

TEST(MemoryBudgetOfThisMachineTest, IsPositive) {
  const auto bytes = AvailableMemoryBytes();
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_GT(*bytes, uint64_t{1} << 20);
}

}  // namespace
}  // namespace headwater
