#include "tools/cli/request_flags.h"

#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include <nlohmann/json.hpp>

#include "base/status_macros.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/token_ids.h"

namespace headwater {
namespace {

using Setter = std::function<absl::Status(absl::string_view, v1::PrefillRequest*)>;

struct Field {
  const char* name;
  const char* default_text;
  const char* help;
  Setter set;
};

absl::Status Bad(absl::string_view value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat("'", Printable(value), "' is not ", allowed));
}

// Fields of type uint32 from `least` to `most`.
Setter Number(int64_t least, int64_t most, void (v1::PrefillRequest::*set)(uint32_t)) {
  return [=](absl::string_view text, v1::PrefillRequest* request) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(text, &value) || value < least || value > most) {
      return Bad(text, absl::StrCat("a whole number from ", least, " to ", most));
    }
    (request->*set)(static_cast<uint32_t>(value));
    return absl::OkStatus();
  };
}

absl::Status SetPriority(absl::string_view text, v1::PrefillRequest* request) {
  int32_t value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < -100 || value > 100) {
    return Bad(text, "a whole number from -100 to 100");
  }
  request->set_priority(value);
  return absl::OkStatus();
}

absl::Status ParseDuration(absl::string_view text, google::protobuf::Duration* out) {
  absl::Duration duration;
  double seconds = 0;
  if (absl::SimpleAtod(text, &seconds)) {
    duration = absl::Seconds(seconds);
  } else if (!absl::ParseDuration(text, &duration)) {
    return Bad(text, "a duration (such as 500ms, 30s or 5m)");
  }
  if (!(duration > absl::ZeroDuration() && duration <= absl::Hours(24 * 365))) {
    return Bad(text, "a duration over 0 and up to a year");
  }
  const int64_t nanos = absl::ToInt64Nanoseconds(duration);
  out->set_seconds(nanos / 1'000'000'000);
  out->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  return absl::OkStatus();
}

absl::Status SetDeadline(absl::string_view text, v1::PrefillRequest* request) {
  return ParseDuration(text, request->mutable_deadline());
}

// The bound that a request has already, or that the flag sets: there is room for one.
absl::Status TakeBound(v1::Quality::BoundCase bound, v1::PrefillRequest* request) {
  const v1::Quality::BoundCase has = request->quality().bound_case();
  if (has == v1::Quality::BOUND_NOT_SET || has == bound) return absl::OkStatus();
  return absl::InvalidArgumentError("min_recall, max_density and time_budget exclude each other");
}

// The service knows the ranges.
Setter Share(v1::Quality::BoundCase bound, void (v1::Quality::*set)(double)) {
  return [=](absl::string_view text, v1::PrefillRequest* request) {
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) return Bad(text, "a number");
    HW_RETURN_IF_ERROR(TakeBound(bound, request));
    (request->mutable_quality()->*set)(value);
    return absl::OkStatus();
  };
}

absl::Status SetTimeBudget(absl::string_view text, v1::PrefillRequest* request) {
  google::protobuf::Duration budget;
  HW_RETURN_IF_ERROR(ParseDuration(text, &budget));
  HW_RETURN_IF_ERROR(TakeBound(v1::Quality::kTimeBudget, request));
  *request->mutable_quality()->mutable_time_budget() = budget;
  return absl::OkStatus();
}

absl::Status SetPolicy(absl::string_view text, v1::PrefillRequest* request) {
  HW_ASSIGN_OR_RETURN(*request->mutable_policy(), ParsePolicy(text));
  return absl::OkStatus();
}

absl::Status SetKvDtype(absl::string_view text, v1::PrefillRequest* request) {
  v1::KvDtype dtype = v1::KV_DTYPE_UNSPECIFIED;
  if (text != "auto" && (!v1::KvDtype_Parse(absl::StrCat("KV_DTYPE_", absl::AsciiStrToUpper(text)), &dtype) ||
                         dtype == v1::KV_DTYPE_UNSPECIFIED)) {
    return Bad(text, "one of auto, f32, f16, bf16");
  }
  request->set_kv_dtype(dtype);
  return absl::OkStatus();
}

