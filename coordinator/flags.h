// Command line of headwater-coordinator.
#ifndef HW_COORDINATOR_FLAGS_H_
#define HW_COORDINATOR_FLAGS_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "base/log.h"
#include "coordinator/options.h"

namespace headwater {

struct CoordinatorFlags {
  std::string listen;
  std::string metrics;
  LogFormat log_format = LogFormat::kText;
  absl::Duration drain_timeout;
  CoordinatorOptions options;
};

// Parses and checks. An unknown flag or a value of the wrong type ends the process with exit code 1 (Abseil
// does that, naming the flag). INVALID_ARGUMENT: a value out of range or a stray argument.
absl::StatusOr<CoordinatorFlags> ParseCoordinatorFlags(int argc, char** argv);

}  // namespace headwater

#endif  // HW_COORDINATOR_FLAGS_H_
