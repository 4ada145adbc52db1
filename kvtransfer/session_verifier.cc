#include "kvtransfer/session_verifier.h"

#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"

namespace headwater {
namespace {

constexpr uint64_t kMostRequestBytes = 4096;
// The request, which is kept twice in part, and what surrounds it.
constexpr uint64_t kFixedBytes = 4 * kMostRequestBytes;

}  // namespace

uint64_t SessionVerifier::MemoryBytes(const KvGeometry& geometry) {
  return kFixedBytes + geometry.num_blocks() * sizeof(uint64_t);
}

absl::StatusOr<std::unique_ptr<SessionVerifier>> SessionVerifier::Create(
    const v1::OpenSessionRequest& request, const KvGeometry& geometry) {
  if (request.ByteSizeLong() > kMostRequestBytes) {
    return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
                     absl::StrCat("the session's request has ", request.ByteSizeLong(),
                                  " bytes, the limit is ", kMostRequestBytes),
                     {{"limit", absl::StrCat(kMostRequestBytes)}});
  }
  // Zeroed pages come one by one as blocks do.
  Table table(static_cast<uint64_t*>(std::calloc(geometry.num_blocks(), sizeof(uint64_t))));
  if (table == nullptr) {
    const uint64_t bytes = MemoryBytes(geometry);
    return MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL,
                     absl::StrCat("no memory for ", bytes, " bytes of what is known of ",
                                  geometry.num_blocks(), " blocks"),
                     {{"bytes_asked", absl::StrCat(bytes)}});
  }
  return absl::WrapUnique(new SessionVerifier(request, geometry, std::move(table)));
}

SessionVerifier::SessionVerifier(const v1::OpenSessionRequest& request, const KvGeometry& geometry,
                                 Table table)
    : SessionStorage(request, geometry), table_(std::move(table)), epoch_(request.epoch()) {
  SetTable(table_.get());
}

absl::StatusOr<uint32_t> SessionVerifier::Take(const KvBlockId& /*block*/,
                                               const std::vector<absl::string_view>& payload) {
  uint32_t crc = 0;
  for (const absl::string_view piece : payload) crc = ExtendCrc32c(crc, piece.data(), piece.size());
  return crc;
}

absl::Status SessionVerifier::SetEpoch(uint32_t epoch, uint32_t resume_layer) {
  committed_.store(false, std::memory_order_release);
  ClearFrom(resume_layer);
  epoch_.store(epoch, std::memory_order_release);
  return absl::OkStatus();
}

absl::Status SessionVerifier::Commit(const CommitRecord& /*record*/) {
  committed_.store(true, std::memory_order_release);
  return absl::OkStatus();
}

}  // namespace headwater
