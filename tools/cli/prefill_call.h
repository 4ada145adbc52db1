// One Prefill call that Ctrl-C cancels in the service, not only here.
#ifndef HW_TOOLS_CLI_PREFILL_CALL_H_
#define HW_TOOLS_CLI_PREFILL_CALL_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include <grpcpp/channel.h>

#include "headwater/v1/prefill.pb.h"
#include "tools/cli/console.h"

namespace headwater {

// Runs the request to its end; `on_event` sees every event. A failed event becomes its status; a stream that
// ends without a terminal event is UNAVAILABLE. The first Ctrl-C sends CancelPrefill and leaves the call when
// that is answered (at most 10 s), the second leaves it at once. The request needs its request_id.
// traceparent: the call's metadata of that name (W3C Trace Context); empty: none.
absl::StatusOr<v1::PrefillCompleted> CallPrefill(
    const std::shared_ptr<grpc::Channel>& channel, const v1::PrefillRequest& request,
    const std::string& traceparent, const Console& console,
    const std::function<void(const v1::PrefillResponse&)>& on_event);

// The error of a failed event; never OK.
absl::Status FailureOf(const v1::PrefillFailed& failed);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_PREFILL_CALL_H_
