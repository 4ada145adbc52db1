#include "base/rpc/certificate_watch.h"

#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr absl::Duration kWarningInterval = absl::Minutes(10);
// Files that are being replaced match again after this.
constexpr absl::Duration kBetween = absl::Milliseconds(100);

absl::Status SystemError(absl::string_view what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
}

bool WriteAll(int fd, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t written = write(fd, text.data() + done, text.size() - done);
    if (written <= 0) return false;
    done += static_cast<size_t>(written);
  }
  return true;
}

}  // namespace

MemoryFile::~MemoryFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status MemoryFile::Put(const std::string& text, int64_t modified) {
  const int fd = memfd_create("headwater-tls", MFD_CLOEXEC);
  if (fd < 0) return SystemError("memfd_create");
  const timespec time = {modified, 0};
  const timespec times[] = {time, time};
  absl::Status status;
  if (!WriteAll(fd, text) || futimens(fd, times) != 0) {
    status = SystemError("a file of memory cannot be written");
  } else if (fd_ < 0) {
    fd_ = fd;
    return status;
  } else if (dup3(fd, fd_, O_CLOEXEC) < 0) {
    status = SystemError("dup3");
  }
  close(fd);
  return status;
}

std::string MemoryFile::path() const { return absl::StrCat("/proc/self/fd/", fd_); }

absl::StatusOr<std::shared_ptr<CertificateWatch>> CertificateWatch::Start(const CertificateFiles& paths,
                                                                          const std::string& role,
                                                                          absl::Duration refresh) {
  std::shared_ptr<CertificateWatch> watch(new CertificateWatch(paths, role, refresh));
  HW_RETURN_IF_ERROR(watch->Look());
  watch->thread_ = std::thread([raw = watch.get()] { raw->Run(); });
  return watch;
}

CertificateWatch::CertificateWatch(const CertificateFiles& paths, const std::string& role,
                                   absl::Duration refresh)
    : paths_(paths), role_(role), refresh_(refresh) {}

CertificateWatch::~CertificateWatch() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (thread_.joinable()) thread_.join();
}

CertificateInfo CertificateWatch::info() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return info_;
}

int64_t CertificateWatch::failures() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return failures_;
}

absl::Status CertificateWatch::Look() {
  HW_ASSIGN_OR_RETURN(const CertificateFiles texts, ReadCertificateFiles(paths_));
  return texts == texts_ ? absl::OkStatus() : Take(texts);
}

absl::Status CertificateWatch::Take(const CertificateFiles& texts) {
  HW_ASSIGN_OR_RETURN(CertificateInfo info, CheckCertificate(paths_, texts, WallNow()));
  if (!role_.empty() && !absl::EndsWith(info.spiffe_id, absl::StrCat("/", role_))) {
    return absl::InvalidArgumentError(absl::StrCat("--tls_cert=", paths_.cert, ": it is of ", info.spiffe_id,
                                                   "; peers would not believe it, they want .../", role_));
  }
  // Together in one file, so that nobody reads them apart; the version is the time that tells one from
  // another.
  ++version_;
  HW_RETURN_IF_ERROR(ca_.Put(texts.ca, version_));
  HW_RETURN_IF_ERROR(identity_.Put(absl::StrCat(texts.cert, "\n", texts.key), version_));
  if (version_ > 1) {
    const bool same_identity = texts.cert == texts_.cert && texts.key == texts_.key;
    HW_LOG(INFO)
            .Field("identity", info.spiffe_id)
            .Field("serial", info.serial)
            .Field("valid_until", absl::FormatTime(info.not_after, absl::UTCTimeZone()))
        << (same_identity ? "new authorities were taken"
                          : (texts.ca == texts_.ca ? "a new certificate was taken"
                                                   : "a new certificate and new authorities were taken"));
  }
  texts_ = texts;
  const std::lock_guard<std::mutex> lock(mutex_);
  info_ = std::move(info);
  return absl::OkStatus();
}

bool CertificateWatch::Pause(absl::Duration duration) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !stop_.wait_for(lock, absl::ToChronoMilliseconds(duration), [this] { return stopping_; });
}

void CertificateWatch::Run() {
  while (Pause(refresh_)) {
    absl::Status status = Look();
    if (!status.ok()) {
      if (!Pause(kBetween)) return;
      status = Look();
    }
    if (status.ok()) {
      next_warning_ = absl::InfinitePast();
    } else {
      Fail(status);
    }
  }
}

void CertificateWatch::Fail(const absl::Status& status) {
  CertificateInfo in_use;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++failures_;
    in_use = info_;
  }
  const absl::Time now = SteadyNow();
  if (now < next_warning_) return;
  next_warning_ = now + kWarningInterval;
  HW_LOG(WARNING)
          .Field("serial", in_use.serial)
          .Field("valid_until", absl::FormatTime(in_use.not_after, absl::UTCTimeZone()))
      << "the certificate and authorities stay as they were: " << status.message();
}

}  // namespace headwater
