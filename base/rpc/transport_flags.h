// The flags of a transport, the same in every program.
#ifndef HW_BASE_RPC_TRANSPORT_FLAGS_H_
#define HW_BASE_RPC_TRANSPORT_FLAGS_H_

#include "base/flags.h"
#include "base/rpc/transport.h"

namespace headwater {

// --tls_cert, --tls_key, --tls_ca, --tls_refresh.
inline void DeclareTransport(TransportOptions* options, FlagSet* flags) {
  flags->String("tls_cert", &options->cert,
                "PEM file of this program's certificate and what leads to --tls_ca; its one URI name, "
                "spiffe://.../ROLE, says who this is; empty: plaintext");
  flags->String("tls_key", &options->key, "PEM file of that certificate's key");
  flags->String("tls_ca", &options->ca, "PEM file of the authorities that peers' certificates come from");
  flags->Duration("tls_refresh", &options->refresh, absl::Seconds(1), absl::Hours(24),
                  "how often these files and --roles are looked at for changes");
}

// Of servers: --roles, too.
inline void DeclareServerTransport(TransportOptions* options, FlagSet* flags) {
  DeclareTransport(options, flags);
  flags->String("roles", &options->roles,
                "file of who may call what (deploy/roles.txtpb); empty: what that file says");
}

inline void DeclareHealth(std::string* address, FlagSet* flags) {
  flags->String("health", address,
                "ADDRESS:PORT to answer probes on, by HTTP in plaintext: /livez and /readyz; empty: none");
}

}  // namespace headwater

#endif  // HW_BASE_RPC_TRANSPORT_FLAGS_H_
