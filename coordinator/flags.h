// Command line of headwater-coordinator.
#ifndef HW_COORDINATOR_FLAGS_H_
#define HW_COORDINATOR_FLAGS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

#include "base/config/config.h"
#include "base/log.h"
#include "base/rpc/transport.h"
#include "coordinator/options.h"

namespace headwater {

struct CoordinatorFlags {
  std::string listen = "127.0.0.1:7070";
  std::string metrics = "127.0.0.1:9070";  // empty: none
  std::string health;                      // empty: none
  std::string page;                        // empty: none
  LogFormat log_format = LogFormat::kText;
  absl::Duration drain_timeout = absl::Seconds(45);
  TransportOptions transport;
  CoordinatorOptions options;
  ConfigSummary config;
};

// Takes the arguments after the program's name, and what --config and the environment give (Config). Where
// --help or --print_config is among them, `help` gets the text to print. INVALID_ARGUMENT names the flag or
// where else the value is from, the value and what is allowed.
absl::Status ParseCoordinatorFlags(absl::Span<const std::string> arguments, CoordinatorFlags* flags,
                                   std::string* help);

}  // namespace headwater

#endif  // HW_COORDINATOR_FLAGS_H_
