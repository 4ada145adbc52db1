#include "coordinator/validation.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include <openssl/sha.h>

#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr int32_t kMaxPriority = 100;
constexpr uint32_t kMaxTopLogprobs = 20;
constexpr int64_t kMaxDeadlineSeconds = int64_t{30} * 24 * 3600;
constexpr int32_t kNanosPerSecond = 1'000'000'000;

absl::Status Refuse(v1::ErrorReason reason, absl::string_view field, const std::string& value,
                    const std::string& limit) {
  return MakeError(absl::StatusCode::kInvalidArgument, reason,
                   absl::StrCat(field, " is ", value, "; ", limit, " is wanted"),
                   {{"field", std::string(field)}, {"value", value}, {"limit", limit}});
}

absl::Status BadField(absl::string_view field, const std::string& value, const std::string& limit) {
  return Refuse(v1::ERROR_REASON_BAD_FIELD, field, value, limit);
}

std::string Quoted(absl::string_view text) { return absl::StrCat("\"", Printable(text), "\""); }

absl::Status CheckNames(const v1::PrefillRequest& request) {
  const std::string wanted = absl::StrCat("1 to ", kMaxNameLength, " characters of [A-Za-z0-9._-]");
  if (!request.request_id().empty() && !IsName(request.request_id())) {
    return Refuse(v1::ERROR_REASON_BAD_REQUEST_ID, "request_id",
                  absl::StrCat(Quoted(request.request_id()), " (", request.request_id().size(), " bytes)"),
                  wanted);
  }
  if (!request.tenant().empty() && !IsName(request.tenant())) {
    return BadField("tenant", Quoted(request.tenant()), wanted);
  }
  return absl::OkStatus();
}

absl::Status CheckRanges(const v1::PrefillRequest& request) {
  if (request.priority() < -kMaxPriority || request.priority() > kMaxPriority) {
    return BadField("priority", absl::StrCat(request.priority()),
                    absl::StrCat(-kMaxPriority, " to ", kMaxPriority));
  }
  if (request.top_logprobs() > kMaxTopLogprobs) {
    return BadField("top_logprobs", absl::StrCat(request.top_logprobs()),
                    absl::StrCat("at most ", kMaxTopLogprobs));
  }
  const uint32_t block_tokens = request.block_tokens();
  if (block_tokens != 0 &&
      (block_tokens < kMinBlockTokens || block_tokens > kMaxBlockTokens || block_tokens % 16 != 0)) {
    return BadField("block_tokens", absl::StrCat(block_tokens),
                    absl::StrCat("0 or a multiple of 16 in ", kMinBlockTokens, " to ", kMaxBlockTokens));
  }
  if (request.world_size() > kMaxWorldSize) {
    return BadField("world_size", absl::StrCat(request.world_size()),
                    absl::StrCat("at most ", kMaxWorldSize));
  }
  if (!v1::Partition_IsValid(request.partition())) {
    return BadField("partition", absl::StrCat(static_cast<int>(request.partition())),
                    "a value of headwater.v1.Partition");
  }
  if (!v1::Strategy_IsValid(request.strategy())) {
    return BadField("strategy", absl::StrCat(static_cast<int>(request.strategy())),
                    "a value of headwater.v1.Strategy");
  }
  if (!v1::KvDtype_IsValid(request.kv_dtype())) {
    return Refuse(v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED, "kv_dtype",
                  absl::StrCat(static_cast<int>(request.kv_dtype())), "a value of headwater.v1.KvDtype");
  }
  if (request.policy().parameters_size() > kMaxPolicyParameters) {
    return Refuse(v1::ERROR_REASON_BAD_POLICY_PARAMETER, "policy.parameters",
                  absl::StrCat(request.policy().parameters_size(), " entries"),
                  absl::StrCat("at most ", kMaxPolicyParameters));
  }
  for (const auto& [name, value] : request.policy().parameters()) {
    if (IsName(name)) continue;
    return Refuse(v1::ERROR_REASON_BAD_POLICY_PARAMETER, "policy.parameters",
                  absl::StrCat("with a name ", Quoted(name), " (", name.size(), " bytes)"),
                  absl::StrCat("1 to ", kMaxNameLength, " characters of [A-Za-z0-9._-]"));
  }
  return absl::OkStatus();
}

