// What a group over GPUs does before it needs a GPU.
#include "worker/cuda/nccl_group.h"

#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/rendezvous_server.h"

namespace headwater::testing {
namespace {

using ::testing::HasSubstr;

NcclOptions Options(int rank, int world) {
  NcclOptions options;
  options.rank = rank;
  options.world_size = world;
  options.group_name = "group";
  return options;
}

#ifndef HW_WITH_NCCL
TEST(NcclGroupTest, SaysThatItWasBuiltWithoutNccl) {
  const absl::Status status = NcclGroup::Create(Options(0, 2)).status();

  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("built without NCCL"));
}
#else

absl::StatusCode CreateCode(const NcclOptions& options) { return NcclGroup::Create(options).status().code(); }

TEST(NcclGroupTest, RefusesImpossibleOptions) {
  EXPECT_EQ(CreateCode(Options(0, 2)), absl::StatusCode::kOk);
  EXPECT_EQ(CreateCode(Options(2, 2)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateCode(Options(-1, 2)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateCode(Options(0, 0)), absl::StatusCode::kInvalidArgument);
  NcclOptions options = Options(0, 2);
  options.device = -1;
  EXPECT_EQ(CreateCode(options), absl::StatusCode::kInvalidArgument);
  options = Options(0, 2);
  options.group_name = "";
  EXPECT_EQ(CreateCode(options), absl::StatusCode::kInvalidArgument);
  options = Options(0, 2);
  options.timeout = absl::ZeroDuration();
  EXPECT_EQ(CreateCode(options), absl::StatusCode::kInvalidArgument);
  options = Options(0, 2);
  options.connect_timeout = absl::Milliseconds(-1);
  EXPECT_EQ(CreateCode(options), absl::StatusCode::kInvalidArgument);
}

TEST(NcclGroupTest, AGroupOfOneRankHasNothingToSend) {
  auto group = NcclGroup::Create(Options(0, 1));
  ASSERT_TRUE(group.ok()) << group.status();
  char byte = 0;
  const std::vector<DeviceParts> own = {{{&byte, 1}}};
  EXPECT_EQ((*group)->Exchange(own, own, "early", nullptr).code(), absl::StatusCode::kFailedPrecondition);

  ASSERT_EQ((*group)->Connect(nullptr), absl::OkStatus());

  EXPECT_EQ((*group)->rank(), 0);
  EXPECT_EQ((*group)->world_size(), 1);
  EXPECT_EQ((*group)->Exchange(own, own, "nothing", nullptr), absl::OkStatus());
  EXPECT_EQ((*group)->Check(), absl::OkStatus());
  const absl::Status refused = (*group)->Exchange({}, own, "unequal", nullptr);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << refused;
  EXPECT_EQ((*group)->Check(), refused);
}

TEST(NcclGroupTest, AfterAnAbortAllCallsAreCancelled) {
  const RendezvousServer server;
  const auto rendezvous = server.Dial();
  for (int world = 1; world <= 2; ++world) {
    auto group = NcclGroup::Create(Options(0, world));
    ASSERT_TRUE(group.ok()) << group.status();

    (*group)->Abort();
    (*group)->Abort();

    EXPECT_EQ((*group)->Connect(rendezvous.get()).code(), absl::StatusCode::kCancelled);
    EXPECT_EQ((*group)->Exchange({}, {}, "late", nullptr).code(), absl::StatusCode::kCancelled);
    EXPECT_EQ((*group)->Check().code(), absl::StatusCode::kCancelled);
  }
}

TEST(NcclGroupTest, ConnectEndsAtItsTimeoutWhenAPeerNeverComes) {
  const RendezvousServer server;
  for (int rank = 0; rank < 2; ++rank) {
    const auto rendezvous = server.Dial();
    NcclOptions options = Options(rank, 2);
    options.group_name = std::string("alone") + std::to_string(rank);
    options.connect_timeout = absl::Milliseconds(300);
    auto group = NcclGroup::Create(options);
    ASSERT_TRUE(group.ok()) << group.status();
    const absl::Time start = absl::Now();

    const absl::Status status = (*group)->Connect(rendezvous.get());

    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank " + std::to_string(rank) + " of 2"));
    EXPECT_LT(absl::Now() - start, absl::Seconds(5));
    EXPECT_EQ((*group)->Check(), status);
  }
}

TEST(NcclGroupTest, AbortEndsAConnectThatWaitsForTheRendezvous) {
  const RendezvousServer server;
  for (int rank = 0; rank < 2; ++rank) {
    const auto rendezvous = server.Dial();
    NcclOptions options = Options(rank, 2);
    options.group_name = std::string("aborted") + std::to_string(rank);
    options.connect_timeout = absl::Seconds(60);
    auto group = NcclGroup::Create(options);
    ASSERT_TRUE(group.ok()) << group.status();
    const absl::Time start = absl::Now();
    absl::Status status;
    std::thread connect([&] { status = (*group)->Connect(rendezvous.get()); });

    if (rank == 1) absl::SleepFor(absl::Milliseconds(100));
    (*group)->Abort();
    connect.join();

    EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
    EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  }
}

TEST(NcclGroupTest, RefusesAnIdThatIsNone) {
  const RendezvousServer server;
  const auto rendezvous = server.Dial();
  ASSERT_EQ(rendezvous->Put("group/id", "short", absl::Seconds(5)), absl::OkStatus());
  auto group = NcclGroup::Create(Options(1, 2));
  ASSERT_TRUE(group.ok()) << group.status();

  const absl::Status status = (*group)->Connect(rendezvous.get());

  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0"));
}
#endif

}  // namespace
}  // namespace headwater::testing
