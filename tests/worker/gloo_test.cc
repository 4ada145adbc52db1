#include <atomic>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "gloo/transport/tcp/address.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/dtype.h"
#include "tests/model/dense_forward.h"
#include "tests/worker/gloo_group.h"
#include "tests/worker/prefill_group.h"
#include "worker/gloo_peer_name.h"

namespace headwater::testing {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

GlooOptions Options(const std::string& name, int rank, int world, absl::Duration timeout) {
  GlooOptions options;
  options.rank = rank;
  options.world_size = world;
  options.group_name = name;
  options.connect_timeout = timeout;
  options.timeout = timeout;
  return options;
}

TEST(GlooCollectivesTest, FormsNoGroupWithinItsTimeoutWhenAPeerNeverComes) {
  const GlooGroups groups;
  const auto rendezvous = RendezvousClient::Dial(groups.address(), nullptr);
  auto group = GlooCollectives::Create(Options("alone", 0, 2, absl::Milliseconds(300)));
  ASSERT_TRUE(group.ok()) << group.status();
  const absl::Time start = absl::Now();

  const absl::Status status = (*group)->Connect(rendezvous.get());

  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  char byte = 0;
  EXPECT_EQ((*group)->StartExchange(1, {&byte, 1}, 1, {})->Wait(), status);
}

TEST(GlooCollectivesTest, ConnectEndsWhenTheRendezvousServerIsGone) {
  std::string address;
  {
    const GlooGroups groups;
    address = groups.address();
  }
  const auto rendezvous = RendezvousClient::Dial(address, nullptr);
  auto group = GlooCollectives::Create(Options("nowhere", 0, 2, absl::Milliseconds(300)));
  ASSERT_TRUE(group.ok()) << group.status();

  EXPECT_EQ((*group)->Connect(rendezvous.get()).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(GlooCollectivesTest, AbortEndsAConnectThatWaitsForTheRendezvous) {
  const GlooGroups groups;
  const auto rendezvous = RendezvousClient::Dial(groups.address(), nullptr);
  auto group = GlooCollectives::Create(Options("aborted", 0, 2, absl::Seconds(60)));
  ASSERT_TRUE(group.ok()) << group.status();
  const absl::Time start = absl::Now();
  absl::Status status;
  std::thread connect([&] { status = (*group)->Connect(rendezvous.get()); });

  (*group)->Abort();
  connect.join();

  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

// The peer leaves its addresses but never connects: both orders of the two addresses, so both the side that
// listens and the side that dials.
TEST(GlooCollectivesTest, AbortEndsAConnectThatWaitsForAPeersSocket) {
  GlooGroups groups;
  const auto watcher = RendezvousClient::Dial(groups.address(), nullptr);
  for (const std::string name : {"a", "b", "c", "d"}) {
    // An abort ends the client, too.
    const auto rendezvous = RendezvousClient::Dial(groups.address(), nullptr);
    // What a rank publishes, as it stands in the rendezvous: rank 1's own sockets, closed again.
    auto peer = GlooCollectives::Create(Options(name, 1, 2, absl::Milliseconds(200)));
    ASSERT_TRUE(peer.ok());
    EXPECT_FALSE((*peer)->Connect(rendezvous.get()).ok());
    auto group = GlooCollectives::Create(Options(name, 0, 2, absl::Seconds(60)));
    ASSERT_TRUE(group.ok()) << group.status();
    const absl::Time start = absl::Now();
    absl::Status status;
    std::thread connect([&] { status = (*group)->Connect(rendezvous.get()); });

    // Rank 0 has published when its key can be read.
    const auto published = watcher->Get(name + "/0", absl::Seconds(10));
    EXPECT_TRUE(published.ok()) << published.status();
    (*group)->Abort();
    connect.join();

    EXPECT_FALSE(status.ok());
    EXPECT_LT(absl::Now() - start, absl::Seconds(10)) << status;
  }
}

// Gloo's own definition throws on its event thread, which ends the process.
TEST(GlooPeerNameTest, APeerThatIsGoneHasNoNameAndNothingIsThrown) {
  EXPECT_TRUE(GlooToleratesLostPeers());
  const int never_connected = socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_GE(never_connected, 0);
  EXPECT_NO_THROW({
    const auto address = gloo::transport::tcp::Address::fromPeerName(never_connected);
    EXPECT_EQ(address.getSockaddr().ss_family, AF_INET);
    EXPECT_FALSE(address.str().empty());
  });
  close(never_connected);
}

TEST(GlooCollectivesTest, RefusesAddressesThatAreNone) {
  const GlooGroups groups;
  const auto rendezvous = RendezvousClient::Dial(groups.address(), nullptr);
  ASSERT_TRUE(rendezvous->Put("bad/1", "short", absl::Seconds(5)).ok());
  auto group = GlooCollectives::Create(Options("bad", 0, 2, absl::Seconds(5)));
  ASSERT_TRUE(group.ok());

  const absl::Status status = (*group)->Connect(rendezvous.get());

  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));

  ASSERT_TRUE(
      rendezvous->Put("zeros/1", std::string(sizeof(sockaddr_storage) + 8, '\0'), absl::Seconds(5)).ok());
  auto zeros = GlooCollectives::Create(Options("zeros", 0, 2, absl::Seconds(5)));
  ASSERT_TRUE(zeros.ok());
  EXPECT_FALSE((*zeros)->Connect(rendezvous.get()).ok());
}

TEST(GlooCollectivesTest, NamesAHostThatCannotBeBound) {
  GlooOptions options = Options("x", 0, 2, absl::Seconds(1));
  options.host = "203.0.113.7";
  const auto group = GlooCollectives::Create(options);

  // Gloo binds when the pairs are made.
  absl::Status status = group.status();
  if (group.ok()) {
    const GlooGroups groups;
    status = (*group)->Connect(RendezvousClient::Dial(groups.address(), nullptr).get());
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("203.0.113.7"));
}

// More than the sockets hold: its sender goes while the message is under way.
TEST(GlooCollectivesTest, SaysUnavailableWhenAPeerGoesWithinAMessage) {
  GlooGroups groups;
  const auto group = groups.Make(2, absl::Seconds(20));
  const std::string data(64 << 20, 'x');
  std::string incoming(data.size(), ' ');
  const absl::Time start = absl::Now();
  const auto sending = group[1]->StartExchange(0, absl::MakeConstSpan(data), 0, {});
  const auto receiving = group[0]->StartExchange(1, {}, 1, absl::MakeSpan(incoming));
  const std::atomic_ref<char> first(incoming.front());
  while (first != 'x' && absl::Now() - start < absl::Seconds(5)) absl::SleepFor(absl::Microseconds(100));

  group[1]->Abort();

  EXPECT_EQ(sending->Wait().code(), absl::StatusCode::kCancelled);
  const absl::Status status = receiving->Wait();
  // On a slow machine the abort may come too late.
  const bool whole = incoming == data;
  EXPECT_EQ(status.code(), whole ? absl::StatusCode::kOk : absl::StatusCode::kUnavailable) << status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST(GlooCollectivesTest, RefusesImpossibleRanks) {
  EXPECT_FALSE(GlooCollectives::Create(Options("x", 2, 2, absl::Seconds(1))).ok());
  EXPECT_FALSE(GlooCollectives::Create(Options("x", 0, 0, absl::Seconds(1))).ok());
}

TEST(GlooPrefillTest, TwoRanksAgreeWithTransformers) {
  GlooGroups groups;
  for (const std::string& name : GoldenNames()) {
    const Golden golden = ReadGolden(name);
    const auto model = Model::Load({golden.directory, kernels::DType::kF32, 0});
    ASSERT_TRUE(model.ok()) << model.status();
    for (const auto partition : {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG}) {
      GroupRun run;
      run.world_size = 2;
      run.partition = partition;
      const std::string group_name = absl::StrCat(name, partition);
      run.join = [&](int rank) { return groups.Join(group_name, rank, 2, absl::Seconds(20)).value(); };

      const auto group = RunGroup(**model, golden.tokens, run);

      for (const absl::Status& status : group->statuses) ASSERT_TRUE(status.ok()) << status;
      EXPECT_THAT(group->kv.times(), Each(1));
      for (uint32_t layer = 0; layer < golden.expected.k.size(); ++layer) {
        EXPECT_LE(RelativeError(group->kv.Tensor(layer, KvKind::kK), golden.expected.k[layer]), 1e-4);
        EXPECT_LE(RelativeError(group->kv.Tensor(layer, KvKind::kV), golden.expected.v[layer]), 1e-4);
      }
      EXPECT_LE(RelativeError(group->logits, golden.expected.logits), 1e-4);
    }
  }
}

}  // namespace
}  // namespace headwater::testing
