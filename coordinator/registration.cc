#include "coordinator/registration.h"

#include <algorithm>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "coordinator/validation.h"

namespace headwater {
namespace {

constexpr size_t kMaxFingerprintLength = 128;
constexpr size_t kMaxModelNameLength = 128;
constexpr int kMaxPolicies = 64;
constexpr uint64_t kMaxVocab = uint64_t{1} << 24;
constexpr uint64_t kMaxPosition = uint64_t{1} << 32;
constexpr uint64_t kMaxShape = 4096;
constexpr uint64_t kMaxBytes = uint64_t{1} << 50;
constexpr uint64_t kMaxBytesPerToken = uint64_t{1} << 32;
constexpr uint64_t kMaxWidth = uint64_t{1} << 24;
// FLOP or bytes a second; seconds.
constexpr double kLeastRate = 1, kMostRate = 1e18, kMostLatency = 60;

absl::Status Bad(absl::string_view field, const std::string& value, const std::string& limit,
                 absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
  return MakeError(code, v1::ERROR_REASON_BAD_FIELD,
                   absl::StrCat("registration: ", field, " is ", value, "; ", limit, " is wanted"),
                   {{"field", std::string(field)}, {"value", value}, {"limit", limit}});
}

absl::Status Text(absl::string_view field, absl::string_view value) {
  if (IsName(value)) return absl::OkStatus();
  return Bad(field, absl::StrCat("\"", Printable(value), "\""),
             absl::StrCat("1 to ", kMaxNameLength, " characters of [A-Za-z0-9._-]"));
}

// Names of models and fingerprints hold more than identifiers do ("org/model", "sha256:...").
absl::Status Graphic(absl::string_view field, absl::string_view value, size_t max_length) {
  const bool graphic = std::all_of(value.begin(), value.end(),
                                   [](char c) { return absl::ascii_isgraph(static_cast<unsigned char>(c)); });
  if (graphic && !value.empty() && value.size() <= max_length) return absl::OkStatus();
  return Bad(field, absl::StrCat("\"", Printable(value), "\""),
             absl::StrCat("1 to ", max_length, " printable characters without spaces"));
}

absl::Status Range(absl::string_view field, uint64_t value, uint64_t least, uint64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return Bad(field, absl::StrCat(value), absl::StrCat(least, " to ", most));
}

absl::Status Address(absl::string_view field, absl::string_view value,
                     const std::vector<AddressRange>& ranges = {}) {
  const absl::Status status = CheckPeerAddress(value, ranges);
  if (status.ok()) return status;
  return Bad(field, absl::StrCat("\"", Printable(value), "\""), std::string(status.message()));
}

absl::Status Version(uint32_t version) {
  if (version == kProtocolVersion) return absl::OkStatus();
  return Bad("protocol_version", absl::StrCat(version), absl::StrCat(kProtocolVersion),
             absl::StatusCode::kFailedPrecondition);
}

absl::Status CheckModel(const v1::ServedModel& model) {
  HW_RETURN_IF_ERROR(Graphic("model.name", model.name(), kMaxModelNameLength));
  HW_RETURN_IF_ERROR(Graphic("model.fingerprint", model.fingerprint(), kMaxFingerprintLength));
  HW_RETURN_IF_ERROR(Range("model.vocab_size", model.vocab_size(), 1, kMaxVocab));
  HW_RETURN_IF_ERROR(Range("model.max_position", model.max_position(), 1, kMaxPosition));
  HW_RETURN_IF_ERROR(Range("model.num_layers", model.num_layers(), 1, kMaxShape));
  HW_RETURN_IF_ERROR(Range("model.num_kv_heads", model.num_kv_heads(), 1, kMaxShape));
  HW_RETURN_IF_ERROR(Range("model.head_dim", model.head_dim(), 1, kMaxShape));
  HW_RETURN_IF_ERROR(Range("model.hidden_size", model.hidden_size(), 0, kMaxWidth));
  HW_RETURN_IF_ERROR(Range("model.num_q_heads", model.num_q_heads(), 0, kMaxShape));
  return Range("model.intermediate_size", model.intermediate_size(), 0, kMaxWidth);
}

// 0, or from `least` to `most`; never what is not a number.
absl::Status Real(absl::string_view field, double value, double least, double most) {
  if (value == 0 || (value >= least && value <= most)) return absl::OkStatus();
  return Bad(field, absl::StrCat(value), absl::StrCat("0 or ", least, " to ", most));
}

absl::Status CheckRates(const v1::ComputeRates& rates) {
  HW_RETURN_IF_ERROR(Real("rates.linear_flops", rates.linear_flops(), kLeastRate, kMostRate));
  HW_RETURN_IF_ERROR(Real("rates.attention_flops", rates.attention_flops(), kLeastRate, kMostRate));
  HW_RETURN_IF_ERROR(Real("rates.link_bytes_per_s", rates.link_bytes_per_s(), kLeastRate, kMostRate));
  HW_RETURN_IF_ERROR(Real("rates.egress_bytes_per_s", rates.egress_bytes_per_s(), kLeastRate, kMostRate));
  HW_RETURN_IF_ERROR(Range("rates.exchange_bytes_per_token", rates.exchange_bytes_per_token(), 0, kMaxWidth));
  HW_RETURN_IF_ERROR(Real("rates.exchange_step_s", rates.exchange_step_s(), 0, kMostLatency));
  return Real("rates.group_start_s", rates.group_start_s(), 0, kMostLatency);
}

absl::Status CheckMemory(const v1::MemoryModel& memory) {
  HW_RETURN_IF_ERROR(Range("memory.budget_bytes", memory.budget_bytes(), 1, kMaxBytes));
  HW_RETURN_IF_ERROR(Range("memory.weight_bytes", memory.weight_bytes(), 0, memory.budget_bytes()));
  HW_RETURN_IF_ERROR(Range("memory.fixed_bytes", memory.fixed_bytes(), 0, kMaxBytes));
  HW_RETURN_IF_ERROR(Range("memory.bytes_per_token", memory.bytes_per_token(), 1, kMaxBytesPerToken));
  HW_RETURN_IF_ERROR(
      Range("memory.group_bytes_per_token", memory.group_bytes_per_token(), 0, kMaxBytesPerToken));
  return Range("memory.group_bytes_per_prompt_token", memory.group_bytes_per_prompt_token(), 0,
               kMaxBytesPerToken);
}

absl::Status CheckStrategies(const v1::WorkerRegistration& registration) {
  HW_RETURN_IF_ERROR(Range("number of strategies", static_cast<uint64_t>(registration.strategies_size()), 0,
                           v1::Strategy_ARRAYSIZE));
  for (const int strategy : registration.strategies()) {
    if (strategy != v1::STRATEGY_UNSPECIFIED && v1::Strategy_IsValid(strategy)) continue;
    return Bad("strategies", absl::StrCat(strategy), "a strategy");
  }
  return absl::OkStatus();
}

absl::Status CheckPolicyLimits(const v1::WorkerRegistration& registration) {
  const auto& policies = registration.policies();
  const auto has = [&](const std::string& name) {
    return std::find(policies.begin(), policies.end(), name) != policies.end();
  };
  const std::string& by_default = registration.default_policy();
  if (!by_default.empty() && !has(by_default)) {
    return Bad("default_policy", absl::StrCat("\"", Printable(by_default), "\""), "one of its policies");
  }
  HW_RETURN_IF_ERROR(Range("number of policy_limits",
                           static_cast<uint64_t>(registration.policy_limits_size()), 0, kMaxPolicies));
  for (const v1::PolicyLimit& limit : registration.policy_limits()) {
    if (has(limit.name())) continue;
    return Bad("policy_limits", absl::StrCat("\"", Printable(limit.name()), "\""), "one of its policies");
  }
  return absl::OkStatus();
}

// Both or neither; one prompt is no pack.
absl::Status CheckPacking(const v1::WorkerRegistration& registration) {
  const uint64_t prompts = registration.max_packed_prompts(), tokens = registration.max_packed_tokens();
  if (prompts == 0 && tokens == 0) return absl::OkStatus();
  HW_RETURN_IF_ERROR(Range("max_packed_prompts", prompts, 2, kMaxPackedPrompts));
  return Range("max_packed_tokens", tokens, 1, kMaxPackedTokens);
}

}  // namespace

bool IsRate(double value) { return value >= kLeastRate && value <= kMostRate; }

absl::Status CheckRegistration(const v1::WorkerRegistration& registration) {
  HW_RETURN_IF_ERROR(Version(registration.protocol_version()));
  HW_RETURN_IF_ERROR(Text("worker_id", registration.worker_id()));
  HW_RETURN_IF_ERROR(Text("incarnation", registration.incarnation()));
  HW_RETURN_IF_ERROR(Address("rendezvous_address", registration.rendezvous_address()));
  HW_RETURN_IF_ERROR(Graphic("device", registration.device(), kMaxNameLength));
  HW_RETURN_IF_ERROR(CheckModel(registration.model()));
  HW_RETURN_IF_ERROR(CheckMemory(registration.memory()));
  HW_RETURN_IF_ERROR(CheckRates(registration.rates()));
  HW_RETURN_IF_ERROR(
      Range("number of policies", static_cast<uint64_t>(registration.policies_size()), 1, kMaxPolicies));
  for (const std::string& policy : registration.policies()) HW_RETURN_IF_ERROR(Text("policies", policy));
  HW_RETURN_IF_ERROR(CheckStrategies(registration));
  HW_RETURN_IF_ERROR(CheckPolicyLimits(registration));
  return CheckPacking(registration);
}

absl::Status CheckRegistration(const v1::DecodeRegistration& registration,
                               const std::vector<AddressRange>& ranges) {
  HW_RETURN_IF_ERROR(Version(registration.protocol_version()));
  HW_RETURN_IF_ERROR(Text("decode_node", registration.decode_node()));
  HW_RETURN_IF_ERROR(Text("incarnation", registration.incarnation()));
  if (!registration.pool().empty()) HW_RETURN_IF_ERROR(Text("pool", registration.pool()));
  HW_RETURN_IF_ERROR(Address("kv_address", registration.kv_address(), ranges));
  HW_RETURN_IF_ERROR(Address("decode_address", registration.decode_address(), ranges));
  HW_RETURN_IF_ERROR(Graphic("model_fingerprint", registration.model_fingerprint(), kMaxFingerprintLength));
  HW_RETURN_IF_ERROR(Range("kv_budget_bytes", registration.kv_budget_bytes(), 1, kMaxBytes));
  HW_RETURN_IF_ERROR(Range("number of kv_dtypes", static_cast<uint64_t>(registration.kv_dtypes_size()), 1,
                           v1::KvDtype_ARRAYSIZE));
  for (const int dtype : registration.kv_dtypes()) {
    if (dtype == v1::KV_DTYPE_UNSPECIFIED || !v1::KvDtype_IsValid(dtype)) {
      return Bad("kv_dtypes", absl::StrCat(dtype), "a specified value of headwater.v1.KvDtype");
    }
  }
  return absl::OkStatus();
}

}  // namespace headwater
