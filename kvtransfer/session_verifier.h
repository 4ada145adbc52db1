// A session of which only the checksums are kept: its blocks are checked as they come, and dropped. All of it
// lies in the process's memory and ends with it.
#ifndef HW_KVTRANSFER_SESSION_VERIFIER_H_
#define HW_KVTRANSFER_SESSION_VERIFIER_H_

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "kvtransfer/layout.h"
#include "kvtransfer/session_storage.h"

namespace headwater {

class SessionVerifier final : public SessionStorage {
 public:
  // INVALID_ARGUMENT: the request has over 4 KiB; RESOURCE_EXHAUSTED, KV_MEMORY_FULL: the system has no
  // memory.
  static absl::StatusOr<std::unique_ptr<SessionVerifier>> Create(const v1::OpenSessionRequest& request,
                                                                 const KvGeometry& geometry);
  // Memory of one session at most: 8 bytes a block and 16 KiB.
  static uint64_t MemoryBytes(const KvGeometry& geometry);

  absl::StatusOr<uint32_t> Take(const KvBlockId& block,
                                const std::vector<absl::string_view>& payload) override;
  const char* payload() const override { return nullptr; }
  uint32_t epoch() const override { return epoch_.load(std::memory_order_acquire); }
  bool committed() const override { return committed_.load(std::memory_order_acquire); }
  absl::Status SetEpoch(uint32_t epoch, uint32_t resume_layer) override;
  absl::Status Commit(const CommitRecord& record) override;
  CommitRecord commit_record() const override { return CommitRecord(); }
  void Unlink() override {}

 private:
  struct Free {
    void operator()(uint64_t* table) const { std::free(table); }
  };
  using Table = std::unique_ptr<uint64_t[], Free>;

  SessionVerifier(const v1::OpenSessionRequest& request, const KvGeometry& geometry, Table table);

  const Table table_;
  std::atomic<uint32_t> epoch_;
  std::atomic<bool> committed_{false};
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_SESSION_VERIFIER_H_
