#include "worker/link_probe.h"

#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/worker/gloo_group.h"
#include "worker/inprocess_collectives.h"

namespace headwater::testing {
namespace {

constexpr absl::Duration kPlenty = absl::Seconds(20);

// Passes all on; what it receives comes at `bytes_per_s` at most.
class SlowLink final : public Collectives {
 public:
  SlowLink(std::unique_ptr<Collectives> inner, double bytes_per_s)
      : inner_(std::move(inner)), bytes_per_s_(bytes_per_s) {}

  int rank() const override { return inner_->rank(); }
  int world_size() const override { return inner_->world_size(); }
  std::unique_ptr<PendingExchange> StartExchange(int to, absl::Span<const char> send, int from,
                                                 absl::Span<char> receive) override {
    messages.push_back(receive.size());
    return std::make_unique<Slow>(inner_->StartExchange(to, send, from, receive),
                                  absl::Seconds(static_cast<double>(receive.size()) / bytes_per_s_));
  }
  absl::Status AllGather(const void* in, uint64_t bytes, void* out) override {
    return inner_->AllGather(in, bytes, out);
  }
  void Abort() override { inner_->Abort(); }

  std::vector<uint64_t> messages;

 private:
  struct Slow final : PendingExchange {
    Slow(std::unique_ptr<PendingExchange> pending, absl::Duration least)
        : inner(std::move(pending)), until(absl::Now() + least) {}
    absl::Status Wait() override {
      const absl::Status status = inner->Wait();
      absl::SleepFor(until - absl::Now());
      return status;
    }
    std::unique_ptr<PendingExchange> inner;
    const absl::Time until;
  };

  const std::unique_ptr<Collectives> inner_;
  const double bytes_per_s_;
};

template <typename Group>
std::vector<absl::StatusOr<double>> MeasureOn(const Group& group) {
  std::vector<absl::StatusOr<double>> rates(group.size(), 0.0);
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < group.size(); ++rank)
    threads.emplace_back([&, rank] { rates[rank] = MeasureLink(group[rank].get()); });
  for (std::thread& thread : threads) thread.join();
  return rates;
}

void ExpectTheSame(const std::vector<absl::StatusOr<double>>& rates, double least, double most) {
  for (const absl::StatusOr<double>& rate : rates) {
    ASSERT_TRUE(rate.ok()) << rate.status();
    EXPECT_EQ(*rate, *rates[0]);
    EXPECT_GE(*rate, least);
    EXPECT_LE(*rate, most);
  }
}

TEST(MeasureLinkTest, AllRanksGetTheSlowestOnesRate) {
  for (const size_t world : {size_t{2}, size_t{3}, size_t{5}}) {
    auto ranks = MakeInProcessGroup(static_cast<int>(world), kPlenty);
    std::vector<std::unique_ptr<SlowLink>> group;
    for (size_t rank = 0; rank < world; ++rank)
      group.push_back(std::make_unique<SlowLink>(std::move(ranks[rank]), rank == 1 ? 20e6 : 1e12));
    // 20 MB/s: a busy machine may make it less, nothing makes it more.
    ExpectTheSame(MeasureOn(group), 5e6, 20e6);
    // 256 KiB take 13 ms, 1 MiB 52 ms: long enough.
    EXPECT_THAT(group[0]->messages.back(), ::testing::Le(uint64_t{1} << 20));
    EXPECT_EQ(group[0]->messages.size() % 3, 0u);
  }
}

TEST(MeasureLinkTest, AFastLinkGetsNoMoreThanItsMessages) {
  auto ranks = MakeInProcessGroup(2, kPlenty);
  std::vector<std::unique_ptr<SlowLink>> group;
  for (auto& rank : ranks) group.push_back(std::make_unique<SlowLink>(std::move(rank), 1e12));
  ExpectTheSame(MeasureOn(group), 1e6, 1e12);
  EXPECT_EQ(group[0]->messages.front(), kLeastProbeBytes);
  EXPECT_LE(group[0]->messages.back(), kMostProbeBytes);
  EXPECT_EQ(group[0]->messages, group[1]->messages);
}

TEST(MeasureLinkTest, MeasuresGloo) {
  GlooGroups groups;
  ExpectTheSame(MeasureOn(groups.Make(2, kPlenty)), 1e6, 1e12);
  ExpectTheSame(MeasureOn(groups.Make(3, kPlenty)), 1e6, 1e12);
}

TEST(MeasureLinkTest, APeerThatStaysAwayEndsIt) {
  const auto group = MakeInProcessGroup(2, absl::Milliseconds(200));
  const absl::StatusOr<double> rate = MeasureLink(group[0].get());
  EXPECT_EQ(rate.status().code(), absl::StatusCode::kDeadlineExceeded) << rate.status();
}

TEST(MeasureLinkTest, AbortEndsIt) {
  const auto group = MakeInProcessGroup(2, kPlenty);
  std::thread aborts([&] {
    absl::SleepFor(absl::Milliseconds(50));
    group[0]->Abort();
  });
  const absl::StatusOr<double> rate = MeasureLink(group[0].get());
  aborts.join();
  EXPECT_EQ(rate.status().code(), absl::StatusCode::kCancelled) << rate.status();
}

// Of two layers whose blocks were under way from second 1 to 9.
std::vector<KvLayerTimes> EightSeconds() {
  KvLayerTimes first, second;
  first.first_submitted = absl::FromUnixSeconds(1);
  first.last_acked = absl::FromUnixSeconds(6);
  second.first_submitted = absl::FromUnixSeconds(5);
  second.last_acked = absl::FromUnixSeconds(9);
  return {first, second};
}

TEST(MeasureEgressTest, IsTheStreamsRate) {
  const EgressRate rate =
      MeasureEgress(80'000'000, EightSeconds(), absl::ZeroDuration(), absl::ZeroDuration(), absl::Seconds(9));
  EXPECT_DOUBLE_EQ(rate.bytes_per_s, 1e7);
  EXPECT_FALSE(rate.waited) << "all was hidden: the streams may carry more";
}

TEST(MeasureEgressTest, TellsWhetherThePromptWaitedForIt) {
  const auto waited = [](double stall, double tail) {
    return MeasureEgress(80'000'000, EightSeconds(), absl::Seconds(stall), absl::Seconds(tail),
                         absl::Seconds(9))
        .waited;
  };
  EXPECT_FALSE(waited(0.4, 0));
  EXPECT_TRUE(waited(0.5, 0)) << "5 % of 9 s";
  EXPECT_FALSE(waited(0, 3.9));
  EXPECT_TRUE(waited(0, 4)) << "half of 8 s";
  EXPECT_TRUE(waited(0.3, 3.8)) << "both";
}

TEST(MeasureEgressTest, LittleTellsNothing) {
  const absl::Duration none;
  EXPECT_EQ(MeasureEgress(8'000'000, EightSeconds(), none, none, absl::Seconds(9)).bytes_per_s, 0);
  EXPECT_EQ(MeasureEgress(80'000'000, {}, none, none, absl::Seconds(9)).bytes_per_s, 0);
  EXPECT_EQ(MeasureEgress(80'000'000, {KvLayerTimes()}, none, none, absl::Seconds(9)).bytes_per_s, 0)
      << "a layer without blocks";
  // One of a layer that has none changes nothing.
  std::vector<KvLayerTimes> layers = EightSeconds();
  layers.emplace_back();
  EXPECT_DOUBLE_EQ(MeasureEgress(80'000'000, layers, none, none, absl::Seconds(9)).bytes_per_s, 1e7);
}

}  // namespace
}  // namespace headwater::testing
