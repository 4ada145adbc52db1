// What a KvSession is kept in: which blocks have come and with which CRC, and for SessionFiles their payload.
#ifndef HW_KVTRANSFER_SESSION_STORAGE_H_
#define HW_KVTRANSFER_SESSION_STORAGE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "kvtransfer/digest.h"
#include "kvtransfer/layout.h"

namespace headwater {

// What the commit adds.
struct CommitRecord {
  KvDigest digest;
  int32_t first_token = 0;
  float first_top2_gap = 0;
  std::vector<int32_t> prompt;
};

// Thread-safe for different blocks; SetEpoch and Commit need that nobody else writes.
class SessionStorage {
 public:
  virtual ~SessionStorage() = default;
  SessionStorage(const SessionStorage&) = delete;
  SessionStorage& operator=(const SessionStorage&) = delete;

  const v1::OpenSessionRequest& request() const { return request_; }
  const KvGeometry& geometry() const { return geometry_; }

  // Takes the payload of a block that is not stored, in pieces, as it came, and returns its CRC. The block
  // does not count before MarkStored. UNAVAILABLE: the memory cannot be written.
  virtual absl::StatusOr<uint32_t> Take(const KvBlockId& block,
                                        const std::vector<absl::string_view>& payload) = 0;
  // The whole cache; null: payloads are not kept.
  virtual const char* payload() const = 0;

  bool IsStored(uint64_t block_index) const { return BlockCrc(block_index, nullptr); }
  // False: not stored.
  bool BlockCrc(uint64_t block_index, uint32_t* crc) const;
  // Publishes the block; its payload must be in place.
  void MarkStored(uint64_t block_index, uint32_t crc);
  uint64_t CountStored() const;
  // Of the stored blocks.
  KvDigest Digest() const;

  virtual uint32_t epoch() const = 0;
  virtual bool committed() const = 0;
  // Clears the blocks of layers >= `resume_layer`, returns to the uncommitted state, then sets the epoch.
  virtual absl::Status SetEpoch(uint32_t epoch, uint32_t resume_layer) = 0;
  // Keeps what is needed of the record and sets the state committed.
  virtual absl::Status Commit(const CommitRecord& record) = 0;
  // Of a committed session whose payload is kept.
  virtual CommitRecord commit_record() const = 0;

  // Removes what would outlive this object; its memory stays until the object ends.
  virtual void Unlink() = 0;

 protected:
  SessionStorage(const v1::OpenSessionRequest& request, const KvGeometry& geometry)
      : request_(request), geometry_(geometry) {}
  // One u64 for each block: its CRC32C in the upper half, kBlockStored in the lower; 0: not stored. One
  // aligned store sets both.
  void SetTable(uint64_t* table) { table_ = table; }
  uint64_t* Entry(uint64_t block_index) const { return table_ + block_index; }
  void ClearFrom(uint32_t resume_layer);

 private:
  const v1::OpenSessionRequest request_;
  const KvGeometry geometry_;
  uint64_t* table_ = nullptr;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_SESSION_STORAGE_H_
