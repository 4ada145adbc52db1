// Groups over two GPUs: peers that stay away, go or die, and who gives up. After each of these, another group
// of the same process must work.
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/worker/nccl_ranks.h"
#include "worker/cuda/nccl_group.h"

namespace headwater::testing {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;

#define HW_ASSERT_PAIR(pair) ASSERT_TRUE((pair).ranks[0] != nullptr && (pair).ranks[1] != nullptr)

TEST(NcclFaultGpuTest, EndsAtTheDeadlineWhenAPeerNeverExchanges) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  {
    const NcclPair pair = MakeNcclPair(server, absl::Seconds(1));
    HW_ASSERT_PAIR(pair);
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    NcclGroup* const group = pair.ranks[0].get();
    const PartsMemory send({1000}), receive({1000});
    const Stream stream;
    const absl::Time start = absl::Now();

    ASSERT_EQ(group->Exchange(ForPeer(0, send.parts()), ForPeer(0, receive.parts()), "lonely", stream.get()),
              absl::OkStatus());
    const absl::Duration enqueued = absl::Now() - start;
    const absl::Status status = CheckUntilError(group, absl::Seconds(10));
    const absl::Duration ended = absl::Now() - start;

    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("rank 0 of 2"), HasSubstr("lonely"), HasSubstr("1s")));
    EXPECT_LT(enqueued, absl::Milliseconds(500));
    EXPECT_GE(ended, absl::Milliseconds(990));
    EXPECT_LE(ended, absl::Milliseconds(1500));
    EXPECT_TRUE(stream.BecomesIdle(absl::Seconds(2)));
    EXPECT_EQ(group->Exchange(ForPeer(0, send.parts()), ForPeer(0, receive.parts()), "after", stream.get()),
              status);
    EXPECT_EQ(group->Check(), status);
    group->Abort();
    EXPECT_EQ(group->Check(), status);
  }
  ExpectThatANewGroupWorks(server);
}

TEST(NcclFaultGpuTest, AbortFromAnotherThreadEndsAnExchange) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  {
    const NcclPair pair = MakeNcclPair(server, absl::Seconds(60));
    HW_ASSERT_PAIR(pair);
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    NcclGroup* const group = pair.ranks[0].get();
    const PartsMemory send({1 << 20}), receive({1 << 20});
    const Stream stream;
    ASSERT_EQ(group->Exchange(ForPeer(0, send.parts()), ForPeer(0, receive.parts()), "lonely", stream.get()),
              absl::OkStatus());
    EXPECT_EQ(CheckUntilError(group, absl::Milliseconds(300)), absl::OkStatus());
    absl::Time aborted;
    std::thread aborter([&] {
      absl::SleepFor(absl::Milliseconds(300));
      aborted = absl::Now();
      group->Abort();
    });

    const absl::Status status = CheckUntilError(group, absl::Seconds(10));
    const absl::Time ended = absl::Now();
    aborter.join();

    EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
    EXPECT_LE(ended - aborted, absl::Seconds(1));
    EXPECT_TRUE(stream.BecomesIdle(absl::Seconds(2)));
    EXPECT_EQ(group->Exchange({}, {}, "after", stream.get()), status);
  }
  ExpectThatANewGroupWorks(server);
}

// The aborts come at any point of an exchange, also while it is being launched.
TEST(NcclFaultGpuTest, AbortMayComeAtAnyTime) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  for (int i = 0; i < 8; ++i) {
    const NcclPair pair = MakeNcclPair(server, absl::Seconds(60));
    HW_ASSERT_PAIR(pair);
    std::thread aborter([&] {
      absl::SleepFor(absl::Microseconds(3000 + 777 * i));
      pair.ranks[0]->Abort();
      pair.ranks[1]->Abort();
    });
    OnTwoRanks([&](int rank) {
      const PartsMemory send({200'000}), receive({200'000});
      const Stream stream;
      Meet();
      absl::Status status;
      while (status.ok()) {
        status = pair.ranks[rank]->Exchange(ForPeer(rank, send.parts()), ForPeer(rank, receive.parts()),
                                            "endless", stream.get());
        if (status.ok()) status = pair.ranks[rank]->Check();
      }
      EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
      EXPECT_TRUE(stream.BecomesIdle(absl::Seconds(5)));
      Meet();
    });
    aborter.join();
  }
  ExpectThatANewGroupWorks(server);
}

TEST(NcclFaultGpuTest, DestroyingAGroupEndsWhatIsUnderWay) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  {
    NcclPair pair = MakeNcclPair(server, absl::Seconds(60));
    HW_ASSERT_PAIR(pair);
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    const PartsMemory send({1000}), receive({1000});
    const Stream stream;
    ASSERT_EQ(pair.ranks[0]->Exchange(ForPeer(0, send.parts()), ForPeer(0, receive.parts()), "lonely",
                                      stream.get()),
              absl::OkStatus());
    const absl::Time start = absl::Now();

    pair.ranks[0].reset();

    EXPECT_LT(absl::Now() - start, absl::Seconds(6));
    EXPECT_TRUE(stream.BecomesIdle(absl::Seconds(2)));
  }
  ExpectThatANewGroupWorks(server);
}

