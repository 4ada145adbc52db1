// The directory of a KvStore's session files: one process's at a time, with what an earlier one left.
#ifndef HW_KVTRANSFER_STORE_DIRECTORY_H_
#define HW_KVTRANSFER_STORE_DIRECTORY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headwater {

class StoreDirectory {
 public:
  // Makes the directory if missing and locks it (flock). FAILED_PRECONDITION: it cannot be made, or another
  // process has it.
  static absl::StatusOr<std::unique_ptr<StoreDirectory>> Open(const std::string& path);
  ~StoreDirectory();
  StoreDirectory(const StoreDirectory&) = delete;
  StoreDirectory& operator=(const StoreDirectory&) = delete;

  // Names of the sessions there. First removes what an earlier process set aside, and what sessions that were
  // being made or removed left behind.
  absl::StatusOr<std::vector<std::string>> TakeOver();
  // Moves a session's files to path/set_aside, with a warning that says why.
  void SetAside(const std::string& name, const absl::Status& why);

 private:
  explicit StoreDirectory(const std::string& path) : path_(path) {}

  const std::string path_;
  int lock_fd_ = -1;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_STORE_DIRECTORY_H_
