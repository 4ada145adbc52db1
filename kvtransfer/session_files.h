// The two files of one KV session: NAME.kv, the payload, and NAME.meta, what is known of it. Both are mapped
// MAP_SHARED, so what is written survives the end of the process, kill -9 included (the page cache keeps it),
// but not a power loss: nothing is synced.
//
// NAME.meta, host byte order (the files never leave the machine):
//   0      fixed part: magic, version, size and CRC32C of a serialized v1::OpenSessionRequest, then that
//          request as it came first (session id, token, request id, layout)
//   4096   what changes: epoch, state, and the commit record
//   8192   one u64 for each block: its CRC32C in the upper half, kBlockStored in the lower; 0: not stored.
//   One
//          aligned store sets both, after the payload, so that a block never counts before its bytes are
//          there
//   ...    the prompt's token ids (u32 each, num_tokens of them), filled by the commit
#ifndef HW_KVTRANSFER_SESSION_FILES_H_
#define HW_KVTRANSFER_SESSION_FILES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "kvtransfer/layout.h"
#include "kvtransfer/session_storage.h"

namespace headwater {

// A file's bytes in memory, unmapped at the end.
class FileMapping {
 public:
  FileMapping() = default;
  ~FileMapping();
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;

  // Maps all `bytes` of the open file, readable and writable.
  absl::Status Map(int fd, uint64_t bytes, const std::string& path);
  // Makes the pages of [offset, offset + bytes) present and writable in one step, which is cheaper than a
  // fault for each, and turns what would be a SIGBUS (an I/O error, no space) into UNAVAILABLE. Kernels
  // before 5.14 cannot: OK.
  absl::Status Populate(uint64_t offset, uint64_t bytes);
  // Takes the right to write away, or gives it back.
  absl::Status SetWritable(bool writable);

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
};

class SessionFiles final : public SessionStorage {
 public:
  // Makes both files with all their space allocated. RESOURCE_EXHAUSTED, KV_MEMORY_FULL: the file system has
  // no room; UNAVAILABLE: another error of the system.
  static absl::StatusOr<std::unique_ptr<SessionFiles>> Create(const std::string& directory,
                                                              const v1::OpenSessionRequest& request,
                                                              const KvGeometry& geometry);
  // Opens what Create made in an earlier process. Trusts nothing: DATA_LOSS where sizes or checks disagree.
  // Blocks whose payload no longer matches their CRC are cleared; `blocks_dropped` counts them. A committed
  // session of which a block is lost is DATA_LOSS.
  static absl::StatusOr<std::unique_ptr<SessionFiles>> Open(const std::string& directory,
                                                            const std::string& name,
                                                            uint64_t* blocks_dropped);

  // Name of a session's files: a hash, since the id comes from a peer.
  static std::string NameOf(absl::string_view session_id);

  absl::StatusOr<uint32_t> Take(const KvBlockId& block,
                                const std::vector<absl::string_view>& payload) override;
  const char* payload() const override { return payload_.data(); }
  uint32_t epoch() const override;
  bool committed() const override;
  absl::Status SetEpoch(uint32_t epoch, uint32_t resume_layer) override;
  // Writes the record, makes the payload read-only and then the state committed.
  absl::Status Commit(const CommitRecord& record) override;
  CommitRecord commit_record() const override;
  // Removes the files; the mappings stay until this object ends.
  void Unlink() override;

 private:
  SessionFiles(const std::string& directory, const std::string& name, const v1::OpenSessionRequest& request,
               const KvGeometry& geometry);
  absl::Status VerifyBlocks(uint64_t* blocks_dropped);
  absl::Status VerifyCommit() const;
  uint64_t* TableInMeta() const;
  struct MutablePart;
  MutablePart* Mutable() const;
  uint32_t* PromptArea() const;

  std::string meta_path_;
  std::string payload_path_;
  FileMapping meta_;
  FileMapping payload_;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_SESSION_FILES_H_