absl::Status SetPartition(absl::string_view text, v1::PrefillRequest* request) {
  v1::Partition partition = v1::PARTITION_UNSPECIFIED;
  if (text != "auto" &&
      (!v1::Partition_Parse(absl::StrCat("PARTITION_", absl::AsciiStrToUpper(text)), &partition) ||
       partition == v1::PARTITION_UNSPECIFIED)) {
    return Bad(text, "one of auto, contiguous, zigzag, striped");
  }
  request->set_partition(partition);
  return absl::OkStatus();
}

absl::Status SetStrategy(absl::string_view text, v1::PrefillRequest* request) {
  v1::Strategy strategy = v1::STRATEGY_UNSPECIFIED;
  if (text != "auto" &&
      (!v1::Strategy_Parse(absl::StrCat("STRATEGY_", absl::AsciiStrToUpper(text)), &strategy) ||
       strategy == v1::STRATEGY_UNSPECIFIED)) {
    return Bad(text, "one of auto, ring, allgather, sparse");
  }
  request->set_strategy(strategy);
  return absl::OkStatus();
}

// Text fields.
Setter Text(void (*set)(v1::PrefillRequest*, const std::string&)) {
  return [set](absl::string_view text, v1::PrefillRequest* request) {
    set(request, std::string(text));
    return absl::OkStatus();
  };
}

const std::vector<Field>& Fields() {
  static const auto* const fields = new std::vector<Field>{
      {"model", "", "served model; may be left out where one is served",
       Text([](v1::PrefillRequest* r, const std::string& text) { r->set_model(text); })},
      {"tenant", "", "whose request this is",
       Text([](v1::PrefillRequest* r, const std::string& text) { r->set_tenant(text); })},
      {"priority", "0", "-100 to 100; higher goes first", SetPriority},
      {"deadline", "", "time allowed from acceptance to completion, such as 30s; empty: no limit",
       SetDeadline},
      {"policy", "",
       "attention pattern, such as dense or headwater:threshold=0.1; empty: the workers' default", SetPolicy},
      {"min_recall", "", "share of dense attention's mass that must be read, 0 to 1 (policy headwater, GPU)",
       Share(v1::Quality::kMinRecall, &v1::Quality::set_min_recall)},
      {"max_density", "", "most of the causal blocks that may be read, 0 to 1 (policy headwater, GPU)",
       Share(v1::Quality::kMaxDensity, &v1::Quality::set_max_density)},
      {"time_budget", "", "time that the computation may take, such as 2s (policy headwater, GPU)",
       SetTimeBudget},
      {"decode_node", "", "registered decode node that the cache goes to",
       Text([](v1::PrefillRequest* r, const std::string& text) { r->set_decode_node(text); })},
      {"decode_pool", "default", "pool to take a decode node from, where no node is named",
       Text([](v1::PrefillRequest* r, const std::string& text) { r->set_decode_pool(text); })},
      {"kv_dtype", "auto", "type of the cache: auto (bf16), f32, f16, bf16", SetKvDtype},
      {"top_logprobs", "0", "candidates of the first token to report, 0 to 20",
       Number(0, 20, &v1::PrefillRequest::set_top_logprobs)},
      {"world_size", "0", "workers to use; 0: the planner decides",
       Number(0, 65536, &v1::PrefillRequest::set_world_size)},
      {"partition", "auto", "how tokens are dealt to workers: auto, contiguous, zigzag, striped",
       SetPartition},
      {"strategy", "auto", "how workers get each other's K/V: auto, ring, allgather, sparse", SetStrategy},
      {"block_tokens", "0", "tokens of one KV block; 0: the planner decides",
       Number(0, 4096, &v1::PrefillRequest::set_block_tokens)}};
  return *fields;
}

