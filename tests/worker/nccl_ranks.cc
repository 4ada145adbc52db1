#include "tests/worker/nccl_ranks.h"

#include <atomic>
#include <barrier>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "base/status_macros.h"

namespace headwater::testing {
namespace {

constexpr char kUntouched = '\x5A';

void ExpectCuda(cudaError_t error) { EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

}  // namespace

void OnTwoRanks(const std::function<void(int rank)>& body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      ExpectCuda(cudaSetDevice(rank));
      body(rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void Meet() {
  static std::barrier<> barrier(2);
  barrier.arrive_and_wait();
}

NcclOptions PairOptions(const std::string& name, int rank, absl::Duration timeout) {
  NcclOptions options;
  options.rank = rank;
  options.world_size = 2;
  options.device = rank;
  options.group_name = name;
  options.connect_timeout = absl::Seconds(60);
  options.timeout = timeout;
  return options;
}

NcclPair MakeNcclPair(const RendezvousServer& server, absl::Duration timeout) {
  static std::atomic<int> next{0};
  const std::string name = absl::StrCat("pair", next.fetch_add(1));
  NcclPair pair;
  OnTwoRanks([&](int rank) {
    const auto rendezvous = server.Dial();
    auto group = NcclGroup::Create(PairOptions(name, rank, timeout));
    ASSERT_TRUE(group.ok()) << group.status();
    ASSERT_EQ((*group)->Connect(rendezvous.get()), absl::OkStatus());
    pair.ranks[rank] = *std::move(group);
  });
  return pair;
}

Stream::Stream() { ExpectCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }

bool Stream::BecomesIdle(absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  cudaError_t state = cudaStreamQuery(stream_);
  while (state == cudaErrorNotReady && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(1));
    state = cudaStreamQuery(stream_);
  }
  return state == cudaSuccess;
}

PartsMemory::PartsMemory(const std::vector<uint64_t>& sizes) : sizes_(sizes) {
  uint64_t bytes = 1;
  for (const uint64_t size : sizes) bytes += size + 1;
  auto memory = DeviceBuffer::Allocate(bytes, "parts");
  EXPECT_TRUE(memory.ok()) << memory.status();
  if (!memory.ok()) return;
  memory_ = *std::move(memory);
  ExpectCuda(cudaMemset(memory_.data(), kUntouched, bytes));
  char* next = memory_.data() + 1;
  for (const uint64_t size : sizes) {
    parts_.push_back({next, size});
    next += size + 1;
  }
  ExpectCuda(cudaDeviceSynchronize());
}

std::vector<char> PartsMemory::Expected(uint32_t seed) const {
  std::vector<char> bytes(memory_.bytes(), kUntouched);
  size_t next = 1;
  for (const uint64_t size : sizes_) {
    // A linear congruential generator; its upper bits are the random ones.
    uint32_t state = seed * 2654435761u + static_cast<uint32_t>(next);
    for (uint64_t i = 0; i < size; ++i) {
      state = state * 1664525u + 1013904223u;
      bytes[next + i] = static_cast<char>(state >> 24);
    }
    next += size + 1;
  }
  return bytes;
}

void PartsMemory::Fill(uint32_t seed) {
  const std::vector<char> bytes = Expected(seed);
  ExpectCuda(cudaMemcpy(memory_.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  ExpectCuda(cudaDeviceSynchronize());
}

std::string PartsMemory::Difference(uint32_t seed) const {
  const std::vector<char> expected = Expected(seed);
  std::vector<char> found(memory_.bytes());
  ExpectCuda(cudaMemcpy(found.data(), memory_.data(), found.size(), cudaMemcpyDeviceToHost));
  if (found == expected) return "";
  size_t at = 0;
  while (found[at] == expected[at]) ++at;
  return absl::StrCat("byte ", at, " of ", found.size(), " is ", static_cast<int>(found[at]), ", not ",
                      static_cast<int>(expected[at]));
}

std::vector<DeviceParts> ForPeer(int rank, const DeviceParts& parts) {
  std::vector<DeviceParts> all(2);
  all[static_cast<size_t>(1 - rank)] = parts;
  return all;
}

absl::Status CheckUntilIdle(NcclGroup* group, const Stream& stream) {
  while (true) {
    HW_RETURN_IF_ERROR(group->Check());
    if (stream.BecomesIdle(absl::Milliseconds(1))) return group->Check();
  }
}

absl::Status CheckUntilError(NcclGroup* group, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (absl::Now() < deadline) {
    HW_RETURN_IF_ERROR(group->Check());
    absl::SleepFor(absl::Milliseconds(5));
  }
  return absl::OkStatus();
}

void ExpectThatANewGroupWorks(const RendezvousServer& server) {
  const NcclPair pair = MakeNcclPair(server, absl::Seconds(20));
  if (pair.ranks[0] == nullptr || pair.ranks[1] == nullptr) return;
  OnTwoRanks([&](int rank) {
    const std::vector<uint64_t> sizes = {1, 100'003};
    PartsMemory send(sizes), receive(sizes);
    send.Fill(static_cast<uint32_t>(rank));
    const Stream stream;
    Meet();
    EXPECT_EQ(pair.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                         "new group", stream.get()),
              absl::OkStatus());
    EXPECT_EQ(CheckUntilIdle(pair.ranks[rank].get(), stream), absl::OkStatus());
    EXPECT_EQ(receive.Difference(static_cast<uint32_t>(1 - rank)), "");
  });
}

}  // namespace headwater::testing
