#include "coordinator/validation.h"

#include <cmath>
#include <functional>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/coordinator/fakes.h"

namespace headwater::testing {
namespace {

google::rpc::ErrorInfo InfoOf(const absl::Status& status) {
  google::rpc::ErrorInfo info;
  const auto payload = status.GetPayload("type.googleapis.com/google.rpc.ErrorInfo");
  if (payload.has_value()) info.ParseFromString(std::string(*payload));
  return info;
}

struct Case {
  std::string name;
  std::function<void(v1::PrefillRequest*)> change;
  // UNSPECIFIED: accepted.
  v1::ErrorReason reason = v1::ERROR_REASON_UNSPECIFIED;
  std::string value = {};
};

CoordinatorOptions SmallOptions() {
  CoordinatorOptions options;
  options.max_prompt_tokens = 1000;
  return options;
}

std::vector<Case> Cases() {
  const auto tokens = [](int count) {
    return [count](v1::PrefillRequest* r) { r->mutable_token_ids()->Resize(count, 1); };
  };
  const auto priority = [](int value) { return [value](v1::PrefillRequest* r) { r->set_priority(value); }; };
  const auto block = [](uint32_t value) {
    return [value](v1::PrefillRequest* r) { r->set_block_tokens(value); };
  };
  const auto id = [](const std::string& value) {
    return [value](v1::PrefillRequest* r) { r->set_request_id(value); };
  };
  const auto deadline = [](int64_t seconds, int nanos) {
    return [=](v1::PrefillRequest* r) {
      r->mutable_deadline()->set_seconds(seconds);
      r->mutable_deadline()->set_nanos(nanos);
    };
  };
  const auto parameters = [](int count) {
    return [count](v1::PrefillRequest* r) {
      for (int i = 0; i < count; ++i) (*r->mutable_policy()->mutable_parameters())[absl::StrCat("p", i)] = 1;
    };
  };
  const auto parameter = [](const std::string& name) {
    return [name](v1::PrefillRequest* r) { (*r->mutable_policy()->mutable_parameters())[name] = 1; };
  };
  constexpr auto kBadField = v1::ERROR_REASON_BAD_FIELD;
  constexpr auto kBadId = v1::ERROR_REASON_BAD_REQUEST_ID;
  return {
      {"no tokens", tokens(0), v1::ERROR_REASON_EMPTY_PROMPT, "empty"},
      {"one token", tokens(1)},
      {"tokens below the limit", tokens(999)},
      {"tokens at the limit", tokens(1000)},
      {"tokens over the limit", tokens(1001), v1::ERROR_REASON_PROMPT_TOO_LONG, "1001 tokens"},
      {"priority -100", priority(-100)},
      {"priority -101", priority(-101), kBadField, "-101"},
      {"priority 100", priority(100)},
      {"priority 101", priority(101), kBadField, "101"},
      {"20 logprobs", [](v1::PrefillRequest* r) { r->set_top_logprobs(20); }},
      {"21 logprobs", [](v1::PrefillRequest* r) { r->set_top_logprobs(21); }, kBadField, "21"},
      {"block 0", block(0)},
      {"block 15", block(15), kBadField, "15"},
      {"block 16", block(16)},
      {"block 17", block(17), kBadField, "17"},
      {"block 4080", block(4080)},
      {"block 4096", block(4096)},
      {"block 4112", block(4112), kBadField, "4112"},
      {"world size 256", [](v1::PrefillRequest* r) { r->set_world_size(256); }},
      {"world size 257", [](v1::PrefillRequest* r) { r->set_world_size(257); }, kBadField, "257"},
      {"unknown partition", [](v1::PrefillRequest* r) { r->set_partition(static_cast<v1::Partition>(4)); },
       kBadField, "4"},
      {"striped", [](v1::PrefillRequest* r) { r->set_partition(v1::PARTITION_STRIPED); }},
      {"unknown strategy", [](v1::PrefillRequest* r) { r->set_strategy(static_cast<v1::Strategy>(4)); },
       kBadField, "4"},
      {"sparse", [](v1::PrefillRequest* r) { r->set_strategy(v1::STRATEGY_SPARSE); }},
      {"unknown dtype", [](v1::PrefillRequest* r) { r->set_kv_dtype(static_cast<v1::KvDtype>(9)); },
       v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED, "9"},
      {"id of 64", id(std::string(64, 'a'))},
      {"id of 65", id(std::string(65, 'a')), kBadId, std::string(64, 'a')},
      {"id of all kinds", id("aZ09._-")},
      {"id with space", id("a b"), kBadId, "a b"},
      {"id with newline", id("a\nb"), kBadId, "a\\nb"},
      {"id with slash", id("a/b"), kBadId, "a/b"},
      {"tenant with slash", [](v1::PrefillRequest* r) { r->set_tenant("a/b"); }, kBadField, "a/b"},
      {"deadline of nothing", deadline(0, 0), kBadField, "0 s 0 ns"},
      {"deadline of 1 ns", deadline(0, 1)},
      {"negative deadline", deadline(-1, 0), kBadField, "-1 s"},
      {"negative nanos", deadline(1, -1), kBadField, "-1 ns"},
      {"deadline of 30 days", deadline(30 * 86400, 0)},
      {"longer deadline", deadline(30 * 86400 + 1, 0), kBadField, "2592001 s"},
      {"32 policy parameters", parameters(32)},
      {"33 policy parameters", parameters(33), v1::ERROR_REASON_BAD_POLICY_PARAMETER, "33"},
      {"policy parameter of 64", parameter(std::string(64, 'a'))},
      {"policy parameter of 65", parameter(std::string(65, 'a')), v1::ERROR_REASON_BAD_POLICY_PARAMETER,
       "(65 bytes)"},
      {"policy parameter with newline", parameter("a\nb"), v1::ERROR_REASON_BAD_POLICY_PARAMETER, "a\\nb"},
  };
}

TEST(ValidationTest, HoldsEveryLimitOfARequestByItself) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.name);
    v1::PrefillRequest request = MakeRequest("r", 10);
    c.change(&request);

