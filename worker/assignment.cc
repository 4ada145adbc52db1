#include "worker/assignment.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "worker/layer_kv.h"

namespace headwater {
namespace {

constexpr size_t kMaxIdLength = 64;
constexpr size_t kMaxSessionField = 256;

absl::Status Invalid(v1::ErrorReason reason, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, reason, message);
}

absl::Status BadField(absl::string_view message) { return Invalid(v1::ERROR_REASON_BAD_FIELD, message); }

// Values of peers go into messages cut short and printable.
std::string Quoted(absl::string_view text) {
  std::string quoted = "'";
  for (const char c : text.substr(0, kMaxIdLength)) {
    quoted.push_back(absl::ascii_isprint(static_cast<unsigned char>(c)) ? c : '?');
  }
  return absl::StrCat(quoted, text.size() > kMaxIdLength ? "...'" : "'");
}

absl::Status CheckRequestId(const std::string& id) {
  const bool ok = !id.empty() && id.size() <= kMaxIdLength && std::all_of(id.begin(), id.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
  if (ok) return absl::OkStatus();
  return Invalid(v1::ERROR_REASON_BAD_REQUEST_ID,
                 absl::StrCat("request_id ", Quoted(id), " is not 1 to 64 characters of [A-Za-z0-9._-]"));
}

absl::Status CheckAddress(absl::string_view field, const std::string& address) {
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  if (address.size() <= kMaxSessionField && colon != std::string::npos && colon > 0 &&
      absl::SimpleAtoi(absl::string_view(address).substr(colon + 1), &port) && port > 0 && port <= 65535) {
    return absl::OkStatus();
  }
  return BadField(absl::StrCat(field, " ", Quoted(address), " is not HOST:PORT"));
}

absl::Status CheckPlan(const v1::PrefillAssignment& assignment, const std::string& worker_id) {
  const v1::PrefillPlan& plan = assignment.plan();
  if (plan.world_size() < 1 || plan.world_size() > kMaxWorldSize) {
    return BadField(absl::StrCat("plan.world_size ", plan.world_size(), " is not 1 to ", kMaxWorldSize));
  }
  if (assignment.rank() >= plan.world_size()) {
    return BadField(absl::StrCat("rank ", assignment.rank(), " is not below world_size ", plan.world_size()));
  }
  if (!v1::Strategy_IsValid(plan.strategy())) {
    return BadField(absl::StrCat("plan.strategy ", static_cast<int>(plan.strategy()),
                                 " is unknown; known are ring (1), allgather (2) and sparse (3)"));
  }
  if (plan.worker_ids_size() != static_cast<int>(plan.world_size())) {
    return BadField(absl::StrCat("plan.worker_ids names ", plan.worker_ids_size(), " workers, world_size is ",
                                 plan.world_size()));
  }
  const std::string& named = plan.worker_ids(static_cast<int>(assignment.rank()));
  if (named != worker_id) {
    return BadField(absl::StrCat("plan.worker_ids names ", Quoted(named), " as rank ", assignment.rank(),
                                 ", this is ", worker_id));
  }
  if (plan.world_size() > 1) {
    HW_RETURN_IF_ERROR(CheckAddress("rendezvous_address", assignment.rendezvous_address()));
  }
  return absl::OkStatus();
}

absl::Status TakeTokens(const v1::PrefillAssignment& assignment, const ModelConfig& config,
                        std::vector<int32_t>* tokens) {
  const int64_t count = assignment.token_ids_size();
  if (count == 0) return Invalid(v1::ERROR_REASON_EMPTY_PROMPT, "the prompt has no tokens");
  if (count > config.max_position) {
    return Invalid(
        v1::ERROR_REASON_PROMPT_TOO_LONG,
        absl::StrCat("the prompt has ", count, " tokens; the model takes at most ", config.max_position));
  }
  tokens->reserve(static_cast<size_t>(count));
  for (const uint32_t token : assignment.token_ids()) {
    if (token >= static_cast<uint32_t>(config.vocab_size)) {
      return Invalid(v1::ERROR_REASON_TOKEN_OUT_OF_RANGE,
                     absl::StrCat("token ", tokens->size(), " has id ", token, "; the vocabulary has ",
                                  config.vocab_size));
    }
    tokens->push_back(static_cast<int32_t>(token));
  }
  return absl::OkStatus();
}

absl::Status CheckLayout(const v1::PrefillAssignment& assignment, const PrefillBackend& backend) {
  const v1::KvLayout& layout = assignment.layout();
  const ModelConfig& config = backend.config();
  if (layout.model_fingerprint() != backend.fingerprint()) {
    return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MODEL_MISMATCH,
                     absl::StrCat("layout.model_fingerprint is ", Quoted(layout.model_fingerprint()),
                                  ", this worker serves ", backend.fingerprint()));
  }
  if (ElementBytes(layout.dtype()) == 0) {
    return Invalid(
        v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED,
        absl::StrCat("layout.dtype ", static_cast<int>(layout.dtype()), " is not f32, f16 or bf16"));
  }
  const struct {
    const char* name;
    uint64_t got;
    uint64_t want;
  } fields[] = {
      {"num_layers", layout.num_layers(), static_cast<uint64_t>(config.num_layers)},
      {"num_kv_heads", layout.num_kv_heads(), static_cast<uint64_t>(config.num_kv_heads)},
      {"head_dim", layout.head_dim(), static_cast<uint64_t>(config.head_dim)},
      {"num_tokens", layout.num_tokens(), static_cast<uint64_t>(assignment.token_ids_size())},
      {"block_tokens", layout.block_tokens(), assignment.plan().block_tokens()},
  };
  for (const auto& field : fields) {
    if (field.got != field.want) {
      return BadField(absl::StrCat("layout.", field.name, " is ", field.got, "; it must be ", field.want));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckDestination(const v1::KvDestination& destination) {
  HW_RETURN_IF_ERROR(CheckAddress("destination.kv_address", destination.kv_address()));
  for (const auto& [name, value] :
       {std::pair<const char*, const std::string&>("session_id", destination.session_id()),
        {"session_token", destination.session_token()}}) {
    if (!value.empty() && value.size() <= kMaxSessionField) continue;
    return BadField(absl::StrCat("destination.", name, " has ", value.size(), " bytes; allowed are 1 to ",
                                 kMaxSessionField));
  }
  return absl::OkStatus();
}

absl::Status TakeQuality(const v1::PrefillAssignment& assignment, const std::string& policy,
                         const PrefillBackend& backend, QualityBound* bound) {
  if (!assignment.has_quality()) return absl::OkStatus();
  if (!backend.serves_quality()) {
    return MakeError(absl::StatusCode::kUnimplemented, v1::ERROR_REASON_NOT_IMPLEMENTED,
                     "quality needs a GPU; this worker has none", {{"field", "quality"}});
  }
  HW_ASSIGN_OR_RETURN(*bound, ReadQuality(assignment.quality()));
  if (policy == "headwater") return absl::OkStatus();
  return BadField(absl::StrCat("quality with policy ", Quoted(policy), "; only headwater keeps one"));
}

absl::Status TakePolicy(const v1::PrefillAssignment& assignment, const PrefillBackend& backend,
                        PrefillJob* job) {
  const v1::AttentionPolicy& policy = assignment.policy();
  const std::string name = policy.name().empty() ? backend.default_policy() : policy.name();
  const std::map<std::string, double> given(policy.parameters().begin(), policy.parameters().end());
  kernels::PolicyParameters parameters;
  if (const kernels::Status status = kernels::ParsePolicyParameters(name, given, &parameters); !status.ok()) {
    const std::vector<std::string> names = kernels::PolicyNames();
    const bool known = std::find(names.begin(), names.end(), name) != names.end();
    return Invalid(known ? v1::ERROR_REASON_BAD_POLICY_PARAMETER : v1::ERROR_REASON_UNKNOWN_POLICY,
                   status.message());
  }
  const std::vector<std::string> served = backend.policies();
  if (std::find(served.begin(), served.end(), name) == served.end()) {
    return Invalid(
        v1::ERROR_REASON_UNKNOWN_POLICY,
        absl::StrCat("policy '", name, "' is not one of this worker's: ", absl::StrJoin(served, ", ")));
  }
  HW_RETURN_IF_ERROR(TakeQuality(assignment, name, backend, &job->quality));
  backend.AddTables(given, &parameters);
  AddBound(job->quality, given, &parameters);
  job->policy = kernels::MakePolicy(name, std::move(parameters));
  return absl::OkStatus();
}

absl::Status TakeResume(const v1::PrefillAssignment& assignment, PrefillJob* job) {
  if (!assignment.has_resume()) return absl::OkStatus();
  const v1::ResumePoint& from = assignment.resume();
  if (from.layer() < 1 || from.layer() >= assignment.layout().num_layers()) {
    return BadField(
        absl::StrCat("resume.layer ", from.layer(), " is not 1 to ", assignment.layout().num_layers() - 1));
  }
  if (from.epoch() >= assignment.epoch()) {
    return BadField(absl::StrCat("resume.epoch ", from.epoch(), " is not before epoch ", assignment.epoch()));
  }
  if (from.world_size() < 2 || from.world_size() > kMaxWorldSize) {
    return BadField(absl::StrCat("resume.world_size ", from.world_size(), " is not 2 to ", kMaxWorldSize));
  }
  if (from.providers_size() != static_cast<int>(from.world_size())) {
    return BadField(absl::StrCat("resume.providers names ", from.providers_size(), " ranks, world_size is ",
                                 from.world_size()));
  }
  ResumePoint resume;
  for (const uint32_t provider : from.providers()) {
    if (provider >= assignment.plan().world_size()) {
      return BadField(absl::StrCat("resume.providers names rank ", provider, ", world_size is ",
                                   assignment.plan().world_size()));
    }
    resume.providers.push_back(static_cast<int>(provider));
  }
  absl::StatusOr<std::vector<RankTokens>> partition =
      PartitionTokens(static_cast<int64_t>(job->tokens.size()), static_cast<int>(from.world_size()),
                      from.partition(), from.block_tokens());
  if (!partition.ok()) return BadField(absl::StrCat("resume: ", partition.status().message()));
  resume.layer = static_cast<int32_t>(from.layer());
  resume.epoch = from.epoch();
  resume.partition = *std::move(partition);
  job->resume = std::move(resume);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PrefillJob> CheckAssignment(const v1::PrefillAssignment& assignment,
                                           const AssignmentContext& context) {
  PrefillJob job;
  HW_RETURN_IF_ERROR(CheckRequestId(assignment.request_id()));
  HW_RETURN_IF_ERROR(CheckPlan(assignment, context.worker_id));
  HW_RETURN_IF_ERROR(TakeTokens(assignment, context.backend->config(), &job.tokens));
  HW_RETURN_IF_ERROR(CheckLayout(assignment, *context.backend));
  absl::StatusOr<KvGeometry> geometry = KvGeometry::Create(assignment.layout());
  if (!geometry.ok()) return BadField(absl::StrCat("layout: ", geometry.status().message()));
  HW_RETURN_IF_ERROR(CheckDestination(assignment.destination()));
  HW_RETURN_IF_ERROR(TakePolicy(assignment, *context.backend, &job));
  if (assignment.top_logprobs() > kMaxTopLogprobs) {
    return BadField(absl::StrCat("top_logprobs ", assignment.top_logprobs(), " is over ", kMaxTopLogprobs));
  }
  const v1::PrefillPlan& plan = assignment.plan();
  absl::StatusOr<std::vector<RankTokens>> partition =
      PartitionTokens(static_cast<int64_t>(job.tokens.size()), static_cast<int>(plan.world_size()),
                      plan.partition(), plan.block_tokens());
  if (!partition.ok()) return BadField(partition.status().message());

  HW_RETURN_IF_ERROR(TakeResume(assignment, &job));
  job.request_id = assignment.request_id();
  job.epoch = assignment.epoch();
  job.rank = static_cast<int>(assignment.rank());
  job.partition = *std::move(partition);
  // A coordinator that knows no strategies means the first that there was.
  job.strategy = plan.strategy() == v1::STRATEGY_UNSPECIFIED ? v1::STRATEGY_RING : plan.strategy();
  job.geometry = std::make_shared<const KvGeometry>(*std::move(geometry));
  job.top_logprobs = static_cast<int>(assignment.top_logprobs());
  const int64_t most = MostTokens(job.partition);
  HW_ASSIGN_OR_RETURN(
      job.plan, context.backend->Plan(
                    *job.policy, WireType(assignment.layout().dtype()), NumTokens(job.local()), most,
                    static_cast<int64_t>(job.tokens.size()), job.world_size(),
                    job.resume.has_value() ? MostCheckpointTokens(job.resume->partition) : 0, job.strategy));
  return job;
}

}  // namespace headwater
