// A request's timeline in the JSON form of Chrome's trace viewer, which Perfetto opens.
#ifndef HW_TOOLS_CLI_CHROME_TRACE_H_
#define HW_TOOLS_CLI_CHROME_TRACE_H_

#include "headwater/v1/admin.pb.h"
#include "tools/cli/render.h"

namespace headwater {

// "Trace Event Format": complete events ("X") in microseconds from the request's arrival. One process is the
// coordinator, one each worker: its track "compute" has the layers with their stages, tracks "KV egress" the
// layers' way to the decode node, which overlap. Slices of one track nest or follow each other. A worker's
// times are set to begin when the coordinator sent the assignment: the network's delay is not in them.
Json ChromeTrace(const v1::RequestTrace& trace);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_CHROME_TRACE_H_
