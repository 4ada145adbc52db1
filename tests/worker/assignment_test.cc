#include "worker/assignment.h"

#include <functional>
#include <limits>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/worker/assignments.h"
#include "worker/policy_tables.h"

namespace headwater::testing {
namespace {

using ::testing::HasSubstr;

struct BadAssignment {
  std::string name;
  std::function<void(v1::PrefillAssignment*)> spoil;
  absl::StatusCode code;
  v1::ErrorReason reason;
  std::string says;  // part of the message
};

class AssignmentTest : public ::testing::TestWithParam<BadAssignment> {};

TEST(AssignmentCheckTest, TurnsAGoodAssignmentIntoAJob) {
  AssignmentFixture fixture;
  v1::PrefillAssignment assignment = fixture.Make(100, 2, 1);
  assignment.set_top_logprobs(20);

  const auto job = CheckAssignment(assignment, fixture.context());

  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->request_id, "r1");
  EXPECT_EQ(job->epoch, 3u);
  EXPECT_EQ(job->rank, 1);
  EXPECT_EQ(job->world_size(), 2);
  EXPECT_EQ(job->tokens.size(), 100u);
  EXPECT_EQ(job->policy->name(), "dense");
  EXPECT_EQ(job->top_logprobs, 20);
  EXPECT_GT(job->plan.total_bytes(), 0u);
}

// Serves headwater and qualities as a GPU would, but for computing.
class QualityBackend final : public PrefillBackend {
 public:
  explicit QualityBackend(PrefillBackend* cpu) : cpu_(cpu) {}
  const ModelConfig& config() const override { return cpu_->config(); }
  const std::string& fingerprint() const override { return cpu_->fingerprint(); }
  std::vector<std::string> policies() const override { return {"dense", "headwater"}; }
  std::string default_policy() const override { return "headwater"; }
  bool serves_quality() const override { return true; }
  void AddTables(const std::map<std::string, double>& given,
                 kernels::PolicyParameters* parameters) const override {
    PolicyTables tables;
    tables.thresholds = {0.5f};
    AddPolicyTables(tables, given, parameters);
  }
  uint32_t max_world_size() const override { return 1; }
  v1::MemoryModel memory_model() const override { return cpu_->memory_model(); }
  std::string Describe() const override { return "a test's"; }
  absl::StatusOr<MemoryPlan> Plan(const kernels::PatternPolicy&, kernels::DType, int64_t, int64_t, int64_t,
                                  int, int64_t, v1::Strategy) const override {
    return MemoryPlan{};
  }
  absl::Status Reserve(const PrefillJob&) override { return absl::OkStatus(); }
  absl::StatusOr<PrefillResult> Run(const PrefillJob&, const PrefillContext&) override {
    return absl::UnimplementedError("a test");
  }

 private:
  PrefillBackend* const cpu_;
};

TEST(AssignmentCheckTest, AnAssignmentWithoutAPolicyGetsTheDefaultWithItsTables) {
  AssignmentFixture fixture;
  QualityBackend backend(fixture.NewBackend());
  v1::PrefillAssignment assignment = fixture.Make(100, 1, 0);
  assignment.clear_policy();

  const auto job = CheckAssignment(assignment, {&backend, "w1"});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->policy->name(), "headwater");
  const auto& own = std::get<kernels::HeadwaterParameters>(job->policy->parameters());
  EXPECT_EQ(own.thresholds, std::vector<float>{0.5f});
  EXPECT_EQ(own.dense_below_tokens, 16384);

  (*assignment.mutable_policy()->mutable_parameters())["threshold"] = 0.2;
  const auto tuned = CheckAssignment(assignment, {&backend, "w1"});
  ASSERT_TRUE(tuned.ok()) << tuned.status();
  EXPECT_TRUE(std::get<kernels::HeadwaterParameters>(tuned->policy->parameters()).thresholds.empty());
}

