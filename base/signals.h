// Termination signals as values: the main thread waits for them, no handler runs.
#ifndef HW_BASE_SIGNALS_H_
#define HW_BASE_SIGNALS_H_

#include "absl/time/time.h"

namespace headwater {

// Blocks SIGTERM, SIGINT and ignores SIGPIPE in this thread and in all threads that it starts later. Call
// first in main().
void BlockTerminationSignals();

// Waits for SIGTERM or SIGINT and returns it; 0: `timeout` passed. Requires BlockTerminationSignals().
int WaitForTerminationSignal(absl::Duration timeout);

// Starts a thread that ends the process with `exit_code` when a SIGTERM or SIGINT comes or `limit` passes:
// the last resort of a shutdown. `forgive_sigterm`: the first SIGTERM changes nothing, because it asks for
// what was begun without one.
void ExitOnSignalOrAfter(absl::Duration limit, int exit_code, bool forgive_sigterm = false);

}  // namespace headwater

#endif  // HW_BASE_SIGNALS_H_
