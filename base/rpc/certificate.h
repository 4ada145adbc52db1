// What a process's own certificate says, read and checked before it is used.
#ifndef HW_BASE_RPC_CERTIFICATE_H_
#define HW_BASE_RPC_CERTIFICATE_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace headwater {

struct CertificateInfo {
  std::string spiffe_id;  // its only URI name
  std::string serial;     // hexadecimal
  absl::Time not_before, not_after;
};

// Of a certificate (chain), of its key without a passphrase, and of the authorities that peers are checked
// against: the paths of three PEM files, or what is in them.
struct CertificateFiles {
  std::string cert, key, ca;
  bool operator==(const CertificateFiles&) const = default;
};

// INVALID_ARGUMENT names the flag (tls_cert, tls_key, tls_ca), the file and what is wrong: it cannot be read
// or is over 1 MiB.
absl::StatusOr<CertificateFiles> ReadCertificateFiles(const CertificateFiles& paths);

// INVALID_ARGUMENT, as above: it is no PEM of its kind, the key is another certificate's, the certificate is
// not valid now or has not exactly one URI name that begins with spiffe://.
absl::StatusOr<CertificateInfo> CheckCertificate(const CertificateFiles& paths, const CertificateFiles& texts,
                                                 absl::Time now);

}  // namespace headwater

#endif  // HW_BASE_RPC_CERTIFICATE_H_
