#include "tools/cli/render.h"

#include <algorithm>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

#include "base/rpc/grpc_status.h"
#include "tools/cli/exit_code.h"
#include "tools/cli/progress.h"
#include "tools/cli/render_plan.h"

namespace headwater {
namespace {

absl::Duration ToDuration(const google::protobuf::Duration& duration) {
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

double ToSeconds(const google::protobuf::Duration& duration) {
  return absl::ToDoubleSeconds(ToDuration(duration));
}

// "KV_DTYPE_BF16" -> "bf16"
std::string EnumWord(const std::string& name, absl::string_view prefix) {
  return absl::AsciiStrToLower(absl::StripPrefix(name, prefix));
}

std::string DtypeWord(v1::KvDtype dtype) { return EnumWord(v1::KvDtype_Name(dtype), "KV_DTYPE_"); }

std::vector<std::pair<const char*, const google::protobuf::Duration*>> Stages(const v1::StageTimes& stages) {
  return {{"queue", &stages.queue()},
          {"linear", &stages.linear()},
          {"attention", &stages.attention()},
          {"exchange", &stages.exchange()},
          {"egress_stall", &stages.egress_stall()},
          {"egress_tail", &stages.egress_tail()},
          {"total", &stages.total()}};
}

Json LayoutToJson(const v1::KvLayout& layout) {
  Json json;
  json["num_layers"] = layout.num_layers();
  json["num_kv_heads"] = layout.num_kv_heads();
  json["head_dim"] = layout.head_dim();
  json["num_tokens"] = layout.num_tokens();
  json["block_tokens"] = layout.block_tokens();
  json["dtype"] = DtypeWord(layout.dtype());
  json["model_fingerprint"] = layout.model_fingerprint();
  return json;
}

// "dense_recall"; "" for none.
std::string FallbackWord(v1::AttentionFallback fallback) {
  return fallback == v1::ATTENTION_FALLBACK_UNSPECIFIED
             ? ""
             : EnumWord(v1::AttentionFallback_Name(fallback), "ATTENTION_FALLBACK_");
}

Json AttentionToJson(const v1::AttentionReport& report) {
  Json json;
  json["policy"] = report.policy();
  json["density"] = report.density();
  if (report.has_recall_mean()) json["recall_mean"] = report.recall_mean();
  if (report.has_recall_p1()) json["recall_p1"] = report.recall_p1();
  json["sampled_queries"] = report.sampled_queries();
  json["fallback"] = FallbackWord(report.fallback());
  json["wait"] = ToSeconds(report.wait());
  json["groups"] = Json::array();
  for (const v1::AttentionGroup& group : report.groups()) {
    Json one;
    one["layer"] = group.layer();
    if (group.has_kv_head()) one["kv_head"] = group.kv_head();
    one["density"] = group.density();
    if (group.has_recall()) one["recall"] = group.recall();
    if (group.has_recall_p1()) one["recall_p1"] = group.recall_p1();
    if (group.has_threshold()) one["threshold"] = group.threshold();
    if (group.has_forced_density()) one["forced_density"] = group.forced_density();
    if (group.has_window_blocks()) one["window_blocks"] = group.window_blocks();
    one["rounds"] = group.rounds();
    one["fallback"] = FallbackWord(group.fallback());
    one["no_room_tiles"] = group.no_room_tiles();
    one["note"] = group.note();
    json["groups"].push_back(std::move(one));
  }
  return json;
}

// "headwater, density 0.0512, recall 0.9712 (p1 0.8123) of 32 queries a layer; dense_recall 3 of 128 groups"
std::string RenderAttention(const v1::AttentionReport& report) {
  std::string text = absl::StrFormat("%s, density %.4f", report.policy(), report.density());
  if (report.has_recall_mean()) {
    absl::StrAppendFormat(&text, ", recall %.4f (p1 %.4f) of %d queries a layer", report.recall_mean(),
                          report.recall_p1(), report.sampled_queries());
  }
  if (const std::string whole = FallbackWord(report.fallback()); !whole.empty()) {
    absl::StrAppend(&text, "; ", whole);
  }
  std::map<std::string, int> fallbacks;
  for (const v1::AttentionGroup& group : report.groups()) ++fallbacks[FallbackWord(group.fallback())];
  fallbacks.erase("");
  for (const auto& [word, count] : fallbacks) {
    absl::StrAppend(&text, "; ", word, " ", count, " of ", report.groups_size(), " groups");
  }
  return text;
}

Json ProgressToJson(const v1::PrefillProgress& progress) {
  Json json;
  json["event"] = "progress";
  json["request_id"] = progress.request_id();
  json["epoch"] = progress.epoch();
  json["layers_done"] = progress.layers_done();
  json["num_layers"] = progress.num_layers();
  json["tokens_per_second"] = progress.tokens_per_second();
  json["density"] = progress.density();
  if (progress.attention().has_recall_mean()) json["recall_mean"] = progress.attention().recall_mean();
  json["bytes_acked"] = progress.bytes_acked();
  json["bytes_total"] = progress.bytes_total();
  if (progress.has_eta()) json["eta"] = ToSeconds(progress.eta());
  if (progress.has_plan()) json["plan"] = PlanToJson(progress.plan());
  if (progress.has_explanation()) json["explanation"] = ExplanationToJson(progress.explanation());
  return json;
}

std::string Seconds(const google::protobuf::Duration& duration) {
  return RenderDuration(ToDuration(duration));
}

// The one that is named, and how many more there are.
std::string RequestsOf(const v1::WorkerSummary& worker) {
  if (worker.request_id().empty()) return "-";
  if (worker.num_requests() <= 1) return worker.request_id();
  return absl::StrCat(worker.request_id(), " +", worker.num_requests() - 1);
}

}  // namespace

std::string DumpJson(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Json ErrorToJson(const absl::Status& status) {
  Json json;
  json["code"] = absl::StatusCodeToString(status.code());
  const v1::ErrorReason reason = ReasonOf(status);
  json["reason"] = reason == v1::ERROR_REASON_UNSPECIFIED ? "" : ReasonName(reason);
  json["message"] = std::string(status.message());
  json["metadata"] = ErrorMetadata(status);
  return json;
}

Json CompletedToJson(const v1::PrefillCompleted& completed) {
  Json json;
  json["event"] = "completed";
  json["request_id"] = completed.request_id();
  json["session_id"] = completed.session_id();
  json["decode_node"] = completed.decode_node();
  json["decode_address"] = completed.decode_address();
  json["epoch"] = completed.epoch();
  json["retries"] = completed.retries();
  json["resume_layer"] = completed.resume_layer();
  json["num_tokens"] = completed.num_tokens();
  json["first_token"] = completed.first_token();
  json["top_logprobs"] = Json::array();
  for (const auto& candidate : completed.top_logprobs()) {
    json["top_logprobs"].push_back({{"token_id", candidate.token_id()}, {"logprob", candidate.logprob()}});
  }
  for (const auto& [name, time] : Stages(completed.stages())) json["stages"][name] = ToSeconds(*time);
  json["tokens_per_second"] = completed.tokens_per_second();
  json["density"] = completed.density();
  json["attention"] = AttentionToJson(completed.attention());
  json["kv_bytes"] = completed.kv_bytes();
  json["kv_blocks"] = completed.kv_blocks();
  json["kv_blocks_resent"] = completed.kv_blocks_resent();
  json["kv_stream_resumes"] = completed.kv_stream_resumes();
  json["exchange_bytes"] = completed.exchange_bytes();
  json["exchange_bytes_allgather"] = completed.exchange_bytes_allgather();
  json["kv_digest"] = completed.kv_digest();
  json["trace_id"] = completed.trace_id();
  json["layout"] = LayoutToJson(completed.layout());
  json["plan"] = PlanToJson(completed.plan());
  return json;
}

Json EventToJson(const v1::PrefillResponse& response) {
  Json json;
  switch (response.event_case()) {
    case v1::PrefillResponse::kAccepted:
      json["event"] = "accepted";
      json["request_id"] = response.accepted().request_id();
      json["queue_position"] = response.accepted().queue_position();
      json["trace_id"] = response.accepted().trace_id();
      if (response.accepted().has_plan()) json["plan"] = PlanToJson(response.accepted().plan());
      if (response.accepted().has_explanation()) {
        json["explanation"] = ExplanationToJson(response.accepted().explanation());
      }
      return json;
    case v1::PrefillResponse::kProgress:
      return ProgressToJson(response.progress());
    case v1::PrefillResponse::kCompleted:
      return CompletedToJson(response.completed());
    case v1::PrefillResponse::kFailed:
      json["event"] = "failed";
      json["request_id"] = response.failed().request_id();
      json["error"] = ErrorToJson(FromRpcStatus(response.failed().error()));
      return json;
    case v1::PrefillResponse::EVENT_NOT_SET:
      break;
  }
  json["event"] = "unknown";
  return json;
}

Json TokenToJson(const v1::GenerateResponse& token) {
  Json json;
  json["event"] = "token";
  json["token_id"] = token.token_id();
  json["position"] = token.position();
  json["top2_logit_gap"] = token.top2_logit_gap();
  json["elapsed"] = ToSeconds(token.elapsed());
  if (token.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
    json["finish_reason"] = EnumWord(v1::FinishReason_Name(token.finish_reason()), "FINISH_REASON_");
  }
  return json;
}

Json ToJson(const v1::ListWorkersResponse& workers) {
  Json list = Json::array();
  for (const v1::WorkerSummary& worker : workers.workers()) {
    Json json;
    json["worker_id"] = worker.worker_id();
    json["device"] = worker.device();
    json["model"] = worker.model().name();
    json["model_fingerprint"] = worker.model().fingerprint();
    json["max_position"] = worker.model().max_position();
    json["budget_bytes"] = worker.memory().budget_bytes();
    json["weight_bytes"] = worker.memory().weight_bytes();
    json["bytes_per_token"] = worker.memory().bytes_per_token();
    json["last_heartbeat_age"] = ToSeconds(worker.last_heartbeat_age());
    json["request_id"] = worker.request_id();
    json["epoch"] = worker.epoch();
    json["draining"] = worker.draining();
    json["num_requests"] = worker.num_requests();
    json["num_tokens"] = worker.num_tokens();
    json["kv_unacked_bytes"] = worker.kv_unacked_bytes();
    if (worker.has_rates()) {
      const v1::ComputeRates& rates = worker.rates();
      json["rates"] = {{"linear_flops", rates.linear_flops()},
                       {"attention_flops", rates.attention_flops()},
                       {"link_bytes_per_s", rates.link_bytes_per_s()},
                       {"egress_bytes_per_s", rates.egress_bytes_per_s()}};
    }
    list.push_back(json);
  }
  return {{"workers", list}};
}

Json ToJson(const v1::ListDecodeNodesResponse& nodes) {
  Json list = Json::array();
  for (const v1::DecodeNodeSummary& node : nodes.decode_nodes()) {
    Json json;
    json["decode_node"] = node.decode_node();
    json["pool"] = node.pool();
    json["kv_address"] = node.kv_address();
    json["decode_address"] = node.decode_address();
    json["connected"] = node.connected();
    json["last_heartbeat_age"] = ToSeconds(node.last_heartbeat_age());
    json["kv_bytes_used"] = node.kv_bytes_used();
    json["kv_budget_bytes"] = node.kv_budget_bytes();
    json["sessions"] = node.sessions();
    json["kv_dtypes"] = Json::array();
    for (const int dtype : node.kv_dtypes()) {
      json["kv_dtypes"].push_back(DtypeWord(static_cast<v1::KvDtype>(dtype)));
    }
    list.push_back(json);
  }
  return {{"decode_nodes", list}};
}

std::string RenderTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += Printable(row[i]);
      if (i + 1 < row.size()) line.append(widths[i] - row[i].size() + 2, ' ');
    }
    absl::StrAppend(&out, absl::StripTrailingAsciiWhitespace(line), "\n");
  }
  return out;
}