absl::Status CheckDuration(absl::string_view field, const google::protobuf::Duration& duration) {
  const bool valid = duration.seconds() >= 0 && duration.seconds() <= kMaxDeadlineSeconds &&
                     duration.nanos() >= 0 && duration.nanos() < kNanosPerSecond &&
                     (duration.seconds() > 0 || duration.nanos() > 0);
  if (valid) return absl::OkStatus();
  return BadField(field, absl::StrCat(duration.seconds(), " s ", duration.nanos(), " ns"),
                  absl::StrCat("more than 0 and at most ", kMaxDeadlineSeconds, " s"));
}

absl::Status CheckDeadline(const v1::PrefillRequest& request) {
  return request.has_deadline() ? CheckDuration("deadline", request.deadline()) : absl::OkStatus();
}

// The same ranges as the worker's.
absl::Status CheckQuality(const v1::Quality& quality) {
  switch (quality.bound_case()) {
    case v1::Quality::kMinRecall:
      if (quality.min_recall() > 0 && quality.min_recall() < 1) return absl::OkStatus();
      return BadField("quality.min_recall", absl::StrCat(quality.min_recall()), "over 0 and below 1");
    case v1::Quality::kMaxDensity:
      if (quality.max_density() > 0 && quality.max_density() <= 1) return absl::OkStatus();
      return BadField("quality.max_density", absl::StrCat(quality.max_density()), "over 0 and at most 1");
    case v1::Quality::kTimeBudget:
      return CheckDuration("quality.time_budget", quality.time_budget());
    case v1::Quality::BOUND_NOT_SET:
      break;
  }
  return BadField("quality", "without a bound", "one of min_recall, max_density and time_budget");
}

std::string ContentHash(const v1::PrefillRequest& request) {
  v1::PrefillRequest content = request;
  content.clear_request_id();
  content.clear_explain();
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    content.SerializeToCodedStream(&coded);
  }
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

}  // namespace

bool IsName(absl::string_view text, size_t max_length) {
  if (text.empty() || text.size() > max_length) return false;
  return std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
}

std::string Printable(absl::string_view text) {
  const bool cut = text.size() > kMaxNameLength;
  return absl::StrCat(absl::CHexEscape(text.substr(0, kMaxNameLength)), cut ? "..." : "");
}

absl::StatusOr<PreparedRequest> PrepareRequest(const v1::PrefillRequest& request,
                                               const CoordinatorOptions& options,
                                               absl::string_view traceparent, absl::string_view tracestate) {
  HW_RETURN_IF_ERROR(CheckNames(request));
  if (request.token_ids().empty()) {
    return Refuse(v1::ERROR_REASON_EMPTY_PROMPT, "token_ids", "empty", "at least 1 token");
  }
  const auto num_tokens = static_cast<uint64_t>(request.token_ids_size());
  if (num_tokens > options.max_prompt_tokens) {
    return Refuse(v1::ERROR_REASON_PROMPT_TOO_LONG, "token_ids", absl::StrCat(num_tokens, " tokens"),
                  absl::StrCat("at most ", options.max_prompt_tokens));
  }
  HW_RETURN_IF_ERROR(CheckRanges(request));
  HW_RETURN_IF_ERROR(CheckDeadline(request));
  if (request.has_quality()) HW_RETURN_IF_ERROR(CheckQuality(request.quality()));

  PreparedRequest prepared;
  prepared.content_hash = ContentHash(request);
  const auto largest = std::max_element(request.token_ids().begin(), request.token_ids().end());
  prepared.max_token_id = *largest;
  prepared.max_token_position = static_cast<uint64_t>(largest - request.token_ids().begin());
  auto filled = std::make_shared<v1::PrefillRequest>(request);
  if (filled->request_id().empty()) filled->set_request_id(RandomId());
  if (filled->kv_dtype() == v1::KV_DTYPE_UNSPECIFIED) filled->set_kv_dtype(v1::KV_DTYPE_BF16);
  prepared.request = std::move(filled);
  prepared.trace = ContinueTrace(traceparent, tracestate);
  return prepared;
}

