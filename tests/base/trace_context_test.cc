#include "base/trace_context.h"

#include <set>
#include <string>

#include "gtest/gtest.h"

namespace headwater::testing {
namespace {

constexpr char kTrace[] = "0af7651916cd43dd8448eb211c80319c";
constexpr char kParent[] = "b7ad6b7169203331";

std::string Header(const std::string& version = "00", const std::string& flags = "01") {
  return version + "-" + kTrace + "-" + kParent + "-" + flags;
}

TEST(TraceContextTest, GoesOnWithTheCallersTraceUnderASpanOfItsOwn) {
  const TraceContext context = ContinueTrace(Header(), "vendor=1,other=2");
  EXPECT_EQ(context.trace_id, kTrace);
  EXPECT_EQ(context.parent_id, kParent);
  EXPECT_EQ(context.state, "vendor=1,other=2");
  EXPECT_EQ(context.span_id.size(), 16u);
  EXPECT_NE(context.span_id, kParent);
  EXPECT_EQ(context.Traceparent(), std::string("00-") + kTrace + "-" + context.span_id + "-01");

  const TraceContext next = ContinueTrace(context.Traceparent(), context.state);
  EXPECT_EQ(next.trace_id, kTrace);
  EXPECT_EQ(next.parent_id, context.span_id);
}

TEST(TraceContextTest, LaterVersionsMayBeLongerAndFlagsAreCutToWhatIsKnown) {
  EXPECT_EQ(ContinueTrace(Header("cc") + "-what-comes-later", "").trace_id, kTrace);
  EXPECT_EQ(ContinueTrace(Header("cc"), "").trace_id, kTrace);
  EXPECT_EQ(ContinueTrace(Header("00", "ff"), "").flags, "01");
  EXPECT_EQ(ContinueTrace(Header("00", "02"), "").flags, "00");
}

TEST(TraceContextTest, WhatIsMalformedBeginsATrace) {
  const std::string zeros(32, '0');
  const std::string bad[] = {
      "",
      "00",
      Header().substr(0, 54),
      Header() + "-more",
      Header() + "x",
      Header("cc") + "x",
      Header("ff"),
      Header("0g"),
      Header("00", "0G"),
      "00-" + zeros + "-" + kParent + "-01",
      std::string("00-") + kTrace + "-0000000000000000-01",
      std::string("00-") + "0AF7651916CD43DD8448EB211C80319C-" + kParent + "-01",
      std::string("00_") + kTrace + "-" + kParent + "-01",
      std::string("00-") + kTrace + "_" + kParent + "-01",
      std::string(100'000, '0'),
      std::string(55, '\0'),
  };
  std::set<std::string> ids;
  for (const std::string& header : bad) {
    const TraceContext context = ContinueTrace(header, "state=of-nothing");
    EXPECT_EQ(context.trace_id.size(), 32u) << header;
    EXPECT_NE(context.trace_id, kTrace) << header;
    EXPECT_EQ(context.parent_id, "") << header;
    EXPECT_EQ(context.state, "") << header;
    EXPECT_EQ(ContinueTrace(context.Traceparent(), "").trace_id, context.trace_id) << "ours is well-formed";
    ids.insert(context.trace_id);
  }
  EXPECT_EQ(ids.size(), std::size(bad)) << "each is another";
}

TEST(TraceContextTest, StatesThatAreNotFitAreDropped) {
  EXPECT_EQ(ContinueTrace(Header(), std::string(512, 'a')).state.size(), 512u);
  EXPECT_EQ(ContinueTrace(Header(), std::string(513, 'a')).state, "");
  EXPECT_EQ(ContinueTrace(Header(), "a=\n").state, "");
  EXPECT_EQ(ContinueTrace(Header(), "a=\xc3\xa9").state, "");
}

}  // namespace
}  // namespace headwater::testing
