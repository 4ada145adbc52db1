// A snapshot as the JSON that the live page reads.
#ifndef HW_COORDINATOR_PAGE_SNAPSHOT_JSON_H_
#define HW_COORDINATOR_PAGE_SNAPSHOT_JSON_H_

#include <string>

#include "coordinator/snapshot.h"

namespace headwater {

// ASCII alone: what is not is escaped, and bytes that are not UTF-8 become U+FFFD. Durations are seconds;
// what is not known is null. docs/page.md lists the fields.
std::string SnapshotJson(const Snapshot& snapshot);

}  // namespace headwater

#endif  // HW_COORDINATOR_PAGE_SNAPSHOT_JSON_H_
