// Groups over two GPUs: what they carry.
#include "worker/cuda/nccl_group.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/worker/nccl_ranks.h"

namespace headwater::testing {
namespace {

constexpr absl::Duration kPlenty = absl::Seconds(20);

#define HW_ASSERT_PAIR(pair) ASSERT_TRUE((pair).ranks[0] != nullptr && (pair).ranks[1] != nullptr)

void CUDART_CB SleepTwoSeconds(void* /*unused*/) { std::this_thread::sleep_for(std::chrono::seconds(2)); }

TEST(NcclGroupGpuTest, MovesPartsOfAllSizesBothWays) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const NcclPair pair = MakeNcclPair(server, kPlenty);
  HW_ASSERT_PAIR(pair);
  const std::vector<std::vector<uint64_t>> cases[] = {
      // What rank 0 sends, what rank 1 sends.
      {{1}, {1}},     {{1, 0, 17, 4097, 1 << 20, 64 << 20, 3}, {0, 5, 999'999, (64 << 20) - 1}},
      {{}, {12'345}}, {{64 << 20}, {}},
      {{0, 0}, {0}},  {std::vector<uint64_t>(40, 1001), std::vector<uint64_t>(24, 65'537)},
  };
  for (const auto& sizes : cases) {
    OnTwoRanks([&](int rank) {
      PartsMemory send(sizes[static_cast<size_t>(rank)]), receive(sizes[static_cast<size_t>(1 - rank)]);
      send.Fill(static_cast<uint32_t>(rank + 1));
      const Stream stream;
      Meet();

      ASSERT_EQ(pair.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                           "parts", stream.get()),
                absl::OkStatus());

      EXPECT_EQ(CheckUntilIdle(pair.ranks[rank].get(), stream), absl::OkStatus());
      EXPECT_EQ(receive.Difference(static_cast<uint32_t>(2 - rank)), "") << "rank " << rank;
      EXPECT_EQ(send.Difference(static_cast<uint32_t>(rank + 1)), "") << "rank " << rank;
    });
  }
}

// Every round sends what the stream has just written and keeps what came; more rounds than a group takes at
// once, with nobody calling Check().
TEST(NcclGroupGpuTest, KeepsToTheOrderOfTheStream) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const NcclPair pair = MakeNcclPair(server, kPlenty);
  HW_ASSERT_PAIR(pair);
  constexpr size_t kBytes = 3 << 20;
  for (const int rounds : {50, 200}) {
    OnTwoRanks([&](int rank) {
      PartsMemory send({kBytes}), receive({kBytes}), work({64 << 20}), kept({static_cast<uint64_t>(rounds)});
      const Stream stream;
      Meet();
      for (int round = 0; round < rounds; ++round) {
        ASSERT_EQ(cudaMemsetAsync(work.parts()[0].data, round, work.parts()[0].bytes, stream.get()),
                  cudaSuccess);
        ASSERT_EQ(cudaMemsetAsync(send.parts()[0].data, (2 * round + rank) % 251, kBytes, stream.get()),
                  cudaSuccess);
        ASSERT_EQ(pair.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                             "round", stream.get()),
                  absl::OkStatus());
        const char* const from = receive.parts()[0].data + (round % 2 == 0 ? 0 : kBytes - 1);
        ASSERT_EQ(
            cudaMemcpyAsync(kept.parts()[0].data + round, from, 1, cudaMemcpyDeviceToDevice, stream.get()),
            cudaSuccess);
      }
      EXPECT_EQ(CheckUntilIdle(pair.ranks[rank].get(), stream), absl::OkStatus());
      std::vector<unsigned char> found(static_cast<size_t>(rounds));
      ASSERT_EQ(cudaMemcpy(found.data(), kept.parts()[0].data, found.size(), cudaMemcpyDeviceToHost),
                cudaSuccess);
      for (int round = 0; round < rounds; ++round) {
        ASSERT_EQ(found[static_cast<size_t>(round)], (2 * round + 1 - rank) % 251) << "rank " << rank;
      }
    });
  }
}

// The stream needs longer than the timeout to come to the operations.
TEST(NcclGroupGpuTest, CountsFromWhenTheStreamHasComeToAnOperation) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const NcclPair pair = MakeNcclPair(server, absl::Seconds(1));
  HW_ASSERT_PAIR(pair);
  OnTwoRanks([&](int rank) {
    PartsMemory send({1000}), receive({1000});
    send.Fill(static_cast<uint32_t>(rank));
    const Stream stream;
    Meet();
    ASSERT_EQ(cudaLaunchHostFunc(stream.get(), SleepTwoSeconds, nullptr), cudaSuccess);
    const absl::Time start = absl::Now();

    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(pair.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                           "late", stream.get()),
                absl::OkStatus());
    }

    EXPECT_LT(absl::Now() - start, absl::Milliseconds(1000)) << "Exchange() waited for the stream";
    EXPECT_EQ(CheckUntilIdle(pair.ranks[rank].get(), stream), absl::OkStatus());
    EXPECT_EQ(receive.Difference(static_cast<uint32_t>(1 - rank)), "");
  });
}

TEST(NcclGroupGpuTest, APeerMayComeLateWithinTheTimeout) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const NcclPair pair = MakeNcclPair(server, absl::Seconds(3));
  HW_ASSERT_PAIR(pair);
  OnTwoRanks([&](int rank) {
    PartsMemory send({1 << 20}), receive({1 << 20});
    send.Fill(static_cast<uint32_t>(rank));
    const Stream stream;
    Meet();
    if (rank == 1) absl::SleepFor(absl::Seconds(1));
    ASSERT_EQ(pair.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                         "late peer", stream.get()),
              absl::OkStatus());
    EXPECT_EQ(CheckUntilIdle(pair.ranks[rank].get(), stream), absl::OkStatus());
    EXPECT_EQ(receive.Difference(static_cast<uint32_t>(1 - rank)), "");
  });
}

