#include "base/rpc/transport.h"

#include <atomic>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_certificate_verifier.h>
#include <grpcpp/security/tls_credentials_options.h>

#include "base/log.h"
#include "base/rpc/certificate_watch.h"
#include "base/rpc/roles.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

namespace tls = grpc::experimental;

// Seconds in which gRPC sees what CertificateWatch has taken.
constexpr unsigned kLookInMemory = 1;

// The peer's chain has been checked; what remains is whom it names.
class RoleVerifier final : public tls::ExternalCertificateVerifier {
 public:
  // watch: what the credentials read their files from, which so lives as long as they do.
  RoleVerifier(Role role, std::shared_ptr<const CertificateWatch> watch)
      : suffix_(absl::StrCat("/", NameOf(role))), watch_(std::move(watch)) {}

  bool Verify(tls::TlsCustomVerificationCheckRequest* request, std::function<void(grpc::Status)> /*callback*/,
              grpc::Status* status) override {
    const std::vector<grpc::string_ref> names = request->uri_names();
    const absl::string_view name =
        names.size() == 1 ? absl::string_view(names[0].data(), names[0].size()) : absl::string_view();
    *status = absl::StartsWith(name, "spiffe://") && absl::EndsWith(name, suffix_)
                  ? grpc::Status::OK
                  : grpc::Status(grpc::StatusCode::UNAUTHENTICATED,
                                 absl::StrCat("the server's certificate is not of role ", suffix_.substr(1)));
    return true;  // that was all
  }
  void Cancel(tls::TlsCustomVerificationCheckRequest* /*request*/) override {}

 private:
  const std::string suffix_;
  const std::shared_ptr<const CertificateWatch> watch_;
};

// Asks the roles for every call, on the thread that has it.
class Guard final : public grpc::AuthMetadataProcessor {
 public:
  // watch: as RoleVerifier's.
  Guard(std::unique_ptr<RolesFile> roles, std::shared_ptr<const CertificateWatch> watch)
      : roles_(std::move(roles)), watch_(std::move(watch)) {}

  bool IsBlocking() const override { return false; }

  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext* context,
                       OutputMetadata* /*consumed*/, OutputMetadata* /*response*/) override {
    const auto view = [](const grpc::string_ref& text) {
      return absl::string_view(text.data(), text.size());
    };
    const auto path = metadata.find(":path");
    const absl::string_view method = path == metadata.end() ? "" : view(path->second);
    const std::vector<grpc::string_ref> ids = context->FindPropertyValues(GRPC_PEER_SPIFFE_ID_PROPERTY_NAME);
    const absl::string_view id = ids.size() == 1 ? view(ids[0]) : "";
    if (roles_->Allows(id, method)) return grpc::Status::OK;
    Log(id, method);
    return grpc::Status(grpc::StatusCode::PERMISSION_DENIED, "this certificate's role may not call that");
  }

 private:
  // One a second: a peer may ask as often as it likes.
  void Log(absl::string_view id, absl::string_view method) {
    const int64_t now = absl::ToUnixSeconds(absl::Now());
    if (logged_.exchange(now) == now) return;
    HW_LOG(WARNING)
            .Field("peer", std::string(id.substr(0, 256)))
            .Field("method", std::string(method.substr(0, 128)))
        << "a call was refused: no rule of --roles allows it";
  }

  const std::unique_ptr<RolesFile> roles_;
  const std::shared_ptr<const CertificateWatch> watch_;
  std::atomic<int64_t> logged_{0};
};

class FileTransport final : public Transport {
 public:
  FileTransport(std::shared_ptr<const CertificateWatch> watch, std::unique_ptr<RolesFile> roles)
      : watch_(std::move(watch)),
        provider_(std::make_shared<tls::FileWatcherCertificateProvider>(
            watch_->identity_path(), watch_->identity_path(), watch_->ca_path(), kLookInMemory)),
        guard_(std::make_shared<Guard>(std::move(roles), watch_)) {}

  CertificateInfo identity() const override { return watch_->info(); }
  int64_t reload_failures() const override { return watch_->failures(); }

  std::shared_ptr<grpc::ServerCredentials> ServerCredentials() const override {
    tls::TlsServerCredentialsOptions options(provider_);
    options.watch_root_certs();
    options.watch_identity_key_cert_pairs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
    const std::shared_ptr<grpc::ServerCredentials> credentials = tls::TlsServerCredentials(options);
    credentials->SetAuthMetadataProcessor(guard_);
    return credentials;
  }

  std::shared_ptr<grpc::ChannelCredentials> ChannelCredentials(Role server) const override {
    tls::TlsChannelCredentialsOptions options;
    options.set_certificate_provider(provider_);
    options.watch_root_certs();
    options.watch_identity_key_cert_pairs();
    options.set_check_call_host(false);
    options.set_verify_server_certs(true);
    options.set_certificate_verifier(tls::ExternalCertificateVerifier::Create<RoleVerifier>(server, watch_));
    return tls::TlsCredentials(options);
  }

 private:
  const std::shared_ptr<const CertificateWatch> watch_;
  const std::shared_ptr<tls::CertificateProviderInterface> provider_;
  const std::shared_ptr<Guard> guard_;
};

}  // namespace

absl::string_view NameOf(Role role) {
  switch (role) {
    case Role::kClient:
      return "client";
    case Role::kAdmin:
      return "admin";
    case Role::kCoordinator:
      return "coordinator";
    case Role::kWorker:
      return "worker";
    case Role::kDecode:
      return "decode";
  }
  return "";
}

absl::StatusOr<std::shared_ptr<const Transport>> Transport::Create(const TransportOptions& options,
                                                                   std::optional<Role> own) {
  const bool any = !options.cert.empty() || !options.key.empty() || !options.ca.empty();
  for (const auto& [flag, file] : {std::pair<const char*, const std::string&>("tls_cert", options.cert),
                                   {"tls_key", options.key},
                                   {"tls_ca", options.ca}}) {
    if (any && file.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag, ": a file is required; --tls_cert, --tls_key and --tls_ca go together"));
    }
  }
  if (!any && !options.roles.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--roles=", options.roles, ": roles are of certificates; --tls_cert is required"));
  }
  if (!any) return std::shared_ptr<const Transport>();
  HW_ASSIGN_OR_RETURN(
      std::shared_ptr<const CertificateWatch> watch,
      CertificateWatch::Start({options.cert, options.key, options.ca},
                              std::string(own.has_value() ? NameOf(*own) : ""), options.refresh));
  HW_ASSIGN_OR_RETURN(std::unique_ptr<RolesFile> roles, RolesFile::Open(options.roles, options.refresh));
  return std::shared_ptr<const Transport>(
      std::make_shared<FileTransport>(std::move(watch), std::move(roles)));
}

void LogTransport(const Transport* transport, const std::string& listen) {
  if (transport != nullptr) {
    const CertificateInfo identity = transport->identity();
    HW_LOG(INFO)
            .Field("identity", identity.spiffe_id)
            .Field("serial", identity.serial)
            .Field("valid_until", absl::FormatTime(identity.not_after, absl::UTCTimeZone()))
        << "mutual TLS";
    return;
  }
  const absl::string_view host = absl::string_view(listen).substr(0, listen.rfind(':'));
  if (host == "localhost" || host == "[::1]" || absl::StartsWith(host, "127.")) return;
  HW_LOG(WARNING).Field("listen", listen)
      << "plaintext, and no roles: whoever reaches this address may do everything; see --tls_cert";
}

}  // namespace headwater