    const absl::Status status = PrepareRequest(request, SmallOptions()).status();

    EXPECT_EQ(status.ok(), c.reason == v1::ERROR_REASON_UNSPECIFIED) << status;
    if (status.ok()) continue;
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ReasonName(ReasonOf(status)), ReasonName(c.reason));
    const auto info = InfoOf(status);
    EXPECT_TRUE(absl::StrContains(info.metadata().at("value"), c.value)) << info.metadata().at("value");
    EXPECT_FALSE(info.metadata().at("limit").empty());
    EXPECT_TRUE(absl::StrContains(status.message(), c.value)) << status;
  }
}

TEST(ValidationTest, AQualityIsABoundWithinItsRange) {
  const auto check = [](const std::function<void(v1::Quality*)>& set) {
    v1::PrefillRequest request = MakeRequest("r", 1);
    set(request.mutable_quality());
    return PrepareRequest(request, {}).status();
  };
  EXPECT_TRUE(check([](auto* q) { q->set_min_recall(0.95); }).ok());
  EXPECT_TRUE(check([](auto* q) { q->set_max_density(1); }).ok());
  EXPECT_TRUE(check([](auto* q) { q->mutable_time_budget()->set_nanos(1); }).ok());
  const double nan = std::nan("");
  for (const auto& [set, field] : std::vector<std::pair<std::function<void(v1::Quality*)>, std::string>>{
           {[](auto*) {}, "quality"},
           {[](auto* q) { q->set_min_recall(0); }, "quality.min_recall"},
           {[](auto* q) { q->set_min_recall(1); }, "quality.min_recall"},
           {[=](auto* q) { q->set_min_recall(nan); }, "quality.min_recall"},
           {[](auto* q) { q->set_max_density(1.01); }, "quality.max_density"},
           {[=](auto* q) { q->set_max_density(nan); }, "quality.max_density"},
           {[](auto* q) { q->mutable_time_budget(); }, "quality.time_budget"},
           {[](auto* q) { q->mutable_time_budget()->set_seconds(-1); }, "quality.time_budget"}}) {
    const absl::Status status = check(set);
    EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_BAD_FIELD) << field << ": " << status;
    EXPECT_EQ(InfoOf(status).metadata().at("field"), field);
  }
}