std::string RenderPairs(const std::vector<std::pair<std::string, std::string>>& rows) {
  std::vector<std::vector<std::string>> table;
  for (const auto& [name, value] : rows) table.push_back({name, value});
  return RenderTable(table);
}

std::string RenderCompleted(const v1::PrefillCompleted& completed, absl::Duration ttft) {
  std::vector<std::string> stages;
  for (const auto& [name, time] : Stages(completed.stages())) {
    stages.push_back(absl::StrCat(name, " ", Seconds(*time)));
  }
  const v1::PrefillPlan& plan = completed.plan();
  std::vector<std::pair<std::string, std::string>> rows = {
      {"request", completed.request_id()},
      {"session", completed.session_id()},
      {"decode node", absl::StrCat(completed.decode_node(), " (", completed.decode_address(), ")")},
      {"prompt", absl::StrCat(completed.num_tokens(), " tokens")},
      {"first token", absl::StrCat(completed.first_token())},
      {"TTFT", RenderDuration(ttft)},
      {"speed", absl::StrFormat("%.1f tokens/s", completed.tokens_per_second())},
      {"stages", absl::StrJoin(stages, ", ")},
      {"KV", absl::StrCat(RenderBytes(completed.kv_bytes()), " ", DtypeWord(completed.layout().dtype()), ", ",
                          completed.kv_blocks(), " blocks verified, ", completed.kv_blocks_resent(),
                          " resent, ", completed.kv_stream_resumes(), " stream resumes")},
      {"digest", completed.kv_digest()},
      {"trace", completed.trace_id()},
      {"attention", RenderAttention(completed.attention())},
      {"plan", absl::StrCat(plan.world_size(), " rank(s) (", absl::StrJoin(plan.worker_ids(), ", "), "), ",
                            PartitionWord(plan.partition()), ", ", StrategyWord(plan.strategy()),
                            ", blocks of ", plan.block_tokens(), " tokens")},
      {"epochs", absl::StrCat(completed.retries() + 1, " (", completed.retries(), " given up",
                              completed.resume_layer() > 0
                                  ? absl::StrCat("; the last from layer ", completed.resume_layer())
                                  : "",
                              ")")}};
  if (plan.has_cost()) {
    rows.emplace_back("predicted", absl::StrFormat("%.3g s from its start", plan.cost().total_s()));
  }
  if (plan.world_size() > 1) {
    rows.emplace_back("exchange",
                      absl::StrCat(RenderBytes(completed.exchange_bytes()), " of K/V, ",
                                   RenderBytes(completed.exchange_bytes_allgather()), " by allgather"));
  }
  for (const auto& candidate : completed.top_logprobs()) {
    rows.emplace_back("candidate",
                      absl::StrFormat("%d (logprob %.4f)", candidate.token_id(), candidate.logprob()));
  }
  return RenderPairs(rows);
}

