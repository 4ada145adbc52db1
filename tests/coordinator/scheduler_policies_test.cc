// Workers of one model that differ in their policies: who gets what.
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

v1::WorkerRegistration MakeGpu(const std::string& id, uint64_t max_tokens = 0) {
  v1::WorkerRegistration registration = MakeWorker(id);
  registration.add_policies("headwater");
  registration.set_default_policy("headwater");
  registration.set_serves_quality(true);
  registration.add_policy_limits()->set_name("headwater");
  registration.mutable_policy_limits(0)->set_max_tokens(max_tokens);
  return registration;
}

v1::PrefillRequest MakeSparse(const std::string& id, int num_tokens = 1000) {
  v1::PrefillRequest request = MakeRequest(id, num_tokens);
  request.mutable_policy()->set_name("headwater");
  return request;
}

// A cluster whose one worker, w0, has a job.
void Occupy(FakeCluster* cluster) {
  cluster->AddDecodeNode();
  cluster->AddWorker(MakeGpu("w0"));
  cluster->Submit(MakeSparse("r"));
  cluster->decode.AnswerAll();
  cluster->TakeAssignment("w0");
}

// Ends the job that w0 has.
void EndFirst(FakeCluster* cluster) {
  cluster->Complete("w0");
  cluster->decode.AnswerAll();
}

TEST(SchedulerPoliciesTest, AQueuedPromptPassesWorkersThatCameLaterWithoutItsPolicy) {
  FakeCluster cluster;
  Occupy(&cluster);
  const auto sparse = cluster.Submit(MakeSparse("sparse"));
  ASSERT_TRUE(sparse->accepted());
  cluster.AddWorker("w1");
  cluster.decode.AnswerAll();
  EXPECT_FALSE(cluster.HasMessage("w1")) << "it has no such policy";

  EndFirst(&cluster);
  EXPECT_EQ(cluster.TakeAssignment("w0").request_id(), "sparse");
  EndFirst(&cluster);
  EXPECT_TRUE(sparse->result().ok()) << sparse->result();
}

TEST(SchedulerPoliciesTest, AQueuedPromptWithAQualityPassesWorkersThatServeNone) {
  FakeCluster cluster;
  Occupy(&cluster);
  v1::PrefillRequest request = MakeSparse("bound");
  request.mutable_quality()->set_min_recall(0.9);
  const auto bound = cluster.Submit(request);
  ASSERT_TRUE(bound->accepted());
  auto blind = MakeGpu("w1");
  blind.set_serves_quality(false);
  cluster.AddWorker(blind);
  cluster.decode.AnswerAll();
  EXPECT_FALSE(cluster.HasMessage("w1"));

  EndFirst(&cluster);
  EXPECT_EQ(cluster.TakeAssignment("w0").quality().min_recall(), 0.9);
  EndFirst(&cluster);
  EXPECT_TRUE(bound->result().ok()) << bound->result();
}

TEST(SchedulerPoliciesTest, WithoutAWorkerThatHasItsPolicyAPromptFailsInTimeAndHoldsUpNobody) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker(MakeGpu("w0"));
  v1::PrefillRequest request = MakeSparse("r");
  request.mutable_quality()->set_min_recall(0.9);
  const auto lost = cluster.Submit(request);
  cluster.decode.AnswerAll();
  cluster.TakeAssignment("w0");
  cluster.AddWorker("w1");
  cluster.Disconnect("w0");
  const auto dense = cluster.Submit(MakeRequest("dense", 10));
  cluster.decode.AnswerAll();
  EXPECT_EQ(cluster.TakeAssignment("w1").request_id(), "dense");

  cluster.Advance(absl::Seconds(31));
  cluster.decode.AnswerAll();
  EXPECT_EQ(ReasonOf(lost->result()), v1::ERROR_REASON_NO_WORKERS);
  EXPECT_TRUE(absl::StrContains(lost->result().message(), "with policy headwater that serve a quality"))
      << lost->result();
}

TEST(SchedulerPoliciesTest, LimitsOfAPolicyBindPromptsWithItsDefaultParametersAlone) {
  FakeCluster cluster;
  cluster.AddDecodeNode();
  cluster.AddWorker(MakeGpu("w0", 500));
  const auto refused = cluster.Submit(MakeSparse("refused"));
  EXPECT_EQ(ReasonOf(refused->result()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  EXPECT_TRUE(
      absl::StrContains(refused->result().message(), "under policy headwater their memory holds 500"));

  v1::PrefillRequest request = MakeSparse("tuned");
  (*request.mutable_policy()->mutable_parameters())["dense_below_tokens"] = 1e6;
  const auto tuned = cluster.Submit(request);
  EXPECT_TRUE(tuned->accepted()) << "the worker knows what it holds with these";
  cluster.decode.AnswerAll();
  cluster.TakeAssignment("w0");

  cluster.AddWorker(MakeGpu("w1", 2000));
  cluster.AddWorker(MakeGpu("w2", 500));
  request.set_request_id("large");
  cluster.Submit(request);
  cluster.decode.AnswerAll();
  EXPECT_EQ(cluster.TakeAssignment("w1").request_id(), "large") << "it holds so much by its own word";
  request.set_request_id("larger");
  const auto larger = cluster.Submit(request);
  cluster.decode.AnswerAll();
  EXPECT_TRUE(larger->accepted());
  EXPECT_FALSE(cluster.HasMessage("w2")) << "w1 is waited for";
}

}  // namespace
}  // namespace headwater::testing
