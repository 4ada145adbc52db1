#include "kvtransfer/store_directory.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <system_error>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

namespace fs = std::filesystem;

constexpr size_t kNameHexDigits = 32;
constexpr char kSetAside[] = "set_aside";

// The session name of one of our files, or "" for another file.
std::string SessionNameOf(const std::string& file, absl::string_view suffix) {
  absl::string_view name = file;
  if (!absl::ConsumeSuffix(&name, suffix) || name.size() != kNameHexDigits) return "";
  return name.find_first_not_of("0123456789abcdef") == absl::string_view::npos ? std::string(name) : "";
}

absl::StatusOr<std::vector<std::string>> ListFiles(const std::string& directory) {
  std::error_code error;
  std::vector<std::string> files;
  fs::directory_iterator it(directory, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error))
    files.push_back(it->path().filename().string());
  if (error) return absl::UnavailableError(absl::StrCat("cannot list ", directory, ": ", error.message()));
  return files;
}

}  // namespace

StoreDirectory::~StoreDirectory() {
  if (lock_fd_ >= 0) close(lock_fd_);
}

absl::StatusOr<std::unique_ptr<StoreDirectory>> StoreDirectory::Open(const std::string& path) {
  auto directory = absl::WrapUnique(new StoreDirectory(path));
  std::error_code error;
  fs::create_directories(path, error);
  if (error) {
    return absl::FailedPreconditionError(absl::StrCat("cannot make kv_dir ", path, ": ", error.message()));
  }
  const std::string lock = path + "/lock";
  directory->lock_fd_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (directory->lock_fd_ < 0)
    return absl::FailedPreconditionError(absl::StrCat("cannot open ", lock, ": ", std::strerror(errno)));
  if (flock(directory->lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "kv_dir ", path,
        errno == EWOULDBLOCK ? " is in use by another process" : absl::StrCat(": ", std::strerror(errno))));
  }
  return directory;
}

absl::StatusOr<std::vector<std::string>> StoreDirectory::TakeOver() {
  std::error_code error;
  // One generation is kept for a look; older ones would eat the space of sessions.
  fs::remove_all(absl::StrCat(path_, "/", kSetAside), error);
  HW_ASSIGN_OR_RETURN(const std::vector<std::string> files, ListFiles(path_));
  std::set<std::string> sessions;
  for (const std::string& file : files) {
    if (std::string name = SessionNameOf(file, ".meta"); !name.empty()) sessions.insert(std::move(name));
  }
  for (const std::string& file : files) {
    const std::string payload = SessionNameOf(file, ".kv");
    const bool orphan = !payload.empty() && sessions.count(payload) == 0;
    if (orphan || !SessionNameOf(file, ".meta.tmp").empty())
      fs::remove(absl::StrCat(path_, "/", file), error);
  }
  return std::vector<std::string>(sessions.begin(), sessions.end());
}

void StoreDirectory::SetAside(const std::string& name, const absl::Status& why) {
  HW_LOG(WARNING) << "KV session set aside: " << why.message();
  const std::string aside = absl::StrCat(path_, "/", kSetAside);
  std::error_code error;
  fs::create_directories(aside, error);
  for (const absl::string_view suffix : {".meta", ".kv"}) {
    const std::string from = absl::StrCat(path_, "/", name, suffix);
    fs::rename(from, absl::StrCat(aside, "/", name, suffix), error);
    if (error) fs::remove(from, error);
  }
}

}  // namespace headwater
