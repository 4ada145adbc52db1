#include "worker/assignment.h"

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/worker/assignments.h"

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
      {"WrongBlockTokens", [](A* a) { a->mutable_layout()->set_block_tokens(32); }, kInvalid, kField,
       "block_tokens is 32"},
      {"SmallBlocks",
       [](A* a) {
         a->mutable_layout()->set_block_tokens(1);
         a->mutable_plan()->set_block_tokens(1);
       },
       kInvalid, kField, "layout"},
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
