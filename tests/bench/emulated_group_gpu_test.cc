#include "bench/emulated_group.h"

#include <cstdint>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "model/cuda/device_buffer.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater {
namespace {

TEST(EmulatedGroupTest, OthersSayWhatThisRankSays) {
  const auto group = MakeEmulatedCollectives(1, 3);
  EXPECT_EQ(group->rank(), 1);
  EXPECT_EQ(group->world_size(), 3);
  const int32_t own = 7;
  std::vector<int32_t> all(3);
  ASSERT_TRUE(group->AllGather(&own, sizeof own, all.data()).ok());
  EXPECT_THAT(all, ::testing::Each(7));
}

class EmulatedDeviceGroupTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kBytes = 1 << 20;

  DeviceBuffer Filled(uint64_t bytes, int value) {
    auto buffer = DeviceBuffer::Allocate(bytes, "a part");
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(cudaMemset(buffer->data(), value, bytes), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return *std::move(buffer);
  }
  std::vector<uint8_t> Read(const DeviceBuffer& buffer) {
    std::vector<uint8_t> bytes(buffer.bytes());
    EXPECT_EQ(cudaMemcpy(bytes.data(), buffer.data(), bytes.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    return bytes;
  }
};

TEST_F(EmulatedDeviceGroupTest, PartsOfTheSameSizeAreCopiesOthersNumbers) {
  HW_REQUIRE_SM90();
  auto group = MakeEmulatedDeviceGroup(0, 3, {1e12, 0});
  ASSERT_TRUE(group.ok()) << group.status();
  const DeviceBuffer own = Filled(kBytes, 0x11), same = Filled(kBytes, 0), other = Filled(kBytes / 2, 0);
  const std::vector<DeviceParts> send = {{}, {{own.data(), kBytes}}, {{own.data(), kBytes}}};
  const std::vector<DeviceParts> receive = {{}, {{same.data(), kBytes}}, {{other.data(), kBytes / 2}}};
  ASSERT_TRUE((*group)->Exchange(send, receive, "a test", nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_THAT(Read(same), ::testing::Each(0x11));
  const std::vector<uint8_t> numbers = Read(other);
  for (size_t i = 1; i < numbers.size(); i += 2) {
    ASSERT_EQ(numbers[i] & 0x7f, 0x3c) << i;  // bf16 of ordinary size
  }
}

TEST_F(EmulatedDeviceGroupTest, AnExchangeTakesTheLinksTime) {
  HW_REQUIRE_SM90();
  const DeviceBuffer own = Filled(kBytes, 1), a = Filled(kBytes, 0), b = Filled(kBytes, 0);
  const std::vector<DeviceParts> send = {{}, {{own.data(), kBytes}}, {}};
  const std::vector<DeviceParts> receive = {{}, {{a.data(), kBytes}}, {{b.data(), kBytes}}};
  // 2 MiB come in: 20 ms.
  auto group = MakeEmulatedDeviceGroup(0, 3, {2.0 * kBytes / 0.018, 0.002});
  ASSERT_TRUE(group.ok()) << group.status();
  ASSERT_TRUE((*group)->Exchange(send, receive, "a test", nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const absl::Time start = absl::Now();
  for (int i = 0; i < 5; ++i) ASSERT_TRUE((*group)->Exchange(send, receive, "a test", nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const absl::Duration took = absl::Now() - start;
  EXPECT_GE(took, absl::Milliseconds(100));
  EXPECT_LE(took, absl::Milliseconds(110));
}

}  // namespace
}  // namespace headwater
