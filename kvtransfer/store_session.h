// One session of a KvStore: what may be written when, and by whom.
#ifndef HW_KVTRANSFER_STORE_SESSION_H_
#define HW_KVTRANSFER_STORE_SESSION_H_

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "kvtransfer/session_storage.h"
#include "kvtransfer/store.h"

namespace headwater {

// Bytes that sessions hold, by reservations that give back what they took. Thread-safe.
class KvBudget {
 public:
  explicit KvBudget(uint64_t limit) : limit_(limit) {}
  uint64_t used() const;
  uint64_t limit() const { return limit_; }
  // Takes `bytes`; false, and the bytes still free, where that passes the limit. `force` passes it all the
  // same.
  bool Take(uint64_t bytes, bool force, uint64_t* available);
  void Give(uint64_t bytes);

 private:
  const uint64_t limit_;
  mutable std::mutex mutex_;
  uint64_t used_ = 0;
};

class KvReservation {
 public:
  // Of bytes that were taken from `budget`.
  KvReservation(std::shared_ptr<KvBudget> budget, uint64_t bytes)
      : budget_(std::move(budget)), bytes_(bytes) {}
  ~KvReservation() { budget_->Give(bytes_); }
  KvReservation(const KvReservation&) = delete;
  KvReservation& operator=(const KvReservation&) = delete;

 private:
  const std::shared_ptr<KvBudget> budget_;
  const uint64_t bytes_;
};

// Thread-safe. Two rules keep the payload right: a block is copied by one thread at a time and only while it
// is not stored, and the epoch changes only while no block is being copied.
class KvSession : public std::enable_shared_from_this<KvSession> {
 public:
  KvSession(std::unique_ptr<SessionStorage> storage, std::unique_ptr<KvReservation> reservation,
            const Clock* clock);

  const KvGeometry& geometry() const { return storage_->geometry(); }
  const std::string& request_id() const { return storage_->request().request_id(); }
  bool committed() const { return storage_->committed(); }

  // PERMISSION_DENIED unless `token` is the session's; takes the same time whatever the difference.
  absl::Status CheckToken(absl::string_view token) const;
  // The same of a worker's, which may be that of its epoch (OpenSessionRequest.epoch_tokens).
  absl::Status CheckHelloToken(const v1::KvHello& hello) const;
  // As KvStore's functions of the same name.
  absl::Status OpenAgain(const v1::OpenSessionRequest& request);
  absl::StatusOr<v1::KvSessionState> Hello(const v1::KvHello& hello);
  PutResult Put(const v1::KvBlock& block, const std::vector<absl::string_view>& payload,
                uint64_t* block_index, std::string* error);
  absl::StatusOr<v1::CommitSessionResponse> Commit(const v1::CommitSessionRequest& request);
  absl::StatusOr<std::shared_ptr<const CommittedKv>> Acquire();

  // True if the session has not been used for `lease` and nobody holds or writes it.
  bool Expired(absl::Duration lease) const;
  // Ends the session: removes its files and refuses whatever comes later. Waits for copies under way. False:
  // it was closed already.
  bool Close();

 private:
  class Committed;
  absl::Status CheckEpoch(uint32_t epoch) const;
  bool BeginWrite(std::unique_lock<std::mutex>& lock, const v1::KvBlock& block, uint64_t index,
                  PutResult* result, std::string* error);
  void Touch() { last_used_ = clock_->Now(); }

  const std::unique_ptr<SessionStorage> storage_;
  const std::unique_ptr<KvReservation> reservation_;
  const Clock* const clock_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Blocks that are being copied.
  std::vector<uint64_t> writing_;
  bool changing_epoch_ = false;
  bool closed_ = false;
  uint32_t readers_ = 0;
  absl::Time last_used_;
};

absl::Status UnknownSession(absl::string_view session_id);

}  // namespace headwater

#endif  // HW_KVTRANSFER_STORE_SESSION_H_
