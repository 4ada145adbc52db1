#include "coordinator/destination.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "base/rpc/grpc_status.h"
#include "coordinator/validation.h"

namespace headwater {
namespace {

uint64_t DtypeBytes(v1::KvDtype dtype) { return dtype == v1::KV_DTYPE_F32 ? 4 : 2; }

absl::Status Mismatch(v1::ErrorReason reason, const std::string& node, absl::string_view what,
                      const std::string& value, const std::string& limit) {
  return MakeError(absl::StatusCode::kFailedPrecondition, reason,
                   absl::StrCat("decode node ", node, ": ", what, " is ", value, ", the node has ", limit),
                   {{"value", value}, {"limit", limit}, {"decode_node", node}});
}

// Checks in the order of how far a node is from taking the cache; `closeness` is how many held.
absl::Status CheckNode(const DecodeNode& node, const v1::KvLayout& layout, int* closeness) {
  const v1::DecodeRegistration& has = node.registration;
  *closeness = 0;
  if (has.model_fingerprint() != layout.model_fingerprint()) {
    return Mismatch(v1::ERROR_REASON_MODEL_MISMATCH, has.decode_node(), "the model's fingerprint",
                    layout.model_fingerprint(), has.model_fingerprint());
  }
  *closeness = 1;
  const auto& dtypes = has.kv_dtypes();
  if (std::find(dtypes.begin(), dtypes.end(), static_cast<int>(layout.dtype())) == dtypes.end()) {
    const auto append = [](std::string* out, int dtype) {
      out->append(v1::KvDtype_Name(static_cast<v1::KvDtype>(dtype)));
    };
    return Mismatch(v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED, has.decode_node(), "kv_dtype",
                    v1::KvDtype_Name(layout.dtype()), absl::StrJoin(dtypes, ", ", append));
  }
  *closeness = 2;
  if (has.max_position() != 0 && layout.num_tokens() > has.max_position()) {
    return Mismatch(v1::ERROR_REASON_PROMPT_TOO_LONG, has.decode_node(), "the number of tokens",
                    absl::StrCat(layout.num_tokens()), absl::StrCat(has.max_position(), " positions"));
  }
  *closeness = 3;
  if (KvBytes(layout) > has.kv_budget_bytes()) {
    return Mismatch(v1::ERROR_REASON_KV_MEMORY_FULL, has.decode_node(), "the size of the cache in bytes",
                    absl::StrCat(KvBytes(layout)), absl::StrCat(has.kv_budget_bytes()));
  }
  *closeness = 4;
  return absl::OkStatus();
}

absl::StatusOr<std::string> PickFromPool(const std::string& pool, const v1::KvLayout& layout,
                                         const ClusterState& cluster) {
  const DecodeNode* best = nullptr;
  absl::Status closest;
  int best_closeness = -1;
  for (const auto& [id, node] : cluster.decode_nodes()) {
    if (node.registration.pool() != pool) continue;
    int closeness = 0;
    absl::Status status = CheckNode(node, layout, &closeness);
    if (!status.ok()) {
      if (closeness > best_closeness) closest = std::move(status);
      best_closeness = std::max(best_closeness, closeness);
      continue;
    }
    const auto rank = [](const DecodeNode& n) { return std::make_tuple(n.connected, n.FreeBytes()); };
    if (best == nullptr || rank(node) > rank(*best)) best = &node;
  }
  if (best != nullptr) return best->registration.decode_node();
  if (!closest.ok()) return closest;
  return WithRetryAfter(
      MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_NO_DECODE_NODE,
                absl::StrCat("pool \"", Printable(pool), "\" has no registered decode node"),
                {{"value", Printable(pool)}, {"limit", "a pool with a registered node"}}),
      absl::Seconds(1));
}

}  // namespace

uint64_t KvBytes(const v1::KvLayout& layout) {
  return uint64_t{2} * layout.num_layers() * layout.num_kv_heads() * layout.head_dim() *
         DtypeBytes(layout.dtype()) * layout.num_tokens();
}

absl::StatusOr<std::string> PickDecodeNode(const v1::PrefillRequest& request, const v1::KvLayout& layout,
                                           const ClusterState& cluster) {
  if (request.destination_case() != v1::PrefillRequest::kDecodeNode) {
    return PickFromPool(request.decode_pool().empty() ? "default" : request.decode_pool(), layout, cluster);
  }
  const DecodeNode* node = cluster.FindDecodeNode(request.decode_node());
  if (node == nullptr) {
    return MakeError(
        absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_DECODE_NODE,
        absl::StrCat("decode_node \"", Printable(request.decode_node()), "\" is not registered"),
        {{"value", Printable(request.decode_node())}, {"limit", "the id of a registered decode node"}});
  }
  int closeness = 0;
  const absl::Status status = CheckNode(*node, layout, &closeness);
  if (!status.ok()) return status;
  return node->registration.decode_node();
}

}  // namespace headwater
