// KvStore: the receiver's sessions. Nothing is visible before the commit.
#ifndef HW_KVTRANSFER_STORE_H_
#define HW_KVTRANSFER_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/layout.h"

namespace headwater {

// What becomes of a block whose CRC is right.
enum class KvSink {
  // It is kept in file-backed memory, which survives the process, kill -9 included, but not a power loss
  // (nothing is synced). STORED, in an acknowledgement, says that much.
  kMemory,
  // It is dropped; its CRC is kept in the process's memory and the commit compares the digest of them all.
  // Everything but Acquire is as with kMemory, yet STORED says "checked", and a receiver that starts anew
  // knows no session: senders end with DECODE_LOST, and the coordinator begins again in a new epoch.
  kVerify,
};

struct KvStoreOptions {
  KvSink sink = KvSink::kMemory;
  // Directory of the session files, made if missing; a tmpfs is fine. One process at a time (flock). kVerify
  // has none.
  std::string directory;
  // kMemory: payload bytes of all sessions. Beside them a session's metadata takes 12 KiB, 8 bytes a block
  // and 4 bytes a token of disk or tmpfs. kVerify: what is kept of all sessions, 16 KiB and 8 bytes a block
  // of each.
  uint64_t budget_bytes = 0;
  uint32_t max_sessions = 1024;
  // An uncommitted session to which no block comes, and a committed one without use, is freed after this
  // long.
  absl::Duration lease = absl::Minutes(5);
  std::string model_fingerprint;  // empty: any
  const Clock* clock = Clock::Real();
};

enum class PutResult { kStored, kAlreadyStored, kCorrupt, kStaleEpoch, kRefused };

// A committed cache. Holding it keeps the memory mapped and the lease alive; the memory is read-only.
class CommittedKv {
 public:
  virtual ~CommittedKv() = default;
  virtual const KvGeometry& geometry() const = 0;
  // One layer's K or V: [tokens, kv_heads, head_dim].
  virtual const void* Tensor(uint32_t layer, KvKind kind) const = 0;
  virtual const std::vector<int32_t>& prompt() const = 0;
  virtual int32_t first_token() const = 0;
  virtual float first_top2_gap() const = 0;  // logprob difference of the two best; 0: not known
};

// Thread-safe. Every session operation needs the session's token, except those of the decode side (Acquire,
// Release).
class KvStore {
 public:
  // kMemory takes over what an earlier process left in the directory: checks each block's CRC again, drops
  // what does not match. Files that make no sense, and committed sessions that lost a block, are moved to
  // directory/set_aside with a warning and stay there until the next Open. Sessions of another model are
  // removed. FAILED_PRECONDITION: the directory cannot be made or belongs to another process. Takes about 0.1
  // s per GB.
  static absl::StatusOr<std::unique_ptr<KvStore>> Open(const KvStoreOptions& options);
  virtual ~KvStore() = default;

  // As KvTransferService.OpenSession; returns the bytes reserved of the budget. RESOURCE_EXHAUSTED,
  // KV_MEMORY_FULL with bytes asked and available; FAILED_PRECONDITION: over the whole budget, or another
  // model's cache (MODEL_MISMATCH). A higher epoch with resume_layer > 0 of a session that is not here is
  // NOT_FOUND, UNKNOWN_SESSION. A committed session takes a higher epoch only while no CommittedKv is held.
  // UNAVAILABLE: another call is opening or freeing the session. Allocates the files: slow where a tmpfs has
  // to find pages.
  virtual absl::StatusOr<uint64_t> OpenSession(const v1::OpenSessionRequest& request) = 0;

  // Geometry (may be null) and current state, for a hello. NOT_FOUND, UNKNOWN_SESSION; PERMISSION_DENIED:
  // wrong token; ABORTED, STALE_EPOCH.
  virtual absl::StatusOr<v1::KvSessionState> Hello(const v1::KvHello& hello, KvGeometry* geometry) = 0;

  // Checks the header against the layout, then the payload against the CRC, and stores it (kVerify: its CRC).
  // `payload` is in pieces, as it came. The index is set unless the result is kRefused. `error` says why a
  // result is not kStored or kAlreadyStored. A block that is stored already is not written again: with the
  // same CRC it is kAlreadyStored, with another kRefused. kCorrupt means "send it again".
  virtual PutResult Put(absl::string_view session_id, const v1::KvBlock& block,
                        const std::vector<absl::string_view>& payload, uint64_t* block_index,
                        std::string* error) = 0;

  // As KvTransferService.CommitSession. FAILED_PRECONDITION names the number missing; DATA_LOSS, KV_CORRUPT:
  // digests differ. INVALID_ARGUMENT: not layout.num_tokens token ids, a token id or first token over 2^31
  // - 1. Idempotent for the same digest.
  virtual absl::StatusOr<v1::CommitSessionResponse> Commit(const v1::CommitSessionRequest& request) = 0;
  // Bytes reclaimed; 0: unknown session. FAILED_PRECONDITION: committed (Release frees it).
  virtual absl::StatusOr<uint64_t> Abort(const v1::AbortSessionRequest& request) = 0;

  // NOT_FOUND: unknown, or released; FAILED_PRECONDITION, SESSION_NOT_COMMITTED; FAILED_PRECONDITION,
  // BAD_FIELD: committed, but the sink is kVerify.
  virtual absl::StatusOr<std::shared_ptr<const CommittedKv>> Acquire(absl::string_view session_id) = 0;
  // Frees a session whatever its state; returns the bytes reclaimed (0: unknown). Memory that a CommittedKv
  // still holds goes with the last of them.
  virtual uint64_t Release(absl::string_view session_id) = 0;
  // Frees what the lease says; returns the number of sessions. Call about once a second.
  virtual int ExpireLeases() = 0;

  // Bytes are those of the budget.
  struct Usage {
    uint64_t bytes = 0;
    uint32_t sessions = 0;
    uint32_t committed = 0;
    uint64_t committed_bytes = 0;  // of `bytes`, those of committed sessions
  };
  virtual Usage usage() const = 0;
  virtual KvSink sink() const = 0;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_STORE_H_
