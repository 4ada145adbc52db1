// Results and events as tables and as JSON.
#ifndef HW_TOOLS_CLI_RENDER_H_
#define HW_TOOLS_CLI_RENDER_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include <nlohmann/json.hpp>

#include "headwater/v1/admin.pb.h"
#include "headwater/v1/decode.pb.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

// Field order is kept as written.
using Json = nlohmann::ordered_json;

// One event of a prefill: {"event":"accepted"|"progress"|"completed"|"failed", ...}; durations are in
// seconds, names as in the proto.
Json EventToJson(const v1::PrefillResponse& response);
Json CompletedToJson(const v1::PrefillCompleted& completed);
Json TokenToJson(const v1::GenerateResponse& token);
// {"code","reason","message","metadata"}
Json ErrorToJson(const absl::Status& status);
Json ToJson(const v1::ListWorkersResponse& workers);
Json ToJson(const v1::ListDecodeNodesResponse& nodes);

// One line without its end; invalid UTF-8 is replaced.
std::string DumpJson(const Json& json);

// Rows of two columns, aligned, each line ended.
std::string RenderPairs(const std::vector<std::pair<std::string, std::string>>& rows);
// Rows of equal length, the first being the head, columns aligned.
std::string RenderTable(const std::vector<std::vector<std::string>>& rows);

// `ttft`: from the call to the completed event, as the client saw it.
std::string RenderCompleted(const v1::PrefillCompleted& completed, absl::Duration ttft);
std::string RenderWorkers(const v1::ListWorkersResponse& workers);
std::string RenderDecodeNodes(const v1::ListDecodeNodesResponse& nodes);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_RENDER_H_
