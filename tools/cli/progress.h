// Progress of a prefill on the terminal.
#ifndef HW_TOOLS_CLI_PROGRESS_H_
#define HW_TOOLS_CLI_PROGRESS_H_

#include <cstdint>
#include <ostream>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

// "[#####-----] layer 15/30  1234 tokens/s  ETA 12s  KV 10.0 of 20.0 MiB acked  epoch 2", at most `width`
// columns, ASCII: the bar shrinks first, then fields go from the right. The epoch is shown when it is over 1.
std::string RenderBar(const v1::PrefillProgress& progress, int width);

// The same facts without a bar, for logs.
std::string RenderLine(const v1::PrefillProgress& progress);

// "512 B", "1.5 KiB", "322.9 MiB"
std::string RenderBytes(uint64_t bytes);

// "850us", "12.3ms", "4.56s", "2m03s", "1h02m"
std::string RenderDuration(absl::Duration duration);

// Writes progress to a stream: on a terminal one line that is drawn over, at most ten times a second; else a
// line every two seconds. A new epoch and the last layer are always shown. Not thread-safe.
class ProgressPrinter {
 public:
  ProgressPrinter(std::ostream* out, bool is_terminal, int width, const Clock* clock = Clock::Real())
      : out_(out), is_terminal_(is_terminal), width_(width), clock_(clock) {}
  ~ProgressPrinter() { Finish(); }
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;

  void Update(const v1::PrefillProgress& progress);
  // A line of its own above the bar.
  void Note(absl::string_view line);
  // Ends the drawn line.
  void Finish();

 private:
  std::ostream* const out_;
  const bool is_terminal_;
  const int width_;
  const Clock* const clock_;
  absl::Time last_ = absl::InfinitePast();
  uint32_t epoch_ = 0;
  bool drawn_ = false;
};

}  // namespace headwater

#endif  // HW_TOOLS_CLI_PROGRESS_H_
