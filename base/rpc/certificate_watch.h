// CertificateWatch: the certificate that a process uses, read again when its files change and taken only
// where it holds.
#ifndef HW_BASE_RPC_CERTIFICATE_WATCH_H_
#define HW_BASE_RPC_CERTIFICATE_WATCH_H_

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "base/rpc/certificate.h"

namespace headwater {

// A file of this process's memory whose contents are replaced as a whole: whoever opens its path reads what
// was put there last.
class MemoryFile {
 public:
  MemoryFile() = default;
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  // modified: the time that a reader sees, in seconds. UNAVAILABLE: there is no memory or no descriptor.
  absl::Status Put(const std::string& text, int64_t modified);
  std::string path() const;

 private:
  int fd_ = -1;
};

// Thread-safe. Looks on a thread of its own.
class CertificateWatch {
 public:
  // role: what the last part of each certificate's SPIFFE id has to be; empty: anything. INVALID_ARGUMENT:
  // ReadCertificateFiles()'s and CheckCertificate()'s; the certificate is of another role.
  static absl::StatusOr<std::shared_ptr<CertificateWatch>> Start(const CertificateFiles& paths,
                                                                 const std::string& role,
                                                                 absl::Duration refresh);
  ~CertificateWatch();

  // Of the certificate in use.
  CertificateInfo info() const;
  // How often files that had changed could not be used, which is logged; those before them stay in use.
  int64_t failures() const;

  // What is in use, for those who read it from files: certificate and key, and authorities.
  std::string identity_path() const { return identity_.path(); }
  std::string ca_path() const { return ca_.path(); }

 private:
  CertificateWatch(const CertificateFiles& paths, const std::string& role, absl::Duration refresh);
  // Takes what is in the files where that is new. An error: what is there cannot be used.
  absl::Status Look();
  absl::Status Take(const CertificateFiles& texts);
  void Run();
  bool Pause(absl::Duration duration);
  void Fail(const absl::Status& status);

  const CertificateFiles paths_;
  const std::string role_;
  const absl::Duration refresh_;
  MemoryFile identity_, ca_;
  // Of the watching thread, once it runs.
  CertificateFiles texts_;
  int64_t version_ = 0;
  absl::Time next_warning_ = absl::InfinitePast();

  mutable std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  CertificateInfo info_ ABSL_GUARDED_BY(mutex_);
  int64_t failures_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

}  // namespace headwater

#endif  // HW_BASE_RPC_CERTIFICATE_WATCH_H_
