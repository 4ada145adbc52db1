// What clients send to the front door.
#include <set>
#include <string>

#include "base/rpc/grpc_status.h"
#include "coordinator/validation.h"
#include "fuzz.pb.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

using absl::StatusCode;

void CheckPrepared(const PreparedRequest& prepared, const v1::PrefillRequest& sent,
                   const CoordinatorOptions& options) {
  const v1::PrefillRequest& request = *prepared.request;
  FUZZ_EXPECT(IsName(request.request_id()), "an accepted id is a name");
  FUZZ_EXPECT(request.tenant().empty() || IsName(request.tenant()), "an accepted tenant is a name");
  FUZZ_EXPECT(request.token_ids_size() >= 1, "an accepted prompt has tokens");
  FUZZ_EXPECT(static_cast<uint64_t>(request.token_ids_size()) <= options.max_prompt_tokens,
              "a bounded prompt");
  FUZZ_EXPECT(request.priority() >= -100 && request.priority() <= 100, "a priority in range");
  FUZZ_EXPECT(request.top_logprobs() <= 20, "logprobs in range");
  FUZZ_EXPECT(request.world_size() <= kMaxWorldSize, "a world size in range");
  FUZZ_EXPECT(request.block_tokens() == 0 ||
                  (request.block_tokens() >= kMinBlockTokens && request.block_tokens() <= kMaxBlockTokens),
              "a block size in range");
  FUZZ_EXPECT(v1::KvDtype_IsValid(request.kv_dtype()) && request.kv_dtype() != 0, "a known type");
  FUZZ_EXPECT(v1::Strategy_IsValid(request.strategy()) && v1::Partition_IsValid(request.partition()),
              "known enums");
  FUZZ_EXPECT(prepared.max_token_id == request.token_ids(static_cast<int>(prepared.max_token_position)),
              "the largest token is where it is said to be");
  FUZZ_EXPECT(prepared.content_hash.size() == 32, "a SHA-256");
  if (request.quality().bound_case() == v1::Quality::kMinRecall) {
    FUZZ_EXPECT(request.quality().min_recall() > 0 && request.quality().min_recall() < 1, "a recall");
  }
  v1::PrefillRequest other = sent;
  other.set_request_id("another");
  const auto again = PrepareRequest(other, options);
  FUZZ_EXPECT(again.ok() && again->content_hash == prepared.content_hash,
              "the id is not part of the content");
}

void Run(absl::string_view input) {
  Requests requests;
  if (!requests.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  CoordinatorOptions options;
  options.max_prompt_tokens = 64;
  options.max_batch_tokens = 100;
  options.max_batch_items = 8;
  const absl::Status batch = CheckBatch(requests.batch(), options);
  if (!batch.ok()) ExpectRefusal(batch, {StatusCode::kInvalidArgument});
  if (batch.ok()) {
    FUZZ_EXPECT(requests.batch().items_size() >= 1 && requests.batch().items_size() <= 8, "a bounded batch");
    std::set<std::pair<std::string, std::string>> ids;
    for (const auto& item : requests.batch().items()) {
      if (item.request_id().empty()) continue;
      FUZZ_EXPECT(ids.emplace(item.tenant(), item.request_id()).second, "ids of a batch are distinct");
    }
  }
  for (const v1::PrefillRequest& item : requests.batch().items()) {
    const absl::StatusOr<PreparedRequest> prepared = PrepareRequest(item, options);
    if (!prepared.ok()) {
      ExpectRefusal(prepared.status(), {StatusCode::kInvalidArgument});
      continue;
    }
    CheckPrepared(*prepared, item, options);
    const absl::Status fits =
        CheckAgainstModel(*prepared, requests.model(), {"dense", "headwater"}, requests.policy(), true);
    if (!fits.ok()) {
      ExpectRefusal(fits, {StatusCode::kInvalidArgument, StatusCode::kUnimplemented});
    } else {
      FUZZ_EXPECT(prepared->max_token_id < requests.model().vocab_size(), "tokens of the vocabulary");
    }
  }
}

std::vector<std::string> Seeds() {
  Requests requests;
  requests.set_policy("headwater");
  requests.mutable_model()->set_name("tiny");
  requests.mutable_model()->set_vocab_size(256);
  requests.mutable_model()->set_max_position(64);
  v1::PrefillRequest* item = requests.mutable_batch()->add_items();
  item->set_request_id("r1");
  item->set_tenant("t");
  for (uint32_t i = 0; i < 20; ++i) item->add_token_ids(i);
  item->mutable_deadline()->set_seconds(3);
  item->mutable_quality()->set_min_recall(0.9);
  (*item->mutable_policy()->mutable_parameters())["window_tokens"] = 128;
  item->set_block_tokens(64);
  item->set_decode_pool("default");
  *requests.mutable_batch()->add_items() = *item;
  requests.mutable_batch()->mutable_items(1)->set_request_id("r2");
  requests.mutable_batch()->mutable_items(1)->mutable_quality()->mutable_time_budget()->set_nanos(5);
  return {requests.SerializeAsString(), ""};
}

const Registration kTarget({"requests", Run, Seeds, Prototype<Requests>});

}  // namespace
}  // namespace headwater::fuzz