// A peer that has announced itself and goes no further: the wait is within NCCL.
TEST(NcclFaultGpuTest, ConnectEndsAtItsTimeoutWhenAPeerComesAndGoes) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const auto rendezvous = server.Dial();
  ASSERT_EQ(rendezvous->Put("gone/1", "here", absl::Seconds(5)), absl::OkStatus());
  NcclOptions options = PairOptions("gone", 0, absl::Seconds(10));
  options.connect_timeout = absl::Seconds(3);
  auto group = NcclGroup::Create(options);
  ASSERT_TRUE(group.ok()) << group.status();
  const absl::Time start = absl::Now();

  const absl::Status status = (*group)->Connect(rendezvous.get());

  const absl::Duration took = absl::Now() - start;
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_GE(took, absl::Seconds(3));
  EXPECT_LE(took, absl::Seconds(5));
  EXPECT_EQ((*group)->Check(), status);
  group->reset();
  EXPECT_LE(absl::Now() - start - took, absl::Seconds(6));
  ExpectThatANewGroupWorks(server);
}

TEST(NcclFaultGpuTest, AbortEndsAConnectThatWaitsWithinNccl) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const auto rendezvous = server.Dial();
  ASSERT_EQ(rendezvous->Put("aborted/1", "here", absl::Seconds(5)), absl::OkStatus());
  auto group = NcclGroup::Create(PairOptions("aborted", 0, absl::Seconds(10)));
  ASSERT_TRUE(group.ok()) << group.status();
  absl::Status status;
  absl::Time ended;
  std::thread connect([&] {
    status = (*group)->Connect(rendezvous.get());
    ended = absl::Now();
  });
  absl::SleepFor(absl::Seconds(3));

  const absl::Time aborted = absl::Now();
  (*group)->Abort();
  connect.join();

  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
  EXPECT_GE(ended, aborted);
  EXPECT_LE(ended - aborted, absl::Seconds(1));
  group->reset();
  ExpectThatANewGroupWorks(server);
}

// Both directions at once, again and again, until something ends it. Returns why.
absl::Status ExchangeForever(NcclGroup* group, const std::function<void(int round)>& after_round) {
  const PartsMemory send({16 << 20}), receive({16 << 20});
  const Stream stream;
  for (int round = 0;; ++round) {
    absl::Status status = group->Exchange(ForPeer(group->rank(), send.parts()),
                                          ForPeer(group->rank(), receive.parts()), "endless", stream.get());
    if (status.ok()) status = CheckUntilIdle(group, stream);
    if (!status.ok()) {
      EXPECT_TRUE(stream.BecomesIdle(absl::Seconds(5)));
      return status;
    }
    after_round(round);
  }
}

constexpr char kChildVariable[] = "HW_TEST_NCCL_CHILD";

// What the process of the case below runs.
TEST(NcclFaultGpuTest, DISABLED_IsTheRankThatIsKilled) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const char* const told = std::getenv(kChildVariable);
  ASSERT_NE(told, nullptr);
  const std::string address(told);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const auto rendezvous = RendezvousClient::Dial(address, nullptr);
  auto group = NcclGroup::Create(PairOptions("killed", 1, absl::Seconds(20)));
  ASSERT_TRUE(group.ok()) << group.status();
  ASSERT_EQ((*group)->Connect(rendezvous.get()), absl::OkStatus());
  const absl::Status status = ExchangeForever(group->get(), [](int /*round*/) {});
  FAIL() << "not killed: " << status;
}

// This program again, in a process of its own: one that has used CUDA cannot be forked.
pid_t StartRank1(const std::string& address) {
  std::string program = "/proc/self/exe";
  std::string filter = "--gtest_filter=NcclFaultGpuTest.DISABLED_IsTheRankThatIsKilled";
  std::string disabled = "--gtest_also_run_disabled_tests";
  char* const arguments[] = {program.data(), filter.data(), disabled.data(), nullptr};
  std::string told = absl::StrCat(kChildVariable, "=", address);
  std::vector<char*> environment;
  for (char** variable = environ; *variable != nullptr; ++variable) environment.push_back(*variable);
  environment.push_back(told.data());
  environment.push_back(nullptr);
  pid_t child = -1;
  EXPECT_EQ(posix_spawn(&child, program.c_str(), nullptr, nullptr, arguments, environment.data()), 0);
  return child;
}

TEST(NcclFaultGpuTest, EndsWhenThePeersProcessIsKilled) {
  HW_REQUIRE_TWO_GPUS();
  const RendezvousServer server;
  const pid_t child = StartRank1(server.address());
  ASSERT_GT(child, 0);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  const auto rendezvous = server.Dial();
  auto group = NcclGroup::Create(PairOptions("killed", 0, absl::Seconds(3)));
  ASSERT_TRUE(group.ok()) << group.status();
  absl::Status status = (*group)->Connect(rendezvous.get());
  EXPECT_EQ(status, absl::OkStatus());

  absl::Time killed;
  if (status.ok()) {
    status = ExchangeForever(group->get(), [&](int round) {
      if (round != 20) return;
      killed = absl::Now();
      kill(child, SIGKILL);
    });
    EXPECT_LE(absl::Now() - killed, absl::Seconds(5)) << status;
    EXPECT_THAT(status.code(), AnyOf(absl::StatusCode::kDeadlineExceeded, absl::StatusCode::kUnavailable))
        << status;
  }

  kill(child, SIGKILL);
  EXPECT_EQ(waitpid(child, nullptr, 0), child);
  const absl::Time start = absl::Now();
  group->reset();
  EXPECT_LT(absl::Now() - start, absl::Seconds(6));
  ExpectThatANewGroupWorks(server);
}

}  // namespace
}  // namespace headwater::testing
