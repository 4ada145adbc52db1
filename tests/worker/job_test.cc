// JobControl, EgressRing, Arena.
#include <cstring>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/support/fake_clock.h"
#include "worker/arena.h"
#include "worker/egress.h"
#include "worker/job_control.h"

namespace headwater {
namespace {

TEST(JobControlTest, KeepsTheFirstReasonAndTellsEveryHookOnce) {
  JobControl control;
  int calls = 0;
  const JobControl::CancelHook first(&control, [&] { ++calls; });
  {
    const JobControl::CancelHook gone(&control, [&] { calls += 100; });
  }
  const JobControl::CancelHook second(&control, [&] { ++calls; });
  EXPECT_TRUE(control.Step().ok());

  control.Cancel(absl::CancelledError("one"));
  control.Cancel(absl::CancelledError("two"));

  EXPECT_EQ(calls, 2);
  EXPECT_EQ(control.Step(), absl::CancelledError("one"));
  const JobControl::CancelHook late(&control, [&] { calls += 10; });
  EXPECT_EQ(calls, 12);
}

TEST(JobControlTest, EndsAtItsDeadline) {
  FakeClock clock;
  JobControl control(&clock, clock.Now() + absl::Seconds(10));
  EXPECT_TRUE(control.status().ok());

  clock.Advance(absl::Seconds(10));

  EXPECT_EQ(control.Step().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(control.status()), v1::ERROR_REASON_DEADLINE);
}

TEST(JobControlTest, AgesBetweenStepsButNotWhileItWaitsForOthers) {
  FakeClock clock;
  JobControl control(&clock);
  clock.Advance(absl::Seconds(3));
  EXPECT_EQ(control.StepAge(), absl::Seconds(3));
  {
    const JobControl::Waiting waiting(&control);
    EXPECT_EQ(control.StepAge(), absl::ZeroDuration());
    clock.Advance(absl::Seconds(3));
  }
  EXPECT_EQ(control.StepAge(), absl::ZeroDuration());
  clock.Advance(absl::Seconds(1));
  EXPECT_TRUE(control.Step().ok());
  EXPECT_EQ(control.StepAge(), absl::ZeroDuration());
}

class EgressTest : public testing::Test {
 protected:
  char first_ = 0;
  char second_ = 0;
  JobControl control_;
  absl::Duration stalled_;
  char* buffer_ = nullptr;
};

TEST_F(EgressTest, GivesTheBuffersInTurnWhileTheyAreFree) {
  EgressRing ring({&first_, &second_}, absl::Seconds(10));
  for (int layer = 0; layer < 5; ++layer) {
    ASSERT_TRUE(ring.Acquire(layer, &control_, &buffer_, &stalled_).ok());
    EXPECT_EQ(buffer_, layer % 2 == 0 ? &first_ : &second_);
    ring.Use(layer)();
  }
}

TEST_F(EgressTest, WaitsForTheLastReaderOfTheBuffer) {
  EgressRing ring({&first_}, absl::Seconds(10));
  const auto a = ring.Use(0);
  const auto b = ring.Use(0);
  std::thread reader([&] {
    a();
    b();
  });

  EXPECT_TRUE(ring.Acquire(1, &control_, &buffer_, &stalled_).ok());

  reader.join();
}

TEST_F(EgressTest, StallsOnlyWithoutAnyRelease) {
  EgressRing ring({&first_}, absl::Milliseconds(50));
  const auto held = ring.Use(0);

  const absl::Status status = ring.Acquire(1, &control_, &buffer_, &stalled_);

  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_KV_STREAM_STALLED);
  EXPECT_GE(stalled_, absl::Milliseconds(50));
  held();
}

TEST_F(EgressTest, EndsWhenTheJobIsCancelled) {
  EgressRing ring({&first_}, absl::Seconds(60));
  const auto held = ring.Use(0);
  std::thread cancel([&] { control_.Cancel(absl::CancelledError("x")); });

  EXPECT_EQ(ring.Acquire(1, &control_, &buffer_, &stalled_).code(), absl::StatusCode::kCancelled);

  cancel.join();
  held();
}

TEST_F(EgressTest, AReaderMayOutliveTheRing) {
  std::function<void()> held;
  {
    EgressRing ring({&first_}, absl::Seconds(1));
    held = ring.Use(0);
  }
  held();
}

TEST(ArenaTest, GivesAlignedRoomAndReusesIt) {
  Arena arena;
  ASSERT_TRUE(arena.Reset(1000).ok());
  char* const first = arena.Take(1);
  char* const second = arena.Take(100);
  EXPECT_EQ(second - first, 64);
  std::memset(second, 1, 100);

  ASSERT_TRUE(arena.Reset(500).ok());
  EXPECT_EQ(arena.Take(500), first);
  EXPECT_EQ(arena.capacity(), 1024u);
  ASSERT_TRUE(arena.Reset(100'000).ok());
  std::memset(arena.Take(100'000), 1, 100'000);
}

TEST(ArenaTest, SaysWhenTheSystemHasNoSuchSpace) {
  Arena arena;
  EXPECT_EQ(arena.Reset(uint64_t{1} << 62).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(arena.Reset(100).ok());
}

}  // namespace
}  // namespace headwater