TEST(ValidationTest, AQualityNeedsAGpuAndThePolicyThatKeepsIt) {
  const v1::ServedModel model = MakeWorker("w").model();
  v1::PrefillRequest request = MakeRequest("r", 1);
  request.mutable_quality()->set_min_recall(0.9);
  const PreparedRequest prepared = PrepareRequest(request, {}).value();
  const std::vector<std::string> policies = {"dense", "headwater"};

  EXPECT_TRUE(CheckAgainstModel(prepared, model, policies, "headwater", true).ok());
  const absl::Status dense = CheckAgainstModel(prepared, model, policies, "dense", true);
  EXPECT_EQ(dense.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(dense.message(), "dense")) << dense;
  const absl::Status without = CheckAgainstModel(prepared, model, policies, "headwater", false);
  EXPECT_EQ(without.code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(ReasonOf(without), v1::ERROR_REASON_NOT_IMPLEMENTED);
  EXPECT_TRUE(absl::StrContains(without.message(), "quality on workers without a GPU")) << without;
}

TEST(ValidationTest, HoldsTheLimitsOfTheModel) {
  v1::ServedModel model = MakeWorker("w").model();
  model.set_max_position(10);
  const auto check = [&](v1::PrefillRequest request, const std::vector<std::string>& policies) {
    return CheckAgainstModel(PrepareRequest(request, {}).value(), model, policies, "dense");
  };
  v1::PrefillRequest request = MakeRequest("r", 9);
  EXPECT_TRUE(check(request, {"dense"}).ok());
  request.add_token_ids(255);
  EXPECT_TRUE(check(request, {"dense"}).ok()) << "at the limit of length and vocabulary";
  request.set_token_ids(3, 256);
  const absl::Status token = check(request, {"dense"});
  EXPECT_EQ(ReasonOf(token), v1::ERROR_REASON_TOKEN_OUT_OF_RANGE);
  EXPECT_EQ(InfoOf(token).metadata().at("field"), "token_ids[3]");
  EXPECT_EQ(InfoOf(token).metadata().at("value"), "256");
  request.set_token_ids(3, 1);
  request.add_token_ids(1);
  EXPECT_EQ(ReasonOf(check(request, {"dense"})), v1::ERROR_REASON_PROMPT_TOO_LONG);
}

TEST(ValidationTest, AnUnknownPolicyIsRefusedWithTheKnown) {
  const v1::ServedModel model = MakeWorker("w").model();
  const PreparedRequest prepared = PrepareRequest(MakeRequest("r", 9), {}).value();

  const absl::Status status = CheckAgainstModel(prepared, model, {"a_shape", "dense"}, "magic");

  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_UNKNOWN_POLICY);
  EXPECT_TRUE(absl::StrContains(status.message(), "magic"));
  EXPECT_TRUE(absl::StrContains(status.message(), "a_shape, dense"));
}

TEST(ValidationTest, ContentHashIgnoresTheIdAndTheWishForAnExplanation) {
  v1::PrefillRequest request = MakeRequest("a", 9);
  for (int i = 0; i < 10; ++i)
    (*request.mutable_policy()->mutable_parameters())[absl::StrCat("parameter", i)] = i;
  const std::string hash = PrepareRequest(request, {}).value().content_hash;

  v1::PrefillRequest renamed;
  ASSERT_TRUE(renamed.ParseFromString(request.SerializeAsString()));
  renamed.set_request_id("b");
  renamed.set_explain(true);
  EXPECT_EQ(PrepareRequest(renamed, {}).value().content_hash, hash);
  v1::PrefillRequest changed = request;
  changed.set_token_ids(8, 9);
  EXPECT_NE(PrepareRequest(changed, {}).value().content_hash, hash);
  changed = request;
  (*changed.mutable_policy()->mutable_parameters())["parameter3"] = 4;
  EXPECT_NE(PrepareRequest(changed, {}).value().content_hash, hash);
}

TEST(ValidationTest, GivesAnIdToARequestWithoutOne) {
  const v1::PrefillRequest request = MakeRequest("", 1);
  const std::string first = PrepareRequest(request, {}).value().request->request_id();
  const std::string second = PrepareRequest(request, {}).value().request->request_id();
  EXPECT_TRUE(IsName(first));
  EXPECT_NE(first, second);
}

TEST(ValidationTest, HoldsTheLimitsOfABatch) {
  CoordinatorOptions options;
  options.max_batch_items = 3;
  options.max_batch_tokens = 30;
  v1::BatchPrefillRequest batch;
  EXPECT_EQ(ReasonOf(CheckBatch(batch, options)), v1::ERROR_REASON_BAD_FIELD);
  for (const char* id : {"a", "", ""}) *batch.add_items() = MakeRequest(id, 10);
  EXPECT_TRUE(CheckBatch(batch, options).ok()) << "at both limits; empty ids do not collide";
  batch.mutable_items(2)->add_token_ids(1);
  EXPECT_EQ(ReasonOf(CheckBatch(batch, options)), v1::ERROR_REASON_BATCH_TOO_LARGE);
  *batch.mutable_items(2) = MakeRequest("a", 1);
  EXPECT_EQ(ReasonOf(CheckBatch(batch, options)), v1::ERROR_REASON_BAD_REQUEST_ID);
  batch.mutable_items(2)->set_tenant("other");
  EXPECT_TRUE(CheckBatch(batch, options).ok()) << "ids are names within a tenant";
  *batch.add_items() = MakeRequest("d", 1);
  EXPECT_EQ(ReasonOf(CheckBatch(batch, options)), v1::ERROR_REASON_BATCH_TOO_LARGE);
}

}  // namespace
}  // namespace headwater::testing
