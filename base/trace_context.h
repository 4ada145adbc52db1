// W3C Trace Context (https://www.w3.org/TR/trace-context/, level 1): how a request keeps its trace across
// services. Read from the call's metadata "traceparent" and "tracestate", or made anew.
#ifndef HW_BASE_TRACE_CONTEXT_H_
#define HW_BASE_TRACE_CONTEXT_H_

#include <string>

#include "absl/strings/string_view.h"

namespace headwater {

inline constexpr char kTraceparent[] = "traceparent";
inline constexpr char kTracestate[] = "tracestate";

struct TraceContext {
  std::string trace_id;   // 32 lower-case hex digits, not all 0
  std::string parent_id;  // of whoever called: 16 hex digits; empty: nobody did
  std::string span_id;    // ours, which is the parent of what we call
  std::string flags = "00";
  std::string state;  // passed on as it came

  // What the next service gets.
  std::string Traceparent() const;
};

// The trace that `traceparent` names, with a new span of ours in it. Where it is malformed, of version ff, or
// has an id of zeros, a new trace, as the recommendation asks for; a state then belongs to nothing and is
// dropped, as one over 512 bytes or with bytes outside printable ASCII is.
TraceContext ContinueTrace(absl::string_view traceparent, absl::string_view tracestate);

}  // namespace headwater

#endif  // HW_BASE_TRACE_CONTEXT_H_