absl::Status CheckAgainstModel(const PreparedRequest& prepared, const v1::ServedModel& model,
                               const std::vector<std::string>& policies, const std::string& policy,
                               bool serves_quality) {
  const auto num_tokens = static_cast<uint64_t>(prepared.request->token_ids_size());
  if (num_tokens > model.max_position()) {
    return Refuse(v1::ERROR_REASON_PROMPT_TOO_LONG, "token_ids", absl::StrCat(num_tokens, " tokens"),
                  absl::StrCat("at most ", model.max_position(), " (positions of model ", model.name(), ")"));
  }
  if (prepared.max_token_id >= model.vocab_size()) {
    return Refuse(
        v1::ERROR_REASON_TOKEN_OUT_OF_RANGE, absl::StrCat("token_ids[", prepared.max_token_position, "]"),
        absl::StrCat(prepared.max_token_id),
        absl::StrCat("less than ", model.vocab_size(), " (vocabulary of model ", model.name(), ")"));
  }
  if (std::find(policies.begin(), policies.end(), policy) == policies.end()) {
    return Refuse(v1::ERROR_REASON_UNKNOWN_POLICY, "policy.name", Quoted(policy),
                  absl::StrCat("one of {", absl::StrJoin(policies, ", "), "}"));
  }
  if (!prepared.request->has_quality()) return absl::OkStatus();
  if (!serves_quality) return NotImplemented("PrefillRequest.quality on workers without a GPU");
  if (policy == kQualityPolicy) return absl::OkStatus();
  return BadField("quality", absl::StrCat("set with policy ", Quoted(policy)),
                  absl::StrCat("policy \"", kQualityPolicy, "\""));
}

absl::Status CheckBatch(const v1::BatchPrefillRequest& batch, const CoordinatorOptions& options) {
  if (batch.items().empty()) return BadField("items", "empty", "at least 1 item");
  if (batch.items_size() > options.max_batch_items) {
    return Refuse(v1::ERROR_REASON_BATCH_TOO_LARGE, "items", absl::StrCat(batch.items_size(), " items"),
                  absl::StrCat("at most ", options.max_batch_items));
  }
  uint64_t num_tokens = 0;
  absl::flat_hash_set<std::pair<absl::string_view, absl::string_view>> ids;
  for (int i = 0; i < batch.items_size(); ++i) {
    const v1::PrefillRequest& item = batch.items(i);
    num_tokens += static_cast<uint64_t>(item.token_ids_size());
    if (!item.request_id().empty() && !ids.insert({item.tenant(), item.request_id()}).second) {
      return Refuse(v1::ERROR_REASON_BAD_REQUEST_ID, absl::StrCat("items[", i, "].request_id"),
                    Quoted(item.request_id()), "an id that no other item of the batch has");
    }
  }
  if (num_tokens > options.max_batch_tokens) {
    return Refuse(v1::ERROR_REASON_BATCH_TOO_LARGE, "items", absl::StrCat(num_tokens, " tokens in sum"),
                  absl::StrCat("at most ", options.max_batch_tokens));
  }
  return absl::OkStatus();
}

absl::Status NotImplemented(absl::string_view what) {
  return MakeError(absl::StatusCode::kUnimplemented, v1::ERROR_REASON_NOT_IMPLEMENTED,
                   absl::StrCat(what, " is not implemented"), {{"field", std::string(what)}});
}

}  // namespace headwater
