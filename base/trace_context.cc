#include "base/trace_context.h"

#include <algorithm>
#include <random>

#include "absl/strings/str_cat.h"

namespace headwater {
namespace {

constexpr size_t kMaxState = 512;
// Of "00-<trace id>-<parent id>-<flags>".
constexpr size_t kLength = 55, kTraceIdAt = 3, kParentIdAt = 36, kFlagsAt = 53;

bool IsHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsZeros(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c == '0'; });
}

// 16 hex digits, not all 0.
std::string RandomSpanId() {
  thread_local std::random_device device;
  uint64_t bits = 0;
  while (bits == 0) bits = uint64_t{device()} << 32 | device();
  return absl::StrCat(absl::Hex(bits, absl::kZeroPad16));
}

// Later versions begin with the same fields and may go on after another '-'.
bool Read(absl::string_view text, TraceContext* context) {
  if (text.size() < kLength || text[2] != '-' || text[kParentIdAt - 1] != '-' || text[kFlagsAt - 1] != '-') {
    return false;
  }
  const absl::string_view version = text.substr(0, 2);
  if (!IsHex(version) || version == "ff") return false;
  if (text.size() > kLength && (version == "00" || text[kLength] != '-')) return false;
  const absl::string_view trace_id = text.substr(kTraceIdAt, 32);
  const absl::string_view parent_id = text.substr(kParentIdAt, 16);
  const absl::string_view flags = text.substr(kFlagsAt, 2);
  if (!IsHex(trace_id) || !IsHex(parent_id) || !IsHex(flags)) return false;
  if (IsZeros(trace_id) || IsZeros(parent_id)) return false;
  context->trace_id = std::string(trace_id);
  context->parent_id = std::string(parent_id);
  // "sampled" is the one flag that version 00 knows.
  context->flags = std::string("13579bdf").find(flags[1]) != std::string::npos ? "01" : "00";
  return true;
}

}  // namespace

std::string TraceContext::Traceparent() const {
  return absl::StrCat("00-", trace_id, "-", span_id, "-", flags);
}

TraceContext ContinueTrace(absl::string_view traceparent, absl::string_view tracestate) {
  TraceContext context;
  if (Read(traceparent, &context)) {
    const bool printable =
        std::all_of(tracestate.begin(), tracestate.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
    if (printable && tracestate.size() <= kMaxState) context.state = std::string(tracestate);
  } else {
    context.trace_id = absl::StrCat(RandomSpanId(), RandomSpanId());
  }
  context.span_id = RandomSpanId();
  return context;
}

}  // namespace headwater