absl::Status SetTokenIds(const nlohmann::json& value, v1::PrefillRequest* request) {
  if (!value.is_array()) return absl::InvalidArgumentError("is not an array");
  if (value.empty()) return absl::InvalidArgumentError("no token ids");
  if (value.size() > kMaxTokenIds) {
    return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxTokenIds, " token ids"));
  }
  for (size_t i = 0; i < value.size(); ++i) {
    const uint64_t id = value[i].is_number_unsigned() ? value[i].get<uint64_t>() : UINT64_MAX;
    if (id > std::numeric_limits<uint32_t>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat("token id ", i + 1, " is not a whole number from 0 to 4294967295"));
    }
    request->add_token_ids(static_cast<uint32_t>(id));
  }
  return absl::OkStatus();
}

absl::Status SetKey(const std::string& key, const nlohmann::json& value, v1::PrefillRequest* request) {
  if (key == "token_ids") return SetTokenIds(value, request);
  std::string text;
  if (value.is_string()) {
    text = value.get<std::string>();
  } else if (value.is_number()) {
    text = value.dump();
  } else {
    return absl::InvalidArgumentError("is neither text nor a number");
  }
  if (key == "request_id") {
    request->set_request_id(text);
    return absl::OkStatus();
  }
  for (const Field& field : Fields()) {
    if (key == field.name) return field.set(text, request);
  }
  return absl::InvalidArgumentError("is not a known key");
}

}  // namespace

void DeclareRequestFlags(v1::PrefillRequest* request, FlagSet* flags) {
  for (const Field& field : Fields()) {
    flags->Custom(field.name, field.default_text, field.help,
                  [&field, request](absl::string_view text) { return field.set(text, request); });
  }
}

absl::StatusOr<v1::AttentionPolicy> ParsePolicy(absl::string_view text) {
  v1::AttentionPolicy policy;
  const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
  if (parts.first.empty()) return Bad(text, "NAME or NAME:PARAMETER=NUMBER,...");
  policy.set_name(std::string(parts.first));
  for (const absl::string_view pair : absl::StrSplit(parts.second, ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> assignment =
        absl::StrSplit(pair, absl::MaxSplits('=', 1));
    double value = 0;
    if (assignment.first.empty() || !absl::SimpleAtod(assignment.second, &value) || !std::isfinite(value)) {
      return Bad(pair, "PARAMETER=NUMBER");
    }
    if (!policy.mutable_parameters()->insert({std::string(assignment.first), value}).second) {
      return absl::InvalidArgumentError(absl::StrCat("parameter '", assignment.first, "' is given twice"));
    }
  }
  return policy;
}

absl::StatusOr<std::vector<v1::PrefillRequest>> ParseBatch(absl::string_view jsonl,
                                                           const v1::PrefillRequest& defaults) {
  std::vector<v1::PrefillRequest> requests;
  int64_t line_number = 0;
  for (const absl::string_view line : absl::StrSplit(jsonl, '\n')) {
    ++line_number;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    const auto json = nlohmann::json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line_number, " is not a JSON object"));
    }
    if (json.contains("decode_node") && json.contains("decode_pool")) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", line_number, " has both \"decode_node\" and \"decode_pool\""));
    }
    v1::PrefillRequest request = defaults;
    // A line's own bound takes the place of the flags'.
    const bool bound =
        json.contains("min_recall") || json.contains("max_density") || json.contains("time_budget");
    if (bound) request.clear_quality();
    for (const auto& [key, value] : json.items()) {
      const absl::Status status = SetKey(key, value, &request);
      if (!status.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat("line ", line_number, ", \"", Printable(key), "\": ", status.message()));
      }
    }
    if (request.token_ids().empty()) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line_number, " has no \"token_ids\""));
    }
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return absl::InvalidArgumentError("no requests");
  return requests;
}

}  // namespace headwater
