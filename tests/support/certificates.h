// A certificate authority for tests, and what it issues, as PEM.
#ifndef HW_TESTS_SUPPORT_CERTIFICATES_H_
#define HW_TESTS_SUPPORT_CERTIFICATES_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "base/rpc/transport.h"

namespace headwater::testing {

struct Issued {
  std::string cert, key;
};

class CertificateAuthority {
 public:
  explicit CertificateAuthority(const std::string& name);
  ~CertificateAuthority();
  CertificateAuthority(const CertificateAuthority&) = delete;
  CertificateAuthority& operator=(const CertificateAuthority&) = delete;

  const std::string& pem() const { return pem_; }
  // With 127.0.0.1 and localhost, and the URI names; each begins with its scheme.
  Issued Issue(const std::vector<std::string>& uris, absl::Time not_before = absl::Now() - absl::Hours(1),
               absl::Time not_after = absl::Now() + absl::Hours(1)) const;

 private:
  struct Keys;
  const std::unique_ptr<Keys> keys_;
  std::string pem_;
};

// Files of one process in a directory of their own, which goes with it. Rewriting them is atomic: the
// directory is a link that changes, as Kubernetes has it.
class IdentityFiles {
 public:
  // role: of spiffe://test.example/ns/headwater/ROLE.
  IdentityFiles(const CertificateAuthority& authority, const std::string& role);
  ~IdentityFiles();

  void Rewrite(const Issued& issued, const std::string& ca);
  TransportOptions options() const;  // looks every second
  const std::string& directory() const { return directory_; }

 private:
  std::string directory_;
  int version_ = 0;
};

std::string SpiffeId(const std::string& role);

}  // namespace headwater::testing

#endif  // HW_TESTS_SUPPORT_CERTIFICATES_H_
