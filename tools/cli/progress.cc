#include "tools/cli/progress.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace headwater {
namespace {

constexpr int kLeastBar = 10;
constexpr int kMostBar = 40;
constexpr absl::Duration kTerminalInterval = absl::Milliseconds(100);
constexpr absl::Duration kLogInterval = absl::Seconds(2);

std::vector<std::string> Fields(const v1::PrefillProgress& progress) {
  std::vector<std::string> fields;
  fields.push_back(absl::StrCat("layer ", progress.layers_done(), "/", progress.num_layers()));
  if (progress.tokens_per_second() > 0) {
    fields.push_back(absl::StrFormat("%.0f tokens/s", progress.tokens_per_second()));
  }
  if (progress.has_eta()) {
    const double seconds = static_cast<double>(progress.eta().seconds()) + 1e-9 * progress.eta().nanos();
    fields.push_back(absl::StrCat("ETA ", seconds < 59.5 ? absl::StrFormat("%.0fs", std::max(seconds, 0.0))
                                                         : RenderDuration(absl::Seconds(seconds))));
  }
  fields.push_back(absl::StrCat("KV ", RenderBytes(progress.bytes_acked()), " of ",
                                RenderBytes(progress.bytes_total()), " acked"));
  if (progress.epoch() > 1) fields.push_back(absl::StrCat("epoch ", progress.epoch()));
  return fields;
}

}  // namespace

std::string RenderBytes(uint64_t bytes) {
  constexpr double kStep = 1024;
  if (bytes < static_cast<uint64_t>(kStep)) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    // 1023.95 would be shown as 1024.0.
    if (value < kStep - 0.05) break;
    value /= kStep;
    unit = next;
  }
  return absl::StrFormat("%.1f %s", value, unit);
}

std::string RenderDuration(absl::Duration duration) {
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(duration));
  if (seconds < 0.001) return absl::StrFormat("%.0fus", seconds * 1e6);
  if (seconds < 1) return absl::StrFormat("%.1fms", seconds * 1e3);
  if (seconds < 59.995) return absl::StrFormat("%.2fs", seconds);
  if (!(seconds < 1e9)) return "?";
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole < 3600) return absl::StrFormat("%dm%02ds", whole / 60, whole % 60);
  return absl::StrFormat("%dh%02dm", whole / 3600, whole % 3600 / 60);
}

std::string RenderLine(const v1::PrefillProgress& progress) { return absl::StrJoin(Fields(progress), "  "); }

std::string RenderBar(const v1::PrefillProgress& progress, int width) {
  std::vector<std::string> fields = Fields(progress);
  std::string text = absl::StrJoin(fields, "  ");
  // Brackets and the space after them take three columns.
  const auto room = [&] { return width - static_cast<int>(text.size()) - 3; };
  while (room() < kLeastBar && fields.size() > 1) {
    fields.pop_back();
    text = absl::StrJoin(fields, "  ");
  }
  if (room() < kLeastBar) return text.substr(0, static_cast<size_t>(std::max(width, 0)));
  const int bar = std::min(room(), kMostBar);
  const double share =
      progress.num_layers() == 0
          ? 0.0
          : std::min(1.0, static_cast<double>(progress.layers_done()) / progress.num_layers());
  const auto filled = static_cast<size_t>(share * bar);
  return absl::StrCat("[", std::string(filled, '#'), std::string(static_cast<size_t>(bar) - filled, '-'),
                      "] ", text);
}

void ProgressPrinter::Update(const v1::PrefillProgress& progress) {
  const absl::Time now = clock_->Now();
  const bool last = progress.num_layers() > 0 && progress.layers_done() >= progress.num_layers() &&
                    progress.bytes_acked() >= progress.bytes_total();
  const bool new_epoch = progress.epoch() != epoch_;
  if (!new_epoch && !last && now - last_ < (is_terminal_ ? kTerminalInterval : kLogInterval)) return;
  epoch_ = progress.epoch();
  last_ = now;
  if (is_terminal_) {
    *out_ << "\r" << RenderBar(progress, width_ - 1) << "\x1b[K" << std::flush;
    drawn_ = true;
  } else {
    *out_ << RenderLine(progress) << std::endl;
  }
}

void ProgressPrinter::Note(absl::string_view line) {
  if (drawn_) *out_ << "\r\x1b[K";
  drawn_ = false;
  *out_ << line << std::endl;
}

void ProgressPrinter::Finish() {
  if (drawn_) *out_ << std::endl;
  drawn_ = false;
}

}  // namespace headwater
