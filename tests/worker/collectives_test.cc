// One contract, every implementation.
#include "worker/collectives.h"

#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/gloo_group.h"
#include "worker/inprocess_collectives.h"
#include "worker/ring.h"

namespace headwater::testing {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr absl::Duration kPlenty = absl::Seconds(20);

// Makes the endpoints of a whole group, each to be used by one thread.
using MakeGroup = std::function<std::vector<std::unique_ptr<Collectives>>(int world, absl::Duration timeout)>;

std::vector<std::unique_ptr<Collectives>> MakeGlooGroup(int world, absl::Duration timeout) {
  static GlooGroups* const groups = new GlooGroups();
  return groups->Make(world, timeout);
}

struct Implementation {
  std::string name;
  MakeGroup make;
};

class CollectivesContract : public ::testing::TestWithParam<Implementation> {
 protected:
  // Runs `body` for each rank on a thread of its own.
  static void OnRanks(const std::vector<std::unique_ptr<Collectives>>& group,
                      const std::function<void(Collectives*)>& body) {
    std::vector<std::thread> threads;
    for (const auto& endpoint : group) threads.emplace_back([&] { body(endpoint.get()); });
    for (std::thread& thread : threads) thread.join();
  }
};

std::string Payload(int from, size_t bytes) {
  std::string text(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i)
    text[i] = static_cast<char>((i * 31 + static_cast<size_t>(from) * 7) & 0xff);
  return text;
}

TEST_P(CollectivesContract, PassesChunksOfUnequalSizesAroundTheRing) {
  for (int world = 1; world <= 4; ++world) {
    const auto group = GetParam().make(world, kPlenty);
    // Rank 1 has nothing: its chunk is not transferred.
    const auto size = [](int owner) { return owner == 1 ? 0 : (static_cast<size_t>(owner) + 1) * 300'001; };
    OnRanks(group, [&](Collectives* self) {
      const int rank = self->rank();
      ASSERT_EQ(self->world_size(), world);
      std::string in_hand = Payload(rank, size(rank));
      for (int step = 1; step < world; ++step) {
        const int owner = (rank - step + world) % world;
        std::string incoming(size(owner), '\0');
        auto exchange = self->StartExchange((rank + 1) % world, absl::MakeConstSpan(in_hand),
                                            (rank - 1 + world) % world, absl::MakeSpan(incoming));
        const absl::Status status = exchange->Wait();
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_TRUE(incoming == Payload(owner, size(owner))) << "rank " << rank << " step " << step;
        in_hand = std::move(incoming);
      }
    });
  }
}

TEST_P(CollectivesContract, TransfersOneWayOrNothingWhenSpansAreEmpty) {
  const auto group = GetParam().make(2, kPlenty);

  OnRanks(group, [](Collectives* self) {
    const int other = 1 - self->rank();
    EXPECT_TRUE(self->StartExchange(other, {}, other, {})->Wait().ok());
    std::string text = self->rank() == 0 ? "one way" : std::string(7, '?');
    const absl::Span<const char> send =
        self->rank() == 0 ? absl::MakeConstSpan(text) : absl::Span<const char>();
    const absl::Span<char> receive = self->rank() == 0 ? absl::Span<char>() : absl::MakeSpan(text);
    const absl::Status status = self->StartExchange(other, send, other, receive)->Wait();
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(text, "one way");
  });
}

TEST_P(CollectivesContract, KeepsManyExchangesApart) {
  const auto group = GetParam().make(3, kPlenty);

  OnRanks(group, [](Collectives* self) {
    for (int round = 0; round < 300; ++round) {
      const int sent = self->rank() * 1000 + round;
      int received = -1;
      const int from = (self->rank() + 2) % 3;
      auto exchange =
          self->StartExchange((self->rank() + 1) % 3, {reinterpret_cast<const char*>(&sent), sizeof(sent)},
                              from, {reinterpret_cast<char*>(&received), sizeof(received)});
      ASSERT_TRUE(exchange->Wait().ok());
      ASSERT_EQ(received, from * 1000 + round);
    }
  });
}

TEST_P(CollectivesContract, GathersEveryRanksBytesInRankOrder) {
  for (int world = 1; world <= 4; ++world) {
    const auto group = GetParam().make(world, kPlenty);
    OnRanks(group, [&](Collectives* self) {
      const int64_t in = 100 + self->rank();
      std::vector<int64_t> out(static_cast<size_t>(world), -1);
      const absl::Status status = self->AllGather(&in, sizeof(in), out.data());
      ASSERT_TRUE(status.ok()) << status;
      std::vector<int64_t> expected(static_cast<size_t>(world));
      std::iota(expected.begin(), expected.end(), 100);
      EXPECT_EQ(out, expected);
    });
  }
}

TEST_P(CollectivesContract, EndsAtTheDeadlineAndStaysDeadWhenAPeerStaysAway) {
  const auto group = GetParam().make(2, absl::Milliseconds(200));
  char byte = 0;
  const absl::Time start = absl::Now();

  const absl::Status status = group[0]->StartExchange(1, {}, 1, {&byte, 1})->Wait();

  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_EQ(group[0]->StartExchange(1, {}, 1, {&byte, 1})->Wait(), status);
  EXPECT_EQ(group[0]->AllGather(&byte, 1, std::string(2, ' ').data()), status);
  // Its peer does not wait for it.
  const absl::Status peer = group[1]->StartExchange(0, {}, 0, {&byte, 1})->Wait();
  EXPECT_EQ(peer.code(), absl::StatusCode::kUnavailable) << peer;
}

TEST_P(CollectivesContract, AbortEndsAWaitAtOnceAndThePeersWithIt) {
  const auto group = GetParam().make(3, kPlenty);
  char byte = 0;
  const absl::Time start = absl::Now();
  auto exchange = group[0]->StartExchange(1, {}, 2, {&byte, 1});
  absl::Status aborted;
  std::thread waiter([&] { aborted = exchange->Wait(); });

  group[0]->Abort();
  waiter.join();

  EXPECT_EQ(aborted.code(), absl::StatusCode::kCancelled) << aborted;
  EXPECT_EQ(group[0]->StartExchange(1, {&byte, 1}, 2, {})->Wait().code(), absl::StatusCode::kCancelled);
  char in = 0;
  const absl::Status peer = group[1]->StartExchange(2, {}, 0, {&in, 1})->Wait();
  EXPECT_EQ(peer.code(), absl::StatusCode::kUnavailable) << peer;
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST_P(CollectivesContract, AbortBeforeAnyOperationEndsTheFirst) {
  const auto group = GetParam().make(2, kPlenty);
  char byte = 0;

  group[1]->Abort();

  EXPECT_EQ(group[1]->StartExchange(0, {&byte, 1}, 0, {})->Wait().code(), absl::StatusCode::kCancelled);
}

TEST_P(CollectivesContract, SaysUnavailableWhenAPeerIsDestroyedMidOperation) {
  auto group = GetParam().make(2, kPlenty);
  std::string large(8 << 20, 'x');
  std::string incoming(8 << 20, ' ');
  absl::Notification waiting;
  absl::Status status;
  const absl::Time start = absl::Now();
  std::thread survivor([&] {
    auto exchange = group[0]->StartExchange(1, absl::MakeConstSpan(large), 1, absl::MakeSpan(incoming));
    waiting.Notify();
    status = exchange->Wait();
  });

  waiting.WaitForNotification();
  group[1].reset();
  survivor.join();

  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST_P(CollectivesContract, ABufferIsFreeWhenAnExchangeWasGivenUpWithoutWaiting) {
  auto group = GetParam().make(2, kPlenty);
  auto buffer = std::make_unique<std::string>(4 << 20, ' ');
  { auto given_up = group[0]->StartExchange(1, {}, 1, absl::MakeSpan(*buffer)); }
  buffer.reset();

  const std::string data(4 << 20, 'x');
  const absl::Status peer = group[1]->StartExchange(0, absl::MakeConstSpan(data), 0, {})->Wait();

  EXPECT_EQ(peer.code(), absl::StatusCode::kUnavailable) << peer;
}

TEST_P(CollectivesContract, WritesNothingPastTheBufferWhenRanksDisagreeOnASize) {
  for (const size_t expected : {10u, 4000u}) {
    const auto group = GetParam().make(2, absl::Milliseconds(500));
    const std::string sent(1000, 'x');
    std::string received(8000, '.');
    absl::Status statuses[2];
    OnRanks(group, [&](Collectives* self) {
      statuses[self->rank()] =
          self->rank() == 0
              ? self->StartExchange(1, absl::MakeConstSpan(sent), 1, {})->Wait()
              : self->StartExchange(0, {}, 0, absl::MakeSpan(received).subspan(0, expected))->Wait();
    });

    EXPECT_FALSE(statuses[1].ok()) << expected;
    EXPECT_EQ(received.find_first_not_of('.', expected), std::string::npos);
  }
}

TEST_P(CollectivesContract, RefusesPeersThatAreNoRanks) {
  const auto group = GetParam().make(2, kPlenty);
  char byte = 0;

  EXPECT_EQ(group[0]->StartExchange(2, {&byte, 1}, 1, {})->Wait().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(group[0]->StartExchange(1, {&byte, 1}, -1, {})->Wait().code(),
            absl::StatusCode::kInvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(All, CollectivesContract,
                         ::testing::Values(Implementation{"InProcess", MakeInProcessGroup},
                                           Implementation{"Gloo", MakeGlooGroup}),
                         [](const auto& row) { return row.param.name; });

}  // namespace
}  // namespace headwater::testing
