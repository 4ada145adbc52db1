#include "tools/cli/chrome_trace.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace headwater {
namespace {

constexpr int kCoordinator = 0;
constexpr int kRequestTrack = 0, kComputeTrack = 0, kFirstEgressTrack = 1;

// A place for slices: process and track.
struct Track {
  int process;
  int track;
};

class Writer {
 public:
  explicit Writer(const v1::RequestTrace& trace) : trace_(trace) {}

  Json Write() {
    Name("process_name", {kCoordinator, kRequestTrack}, "coordinator");
    Name("thread_name", {kCoordinator, kRequestTrack}, "request");
    WriteRequest();
    for (const v1::EpochTrace& epoch : trace_.epochs()) {
      for (const v1::RankTimeline& rank : epoch.ranks()) WriteRank(epoch, rank);
    }
    Json other = {{"request_id", trace_.request_id()},
                  {"trace_id", trace_.trace_id()},
                  {"model", trace_.model()},
                  {"policy", trace_.policy()},
                  {"num_tokens", trace_.num_tokens()},
                  {"decode_node", trace_.decode_node()},
                  {"code", trace_.code()},
                  {"reason", trace_.reason()}};
    return {{"displayTimeUnit", "ms"}, {"otherData", std::move(other)}, {"traceEvents", std::move(events_)}};
  }

 private:
  void Name(const char* what, const Track& at, const std::string& name) {
    events_.push_back(
        {{"ph", "M"}, {"name", what}, {"pid", at.process}, {"tid", at.track}, {"args", {{"name", name}}}});
  }
  // Nothing where `to` is not after `from`.
  void Slice(const Track& at, const std::string& name, const char* category, uint64_t from, uint64_t to,
             Json args = Json::object()) {
    if (to <= from) return;
    events_.push_back({{"ph", "X"},
                       {"name", name},
                       {"cat", category},
                       {"pid", at.process},
                       {"tid", at.track},
                       {"ts", from},
                       {"dur", to - from},
                       {"args", std::move(args)}});
  }

  // The last moment that is known of.
  uint64_t End() const {
    uint64_t end = std::max(trace_.ended_us(), trace_.accepted_us());
    for (const v1::EpochTrace& epoch : trace_.epochs()) end = std::max(end, EndOf(epoch));
    return end;
  }
  static uint64_t EndOf(const v1::EpochTrace& epoch) {
    uint64_t end = std::max({epoch.started_us(), epoch.assigned_us(), epoch.computed_us(), epoch.ended_us()});
    for (const v1::RankTimeline& rank : epoch.ranks()) end = std::max(end, rank.completed_us());
    return end;
  }

  void WriteRequest() {
    const Track at{kCoordinator, kRequestTrack};
    Slice(at, absl::StrCat("request ", trace_.request_id()), "request", 0, End(),
          {{"tokens", trace_.num_tokens()}, {"model", trace_.model()}, {"code", trace_.code()}});
    Slice(at, "wait for workers", "queue", 0, trace_.accepted_us());
    uint64_t queued = trace_.accepted_us();
    for (const v1::EpochTrace& epoch : trace_.epochs()) {
      Slice(at, "queue", "queue", queued, epoch.started_us());
      const uint64_t end = EndOf(epoch);
      Json args = {{"resume_layer", epoch.resume_layer()}, {"world_size", epoch.plan().world_size()}};
      if (!epoch.given_up().empty()) args["given_up"] = epoch.given_up();
      Slice(at, absl::StrCat("epoch ", epoch.epoch()), "epoch", epoch.started_us(), end, std::move(args));
      Slice(at, "open session", "session", epoch.started_us(), epoch.assigned_us());
      if (epoch.assigned_us() > 0) {
        Slice(at, "prefill", "prefill", epoch.assigned_us(),
              epoch.computed_us() > 0 ? epoch.computed_us() : end);
      }
      if (epoch.computed_us() > 0) Slice(at, "commit", "session", epoch.computed_us(), end);
      queued = end;
    }
    if (trace_.epochs().empty()) Slice(at, "queue", "queue", queued, End());
  }

  // The process of a worker, which is new where it was not seen before.
  int ProcessOf(const std::string& worker_id) {
    const auto [it, added] = processes_.try_emplace(worker_id, static_cast<int>(processes_.size()) + 1);
    if (added) {
      Name("process_name", {it->second, kComputeTrack}, absl::StrCat("worker ", worker_id));
      Name("thread_name", {it->second, kComputeTrack}, "compute");
    }
    return it->second;
  }

  void WriteRank(const v1::EpochTrace& epoch, const v1::RankTimeline& rank) {
    const int process = ProcessOf(rank.worker_id());
    const uint64_t start = epoch.assigned_us();
    const Track compute{process, kComputeTrack};
    const Json args = {{"epoch", epoch.epoch()}, {"rank", rank.rank()}};
    Slice(compute, "wait for other requests", "queue", start, start + rank.trace().begin_us(), args);
    for (const v1::LayerTrace& layer : rank.trace().layers()) {
      Json layer_args = args;
      layer_args["layer"] = layer.layer();
      const uint64_t begin = start + layer.start_us();
      if (layer.egress_stall_us() > 0 && layer.egress_stall_us() <= layer.start_us()) {
        Slice(compute, "egress stall", "egress", begin - layer.egress_stall_us(), begin, layer_args);
      }
      uint64_t at = begin;
      const uint64_t end =
          begin + layer.project_us() + layer.exchange_us() + layer.attention_us() + layer.mlp_us();
      Slice(compute, absl::StrCat("layer ", layer.layer()), "layer", begin, end, layer_args);
      const auto stage = [&](const char* name, const char* category, uint64_t micros) {
        Slice(compute, name, category, at, at + micros, layer_args);
        at += micros;
      };
      stage("project", "compute", layer.project_us());
      stage("exchange", "exchange", layer.exchange_us());
      stage("attention", "compute", layer.attention_us());
      stage("mlp", "compute", layer.mlp_us());
      if (layer.egress_end_us() > 0) {
        const uint64_t from = start + layer.egress_start_us(), to = start + layer.egress_end_us();
        Slice({process, EgressTrack(process, from, to)}, absl::StrCat("KV of layer ", layer.layer()),
              "egress", from, to, layer_args);
      }
    }
  }

  // The first track of the process that is free from `from` on; taken until `to`.
  int EgressTrack(int process, uint64_t from, uint64_t to) {
    std::vector<uint64_t>& busy_until = egress_[process];
    size_t i = 0;
    while (i < busy_until.size() && busy_until[i] > from) ++i;
    const int track = kFirstEgressTrack + static_cast<int>(i);
    if (i == busy_until.size()) {
      busy_until.push_back(0);
      Name("thread_name", {process, track}, absl::StrCat("KV egress ", i + 1));
    }
    busy_until[i] = std::max(from, to);
    return track;
  }

  const v1::RequestTrace& trace_;
  Json events_ = Json::array();
  std::map<std::string, int> processes_;
  std::map<int, std::vector<uint64_t>> egress_;
};

}  // namespace

Json ChromeTrace(const v1::RequestTrace& trace) { return Writer(trace).Write(); }

}  // namespace headwater
