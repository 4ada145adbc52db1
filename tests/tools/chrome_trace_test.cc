#include "tools/cli/chrome_trace.h"

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace headwater {
namespace {

// Two ranks; the first epoch is given up.
v1::RequestTrace Trace() {
  v1::RequestTrace trace;
  trace.set_request_id("r");
  trace.set_trace_id("0af7651916cd43dd8448eb211c80319c");
  trace.set_num_tokens(100);
  trace.set_accepted_us(10);
  trace.set_ended_us(2000);
  trace.set_code("OK");
  v1::EpochTrace& lost = *trace.add_epochs();
  lost.set_epoch(1);
  lost.set_started_us(20);
  lost.set_assigned_us(30);
  lost.set_ended_us(100);
  lost.set_given_up("WORKER_LOST");
  v1::EpochTrace& epoch = *trace.add_epochs();
  epoch.set_epoch(2);
  epoch.set_started_us(150);
  epoch.set_assigned_us(200);
  epoch.set_computed_us(1900);
  epoch.set_ended_us(2000);
  for (uint32_t r = 0; r < 2; ++r) {
    v1::RankTimeline& rank = *epoch.add_ranks();
    rank.set_rank(r);
    rank.set_worker_id(r == 0 ? "w0" : "w1");
    rank.set_completed_us(1800);
    rank.mutable_trace()->set_begin_us(40);
    for (uint32_t l = 0; l < 3; ++l) {
      v1::LayerTrace& layer = *rank.mutable_trace()->add_layers();
      layer.set_layer(l);
      layer.set_start_us(100 + 200 * l);
      layer.set_egress_stall_us(l == 2 ? 30 : 0);
      layer.set_project_us(50);
      layer.set_exchange_us(20);
      layer.set_attention_us(60);
      layer.set_mlp_us(40);
      // They overlap.
      layer.set_egress_start_us(150 + 200 * l);
      layer.set_egress_end_us(150 + 200 * l + 350);
    }
  }
  return trace;
}

struct Slice {
  std::string name;
  uint64_t from, to;
};

std::map<std::pair<int, int>, std::vector<Slice>> Tracks(const Json& trace) {
  std::map<std::pair<int, int>, std::vector<Slice>> tracks;
  for (const Json& event : trace["traceEvents"]) {
    if (event["ph"] != "X") continue;
    const auto from = event["ts"].get<uint64_t>();
    tracks[{event["pid"], event["tid"]}].push_back(
        {event["name"], from, from + event["dur"].get<uint64_t>()});
  }
  return tracks;
}

std::vector<Slice> Named(const std::vector<Slice>& slices, const std::string& name) {
  std::vector<Slice> found;
  for (const Slice& slice : slices) {
    if (slice.name == name) found.push_back(slice);
  }
  return found;
}

TEST(ChromeTraceTest, SlicesOfATrackNestOrFollowEachOther) {
  for (const auto& [track, slices] : Tracks(ChromeTrace(Trace()))) {
    for (const Slice& a : slices) {
      EXPECT_LT(a.from, a.to) << a.name;
      for (const Slice& b : slices) {
        const bool apart = a.to <= b.from || b.to <= a.from;
        const bool nested = (a.from <= b.from && b.to <= a.to) || (b.from <= a.from && a.to <= b.to);
        EXPECT_TRUE(apart || nested) << a.name << " and " << b.name << " on track " << track.second;
      }
    }
  }
}

TEST(ChromeTraceTest, HasEveryStageWhereItWas) {
  const Json trace = ChromeTrace(Trace());
  auto tracks = Tracks(trace);
  const std::vector<Slice>& request = tracks[{0, 0}];
  EXPECT_EQ(Named(request, "request r")[0].to, 2000u);
  ASSERT_EQ(Named(request, "queue").size(), 2u) << "before either epoch";
  EXPECT_EQ(Named(request, "queue")[1].from, 100u);
  EXPECT_EQ(Named(request, "prefill")[0].to, 100u) << "of the epoch that was given up";
  EXPECT_EQ(Named(request, "commit").size(), 1u);
  for (const int worker : {1, 2}) {
    const std::vector<Slice>& compute = tracks[{worker, 0}];
    EXPECT_EQ(Named(compute, "layer 1")[0].from, 200u + 300u) << "from the assignment on";
    EXPECT_EQ(Named(compute, "layer 1")[0].to, 670u);
    EXPECT_EQ(Named(compute, "attention").size(), 3u);
    EXPECT_EQ(Named(compute, "attention")[1].from, 570u);
    EXPECT_EQ(Named(compute, "egress stall").size(), 1u);
    EXPECT_EQ(Named(compute, "wait for other requests")[0].to, 240u);
    EXPECT_EQ(Named(tracks[{worker, 1}], "KV of layer 0")[0].to, 200u + 500u);
    EXPECT_EQ(Named(tracks[{worker, 2}], "KV of layer 1").size(), 1u) << "on a track of its own";
  }
  std::set<std::string> names;
  for (const Json& event : trace["traceEvents"]) {
    if (event["name"] == "process_name") names.insert(event["args"]["name"].get<std::string>());
  }
  EXPECT_EQ(names, (std::set<std::string>{"coordinator", "worker w0", "worker w1"}));
}

TEST(ChromeTraceTest, ARequestUnderWayEndsWithWhatIsKnown) {
  v1::RequestTrace trace = Trace();
  trace.clear_ended_us();
  trace.clear_code();
  trace.mutable_epochs(1)->clear_ended_us();
  trace.mutable_epochs(1)->clear_computed_us();
  auto tracks = Tracks(ChromeTrace(trace));
  EXPECT_EQ(Named(tracks[{0, 0}], "request r")[0].to, 1800u);
  EXPECT_EQ(Named(tracks[{0, 0}], "prefill")[1].to, 1800u);
  EXPECT_TRUE(ChromeTrace(v1::RequestTrace())["traceEvents"].is_array());
}

}  // namespace
}  // namespace headwater