std::string RenderWorkers(const v1::ListWorkersResponse& workers) {
  std::vector<std::vector<std::string>> rows = {
      {"WORKER", "STATE", "DEVICE", "MODEL", "MEMORY", "HEARTBEAT", "REQUEST", "EPOCH", "UNACKED"}};
  for (const v1::WorkerSummary& worker : workers.workers()) {
    const char* const state = worker.draining() ? "draining" : worker.num_requests() > 0 ? "busy" : "idle";
    rows.push_back({worker.worker_id(), state, worker.device(), worker.model().name(),
                    RenderBytes(worker.memory().budget_bytes()), Seconds(worker.last_heartbeat_age()),
                    RequestsOf(worker), worker.request_id().empty() ? "-" : absl::StrCat(worker.epoch()),
                    RenderBytes(worker.kv_unacked_bytes())});
  }
  return RenderTable(rows);
}

std::string RenderDecodeNodes(const v1::ListDecodeNodesResponse& nodes) {
  std::vector<std::vector<std::string>> rows = {
      {"NODE", "POOL", "STATE", "ADDRESS", "KV ADDRESS", "HEARTBEAT", "SESSIONS", "KV USED", "KV BUDGET"}};
  for (const v1::DecodeNodeSummary& node : nodes.decode_nodes()) {
    rows.push_back({node.decode_node(), node.pool(), node.connected() ? "connected" : "lost",
                    node.decode_address(), node.kv_address(), Seconds(node.last_heartbeat_age()),
                    absl::StrCat(node.sessions()), RenderBytes(node.kv_bytes_used()),
                    RenderBytes(node.kv_budget_bytes())});
  }
  return RenderTable(rows);
}

}  // namespace headwater
