// How much memory this process may plan with.
#ifndef HW_WORKER_MEMORY_BUDGET_H_
#define HW_WORKER_MEMORY_BUDGET_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace headwater {

// Bytes that can still be had: the least of /proc/meminfo's MemAvailable and of what the process's control
// groups (v1 or v2, any level) leave. `root` is put before the paths, for tests. UNAVAILABLE: no meminfo.
absl::StatusOr<uint64_t> AvailableMemoryBytes(const std::string& root = "");

}  // namespace headwater

#endif  // HW_WORKER_MEMORY_BUDGET_H_
