// The fields of a PrefillRequest as flags and as lines of a batch file.
#ifndef HW_TOOLS_CLI_REQUEST_FLAGS_H_
#define HW_TOOLS_CLI_REQUEST_FLAGS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "base/flags.h"
#include "headwater/v1/prefill.pb.h"

namespace headwater {

// Declares --model, --tenant, --priority, --deadline, --policy, --min_recall, --max_density, --time_budget,
// --decode_node, --decode_pool, --kv_dtype, --top_logprobs, --world_size, --partition, --strategy,
// --block_tokens; each writes its field of `request`.
void DeclareRequestFlags(v1::PrefillRequest* request, FlagSet* flags);

// "dense", "a_shape:sink_tokens=128,window_tokens=1024". The service knows which names and ranges are right.
absl::StatusOr<v1::AttentionPolicy> ParsePolicy(absl::string_view text);

// One JSON object a line: token_ids (required), and request_id, model, tenant, priority, deadline (seconds or
// "30s"), policy (as the flag), min_recall, max_density, time_budget (as deadline), decode_node, decode_pool,
// kv_dtype, top_logprobs, world_size, partition, strategy, block_tokens. What a line leaves out is as in
// `defaults`. Empty lines are skipped. INVALID_ARGUMENT names the line and the key.
absl::StatusOr<std::vector<v1::PrefillRequest>> ParseBatch(absl::string_view jsonl,
                                                           const v1::PrefillRequest& defaults);

}  // namespace headwater

#endif  // HW_TOOLS_CLI_REQUEST_FLAGS_H_