// As where the ranks of a group split: two groups of the same devices, used in turn; the end of one is not
// the other's.
TEST(NcclGroupGpuTest, SeveralGroupsOfAProcessKeepApart) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const NcclPair first = MakeNcclPair(server, kPlenty);
  const NcclPair second = MakeNcclPair(server, kPlenty);
  HW_ASSERT_PAIR(first);
  HW_ASSERT_PAIR(second);
  OnTwoRanks([&](int rank) {
    PartsMemory send({10'000}), receive({10'000}), also({10'000});
    send.Fill(static_cast<uint32_t>(rank));
    const Stream stream;
    Meet();
    for (int i = 0; i < 10; ++i) {
      ASSERT_EQ(first.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                            "first", stream.get()),
                absl::OkStatus());
      ASSERT_EQ(second.ranks[rank]->Exchange(ForPeer(rank, receive.parts()), ForPeer(rank, also.parts()),
                                             "second", stream.get()),
                absl::OkStatus());
    }
    EXPECT_EQ(CheckUntilIdle(first.ranks[rank].get(), stream), absl::OkStatus());
    EXPECT_EQ(CheckUntilIdle(second.ranks[rank].get(), stream), absl::OkStatus());
    EXPECT_EQ(receive.Difference(static_cast<uint32_t>(1 - rank)), "");
    // What this rank sent came back.
    EXPECT_EQ(also.Difference(static_cast<uint32_t>(rank)), "");
  });

  first.ranks[0]->Abort();

  OnTwoRanks([&](int rank) {
    PartsMemory send({10'000}), receive({10'000});
    send.Fill(static_cast<uint32_t>(rank));
    const Stream stream;
    Meet();
    ASSERT_EQ(second.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                           "second", stream.get()),
              absl::OkStatus());
    EXPECT_EQ(CheckUntilIdle(second.ranks[rank].get(), stream), absl::OkStatus());
    EXPECT_EQ(receive.Difference(static_cast<uint32_t>(1 - rank)), "");
  });
}

uint64_t FreeDeviceBytes(int device) {
  size_t free = 0, total = 0;
  EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  return free;
}

TEST(NcclGroupGpuTest, TwentyGroupsLeaveNoDeviceMemoryBehind) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  // What is made once for a process.
  ExpectThatANewGroupWorks(server);
  ExpectThatANewGroupWorks(server);
  const uint64_t before[] = {FreeDeviceBytes(0), FreeDeviceBytes(1)};
  const absl::Time start = absl::Now();

  for (int i = 0; i < 20; ++i) {
    ExpectThatANewGroupWorks(server);
    if (::testing::Test::HasFailure()) return;
  }

  std::printf("[ measured ] a group takes %s to form, use and end\n",
              absl::FormatDuration((absl::Now() - start) / 20).c_str());
  for (int device = 0; device < 2; ++device) {
    const uint64_t after = FreeDeviceBytes(device);
    EXPECT_LE(before[device] - std::min(before[device], after), 64 << 20) << "device " << device;
    std::printf("[ measured ] device %d: %lld bytes fewer are free\n", device,
                static_cast<long long>(before[device]) - static_cast<long long>(after));
  }
}

}  // namespace
}  // namespace headwater::testing