TEST(AssignmentCheckTest, TakesAQualityOfPolicyHeadwaterAlone) {
  AssignmentFixture fixture;
  QualityBackend backend(fixture.NewBackend());
  v1::PrefillAssignment assignment = fixture.Make(100, 1, 0);
  assignment.mutable_quality()->set_max_density(0.25);

  assignment.mutable_policy()->set_name("dense");
  const auto dense = CheckAssignment(assignment, {&backend, "w1"});
  EXPECT_EQ(dense.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(dense.status().message()), HasSubstr("policy 'dense'"));

  assignment.mutable_policy()->set_name("headwater");
  const auto job = CheckAssignment(assignment, {&backend, "w1"});
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->quality.max_density, 0.25);
  EXPECT_EQ(std::get<kernels::HeadwaterParameters>(job->policy->parameters()).dense_below_tokens, 0)
      << "a short prompt is bound, too";

  assignment.mutable_quality()->set_max_density(7);
  EXPECT_EQ(ReasonOf(CheckAssignment(assignment, {&backend, "w1"}).status()), v1::ERROR_REASON_BAD_FIELD);
}

TEST_P(AssignmentTest, IsRefusedNamingTheField) {
  AssignmentFixture fixture;
  v1::PrefillAssignment assignment = fixture.Make(100, 2, 1);
  GetParam().spoil(&assignment);

  const auto job = CheckAssignment(assignment, fixture.context());

  EXPECT_EQ(job.status().code(), GetParam().code) << job.status();
  EXPECT_EQ(ReasonOf(job.status()), GetParam().reason) << job.status();
  EXPECT_THAT(std::string(job.status().message()), HasSubstr(GetParam().says));
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kField = v1::ERROR_REASON_BAD_FIELD;
using A = v1::PrefillAssignment;

// A good one.
v1::ResumePoint* SetResume(A* assignment) {
  v1::ResumePoint* const resume = assignment->mutable_resume();
  resume->set_layer(2);
  resume->set_epoch(2);
  resume->set_world_size(2);
  resume->set_partition(v1::PARTITION_CONTIGUOUS);
  resume->set_block_tokens(16);
  resume->add_providers(1);
  resume->add_providers(0);
  return resume;
}

TEST(AssignmentCheckTest, TakesTheStrategyAndPlansItsBuffers) {
  AssignmentFixture fixture;
  for (const auto strategy : {v1::STRATEGY_RING, v1::STRATEGY_ALLGATHER, v1::STRATEGY_SPARSE}) {
    v1::PrefillAssignment assignment = fixture.Make(100, 2, 1);
    assignment.mutable_plan()->set_strategy(strategy);
    const auto job = CheckAssignment(assignment, fixture.context());
    ASSERT_TRUE(job.ok()) << job.status();
    EXPECT_EQ(job->strategy, strategy);
    EXPECT_EQ(job->plan.send_kv > 0, strategy == v1::STRATEGY_SPARSE);
  }
  // Of a coordinator that knows none.
  v1::PrefillAssignment assignment = fixture.Make(100, 2, 1);
  assignment.mutable_plan()->clear_strategy();
  EXPECT_EQ(CheckAssignment(assignment, fixture.context())->strategy, v1::STRATEGY_RING);
}

TEST(AssignmentCheckTest, TakesAResumePoint) {
  AssignmentFixture fixture;
  v1::PrefillAssignment assignment = fixture.Make(100, 2, 1);
  SetResume(&assignment);
  const auto job = CheckAssignment(assignment, fixture.context());
  ASSERT_TRUE(job.ok()) << job.status();
  ASSERT_TRUE(job->resume.has_value());
  EXPECT_EQ(job->resume->layer, 2);
  EXPECT_EQ(job->resume->epoch, 2u);
  EXPECT_EQ(job->resume->providers, (std::vector<int>{1, 0}));
  EXPECT_EQ(NumTokens(job->resume->partition[0]), 64);
  EXPECT_EQ(job->plan.checkpoint, 100u * 4 * static_cast<uint64_t>(fixture.model().config().hidden_size));
}

std::vector<BadAssignment> BadAssignments() {
  return {
      {"NoRequestId", [](A* a) { a->clear_request_id(); }, kInvalid, v1::ERROR_REASON_BAD_REQUEST_ID, "''"},
      {"LongRequestId", [](A* a) { a->set_request_id(std::string(65, 'x')); }, kInvalid,
       v1::ERROR_REASON_BAD_REQUEST_ID, "xxx"},
      {"RequestIdWithSlash", [](A* a) { a->set_request_id("a/../b"); }, kInvalid,
       v1::ERROR_REASON_BAD_REQUEST_ID, "a/../b"},
      {"NoPlan", [](A* a) { a->clear_plan(); }, kInvalid, kField, "world_size 0"},
      {"HugeWorld", [](A* a) { a->mutable_plan()->set_world_size(4'000'000'000u); }, kInvalid, kField,
       "4000000000"},
      {"RankOutside", [](A* a) { a->set_rank(2); }, kInvalid, kField, "rank 2"},
      {"TooFewWorkerIds", [](A* a) { a->mutable_plan()->mutable_worker_ids()->RemoveLast(); }, kInvalid,
       kField, "worker_ids names 1"},
      {"AnotherWorker", [](A* a) { a->mutable_plan()->set_worker_ids(1, "other"); }, kInvalid, kField,
       "other"},
      {"NoRendezvous", [](A* a) { a->clear_rendezvous_address(); }, kInvalid, kField, "rendezvous_address"},
      {"RendezvousWithoutPort", [](A* a) { a->set_rendezvous_address("host"); }, kInvalid, kField,
       "rendezvous_address"},
      {"NoTokens", [](A* a) { a->clear_token_ids(); }, kInvalid, v1::ERROR_REASON_EMPTY_PROMPT, "no tokens"},
      {"TokenOverVocabulary", [](A* a) { a->set_token_ids(7, 0xffffffffu); }, kInvalid,
       v1::ERROR_REASON_TOKEN_OUT_OF_RANGE, "token 7 has id 4294967295"},
      {"TooManyTokens", [](A* a) { a->mutable_token_ids()->Resize(1 << 20, 1); }, kInvalid,
       v1::ERROR_REASON_PROMPT_TOO_LONG, "1048576"},
      {"AnotherModel", [](A* a) { a->mutable_layout()->set_model_fingerprint("0123"); },
       absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MODEL_MISMATCH, "0123"},
      {"NoDtype", [](A* a) { a->mutable_layout()->set_dtype(v1::KV_DTYPE_UNSPECIFIED); }, kInvalid,
       v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED, "dtype 0"},
      {"UnknownDtype", [](A* a) { a->mutable_layout()->set_dtype(static_cast<v1::KvDtype>(99)); }, kInvalid,
       v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED, "dtype 99"},
      {"WrongLayers", [](A* a) { a->mutable_layout()->set_num_layers(77); }, kInvalid, kField,
       "num_layers is 77"},
      {"WrongHeads", [](A* a) { a->mutable_layout()->set_num_kv_heads(0); }, kInvalid, kField,
       "num_kv_heads is 0"},
      {"WrongHeadDim", [](A* a) { a->mutable_layout()->set_head_dim(1 << 30); }, kInvalid, kField,
       "head_dim is"},
      {"WrongTokens", [](A* a) { a->mutable_layout()->set_num_tokens(101); }, kInvalid, kField,
       "num_tokens is 101"},
      {"ResumeAtLayerZero", [](A* a) { SetResume(a)->set_layer(0); }, kInvalid, kField, "resume.layer 0"},
      {"ResumePastTheEnd", [](A* a) { SetResume(a)->set_layer(3); }, kInvalid, kField, "resume.layer 3"},
      {"ResumeFromItself", [](A* a) { SetResume(a)->set_epoch(3); }, kInvalid, kField, "resume.epoch 3"},
      {"ResumeFromOneRank", [](A* a) { SetResume(a)->set_world_size(1); }, kInvalid, kField,
       "resume.world_size 1"},
      {"ResumeFromHugeWorld", [](A* a) { SetResume(a)->set_world_size(1u << 31); }, kInvalid, kField,
       "resume.world_size 2147483648"},
      {"ResumeWithoutProviders", [](A* a) { SetResume(a)->clear_providers(); }, kInvalid, kField,
       "resume.providers names 0"},
      {"ResumeProviderOutside", [](A* a) { SetResume(a)->set_providers(1, 2); }, kInvalid, kField,
       "resume.providers names rank 2"},
      {"ResumePartition", [](A* a) { SetResume(a)->set_partition(v1::PARTITION_UNSPECIFIED); }, kInvalid,
       kField, "resume:"},
      {"ResumeBlocks", [](A* a) { SetResume(a)->set_block_tokens(0); }, kInvalid, kField,
       "resume: block_tokens 0"},
      {"WrongBlockTokens", [](A* a) { a->mutable_layout()->set_block_tokens(32); }, kInvalid, kField,
       "block_tokens is 32"},
      {"SmallBlocks",
       [](A* a) {
         a->mutable_layout()->set_block_tokens(1);
         a->mutable_plan()->set_block_tokens(1);
       },
       kInvalid, kField, "layout"},
      {"UnknownStrategy", [](A* a) { a->mutable_plan()->set_strategy(static_cast<v1::Strategy>(4)); },
       kInvalid, kField, "plan.strategy 4"},
      {"NoPartition", [](A* a) { a->mutable_plan()->set_partition(v1::PARTITION_UNSPECIFIED); }, kInvalid,
       kField, "partition 0"},
      {"NoAddress", [](A* a) { a->mutable_destination()->clear_kv_address(); }, kInvalid, kField,
       "kv_address"},
      {"BadPort", [](A* a) { a->mutable_destination()->set_kv_address("h:70000"); }, kInvalid, kField,
       "h:70000"},
      {"NoSession", [](A* a) { a->mutable_destination()->clear_session_id(); }, kInvalid, kField,
       "session_id"},
      {"NoToken", [](A* a) { a->mutable_destination()->clear_session_token(); }, kInvalid, kField,
       "session_token"},
      {"LongToken", [](A* a) { a->mutable_destination()->set_session_token(std::string(300, 't')); },
       kInvalid, kField, "300 bytes"},
      {"UnknownPolicy", [](A* a) { a->mutable_policy()->set_name("magic"); }, kInvalid,
       v1::ERROR_REASON_UNKNOWN_POLICY, "magic"},
      {"UnknownParameter", [](A* a) { (*a->mutable_policy()->mutable_parameters())["x"] = 1; }, kInvalid,
       v1::ERROR_REASON_BAD_POLICY_PARAMETER, "x"},
      {"ParameterNotANumber",
       [](A* a) {
         a->mutable_policy()->set_name("a_shape");
         (*a->mutable_policy()->mutable_parameters())["window_tokens"] =
             std::numeric_limits<double>::quiet_NaN();
       },
       kInvalid, v1::ERROR_REASON_BAD_POLICY_PARAMETER, "window_tokens"},
      {"Quality", [](A* a) { a->mutable_quality()->set_min_recall(0.9); }, absl::StatusCode::kUnimplemented,
       v1::ERROR_REASON_NOT_IMPLEMENTED, "needs a GPU"},
      {"TooManyLogprobs", [](A* a) { a->set_top_logprobs(21); }, kInvalid, kField, "top_logprobs 21"},
  };
}

INSTANTIATE_TEST_SUITE_P(All, AssignmentTest, ::testing::ValuesIn(BadAssignments()),
                         [](const auto& row) { return row.param.name; });

TEST(AssignmentCheckTest, RefusesAPlanOverTheBudgetWithBothNumbers) {
  AssignmentFixture fixture;
  const auto fits = CheckAssignment(fixture.Make(2000, 1, 0), fixture.context());
  ASSERT_TRUE(fits.ok()) << fits.status();
  const uint64_t budget = fixture.model().weight_bytes() + fits->plan.total_bytes() - 1;

  const auto job = CheckAssignment(fixture.Make(2000, 1, 0), fixture.context(1, budget));

  EXPECT_EQ(job.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(job.status()), v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE);
  EXPECT_THAT(std::string(job.status().message()), HasSubstr(std::to_string(fits->plan.total_bytes())));
}

}  // namespace
}  // namespace headwater::testing
