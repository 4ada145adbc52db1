// What workers measure of their links, and how long the planner goes by it.
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "gtest/gtest.h"

#include "tests/coordinator/fakes.h"
#include "tests/coordinator/rates.h"

namespace headwater::testing {
namespace {

v1::WorkerRegistration Measuring(const std::string& id, const std::string& incarnation = "i1") {
  v1::WorkerRegistration registration = MakeWorker(id, incarnation);
  v1::ServedModel* const model = registration.mutable_model();
  const v1::ServedModel shape = MakeShape();
  model->set_hidden_size(shape.hidden_size());
  model->set_num_q_heads(shape.num_q_heads());
  model->set_intermediate_size(shape.intermediate_size());
  // So slow that two workers are worth it for a short prompt.
  *registration.mutable_rates() = MakeRates();
  registration.mutable_rates()->set_linear_flops(1e9);
  registration.mutable_rates()->set_attention_flops(1e9);
  registration.set_measures_links(true);
  return registration;
}

v1::LinkRates Links(double link, double egress = 0, bool waited = false) {
  v1::LinkRates links;
  links.set_link_bytes_per_s(link);
  links.set_egress_bytes_per_s(egress);
  links.set_egress_waited(waited);
  return links;
}

class SchedulerLinksTest : public ::testing::Test {
 protected:
  void Start(const v1::WorkerRegistration& first, const v1::WorkerRegistration& second) {
    cluster_.AddDecodeNode();
    cluster_.AddWorker(first);
    cluster_.AddWorker(second);
  }
  // A prompt over both workers; whether they were asked to measure.
  bool RunOne(const v1::LinkRates& w0, const v1::LinkRates& w1) {
    const auto watcher = cluster_.Submit(MakeRequest("r" + std::to_string(++runs_), 4000));
    cluster_.decode.AnswerAll();
    const v1::PrefillAssignment first = cluster_.TakeAssignment("w0"), second = cluster_.TakeAssignment("w1");
    EXPECT_EQ(first.plan().world_size(), 2u);
    EXPECT_EQ(first.measure_links(), second.measure_links()) << "all ranks or none";
    for (const auto& [id, links] : {std::pair<std::string, v1::LinkRates>("w0", w0), {"w1", w1}}) {
      v1::RankCompleted completed = cluster_.CompletionOf(id);
      *completed.mutable_links() = links;
      cluster_.Complete(id, completed);
    }
    cluster_.decode.AnswerAll();
    EXPECT_TRUE(watcher->result().ok()) << watcher->result();
    return first.measure_links();
  }
  v1::ComputeRates RatesAt(int worker) { return cluster_.scheduler.ListWorkers().workers(worker).rates(); }

  FakeCluster cluster_;
  int runs_ = 0;
};

TEST_F(SchedulerLinksTest, AsksOnceAndGoesByItForTenMinutes) {
  Start(Measuring("w0"), Measuring("w1"));
  EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 100e9);
  EXPECT_TRUE(RunOne(Links(2e9), Links(2e9)));
  EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 2e9);
  EXPECT_EQ(RatesAt(1).link_bytes_per_s(), 2e9);
  EXPECT_EQ(RatesAt(0).linear_flops(), 1e9) << "the rest is as registered";
  EXPECT_FALSE(RunOne({}, {}));

  cluster_.Advance(absl::Minutes(10) - absl::Seconds(1));
  EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 2e9);
  cluster_.Advance(absl::Seconds(2));
  EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 100e9) << "forgotten";
  EXPECT_TRUE(RunOne(Links(3e9), Links(3e9)));
  EXPECT_EQ(RatesAt(1).link_bytes_per_s(), 3e9);
}

TEST_F(SchedulerLinksTest, ThePlanOfTheNextPromptGoesByIt) {
  Start(Measuring("w0"), Measuring("w1"));
  EXPECT_TRUE(RunOne(Links(100), Links(100)));
  // 100 bytes a second: one worker alone is faster.
  cluster_.Submit(MakeRequest("alone", 4000));
  cluster_.decode.AnswerAll();
  EXPECT_EQ(cluster_.TakeAssignment("w0").plan().world_size(), 1u);
}

TEST_F(SchedulerLinksTest, AsksNobodyWhereOneDoesNotMeasure) {
  auto blind = Measuring("w1");
  blind.set_measures_links(false);
  Start(Measuring("w0"), blind);
  EXPECT_FALSE(RunOne({}, {}));
}

TEST_F(SchedulerLinksTest, AWorkerThatCameLaterIsMeasuredWithTheOthers) {
  Start(Measuring("w0"), Measuring("w1"));
  EXPECT_TRUE(RunOne(Links(2e9), Links(2e9)));
  cluster_.Disconnect("w1");
  cluster_.AddWorker(Measuring("w1", "i2"));
  EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 2e9);
  EXPECT_EQ(RatesAt(1).link_bytes_per_s(), 100e9) << "another process, perhaps elsewhere";
  EXPECT_TRUE(RunOne(Links(1e9), Links(1e9)));
  EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 1e9);
}

TEST_F(SchedulerLinksTest, RatesThatCannotBeMeanNothing) {
  Start(Measuring("w0"), Measuring("w1"));
  for (const double bad : {0.0, -1.0, 0.5, 1e30, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_TRUE(RunOne(Links(bad, bad, true), Links(bad, bad, true))) << bad;
    EXPECT_EQ(RatesAt(0).link_bytes_per_s(), 100e9) << bad;
    EXPECT_EQ(RatesAt(0).egress_bytes_per_s(), 5e9) << bad;
  }
}

TEST_F(SchedulerLinksTest, EgressThatWasAllHiddenOnlyRaisesWhatIsKnown) {
  Start(Measuring("w0"), Measuring("w1"));
  RunOne(Links(0, 3e9), Links(0, 8e9));
  EXPECT_EQ(RatesAt(0).egress_bytes_per_s(), 5e9) << "at least 3 GB/s: nothing new";
  EXPECT_EQ(RatesAt(1).egress_bytes_per_s(), 8e9);
  RunOne(Links(0, 3e9, true), Links(0, 7e9));
  EXPECT_EQ(RatesAt(0).egress_bytes_per_s(), 3e9) << "it waited";
  EXPECT_EQ(RatesAt(1).egress_bytes_per_s(), 8e9);
  cluster_.Advance(absl::Minutes(10) + absl::Seconds(1));
  EXPECT_EQ(RatesAt(0).egress_bytes_per_s(), 5e9) << "forgotten";
  EXPECT_EQ(RatesAt(1).egress_bytes_per_s(), 5e9);
}

TEST_F(SchedulerLinksTest, AWorkerWithoutRatesGetsNone) {
  auto first = Measuring("w0"), second = Measuring("w1");
  first.clear_rates();
  second.clear_rates();
  Start(first, second);
  RunOne(Links(2e9, 1e9, true), Links(2e9, 1e9, true));
  EXPECT_FALSE(cluster_.scheduler.ListWorkers().workers(0).has_rates());
}

}  // namespace
}  // namespace headwater::testing
