// Transport: who a process is to its peers, and whom it believes. Plaintext, or TLS 1.2 and later with
// certificates on both sides that name roles, read again when their files change.
#ifndef HW_BASE_RPC_TRANSPORT_H_
#define HW_BASE_RPC_TRANSPORT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include "base/rpc/certificate.h"

namespace headwater {

// The last part of a certificate's SPIFFE id: spiffe://TRUST-DOMAIN/.../worker.
enum class Role { kClient, kAdmin, kCoordinator, kWorker, kDecode };
absl::string_view NameOf(Role role);

// PEM files. Either the first three are empty (plaintext) or none is.
struct TransportOptions {
  std::string cert;  // of this process, with what leads to its authority
  std::string key;
  std::string ca;                              // that peers' certificates come from
  std::string roles;                           // who may call what (base/rpc/roles.h); empty: DefaultRoles()
  absl::Duration refresh = absl::Seconds(30);  // files are looked at so often; at least 1 s
};

// Thread-safe; outlives the servers and channels made with it or not, as it likes.
class Transport {
 public:
  // nullptr: plaintext. own: what peers will expect this process to be, where they do. INVALID_ARGUMENT:
  // CertificateWatch::Start()'s; only some of the files are given; the policy cannot be read or is none.
  static absl::StatusOr<std::shared_ptr<const Transport>> Create(const TransportOptions& options,
                                                                 std::optional<Role> own = std::nullopt);
  virtual ~Transport() = default;

  // Of the certificate in use. Files that cannot be used when they change are left, logged and counted.
  virtual CertificateInfo identity() const = 0;
  virtual int64_t reload_failures() const = 0;
  // A peer without a certificate of the authority is refused in the handshake. Calls that the roles do not
  // allow end with PERMISSION_DENIED before any service sees them.
  virtual std::shared_ptr<grpc::ServerCredentials> ServerCredentials() const = 0;
  // A server whose certificate has another role is refused in the handshake; host names do not count.
  virtual std::shared_ptr<grpc::ChannelCredentials> ChannelCredentials(Role server) const = 0;
};

// Says how a server on `listen` (host:port) is reached; a warning where that is plaintext and not this
// machine alone. transport: null is plaintext.
void LogTransport(const Transport* transport, const std::string& listen);

}  // namespace headwater

#endif  // HW_BASE_RPC_TRANSPORT_H_
