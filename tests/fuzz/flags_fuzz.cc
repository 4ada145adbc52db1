// Command lines, one argument a line.
#include <string>

#include "absl/strings/str_split.h"

#include "base/flags.h"
#include "coordinator/flags.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

void Run(absl::string_view input) {
  const std::vector<std::string> arguments = absl::StrSplit(input, '\n');
  CoordinatorFlags flags;
  std::string help;
  const absl::Status status = ParseCoordinatorFlags(arguments, &flags, &help);
  if (!status.ok()) {
    FUZZ_EXPECT(absl::IsInvalidArgument(status), status.ToString().c_str());
  } else if (help.empty()) {
    const CoordinatorOptions& options = flags.options;
    FUZZ_EXPECT(options.max_batch_items >= 1 && options.max_prompt_tokens >= 1,
                "limits that admit something");
    for (const absl::Duration wait : {options.max_queue_wait, options.worker_wait, options.heartbeat_interval,
                                      options.decode_grace, flags.drain_timeout}) {
      FUZZ_EXPECT(wait >= absl::ZeroDuration() && wait < absl::InfiniteDuration(), "a wait that ends");
    }
  }
  uint64_t bytes = 0;
  FUZZ_EXPECT(!ParseBytes(input, &bytes) || bytes <= uint64_t{1} << 62, "a bounded number of bytes");
  NearestWord(input, {"listen", "metrics", "max_queue_wait"});
}

std::vector<std::string> Seeds() {
  return {"--listen=127.0.0.1:0\n--max-prompt-tokens\n1024",
          "--max_queue_wait=30s\n--nohelp\n--\nrest",
          "--max_queue_requests=4096\n--heartbeat_interval=500ms\n--drain_timeout=1e3",
          "--help",
          "1.5TiB",
          "--tls_cert=a\n--tls_key=b\n--tls_ca=c\n--log_format=json"};
}

const Registration kTarget({"flags", Run, Seeds, nullptr});

}  // namespace
}  // namespace headwater::fuzz
