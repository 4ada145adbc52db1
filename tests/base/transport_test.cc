// Mutual TLS between real servers and channels on loopback.
#include "base/rpc/transport.h"

#include <atomic>
#include <fstream>
#include <iterator>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>

#include "base/rpc/roles.h"
#include "base/rpc/server.h"
#include "base/rpc/transport_stats.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tests/support/certificates.h"

namespace headwater {
namespace {

using ::headwater::testing::CertificateAuthority;
using ::headwater::testing::IdentityFiles;
using ::headwater::testing::Issued;
using ::headwater::testing::SpiffeId;
using ::testing::HasSubstr;

std::shared_ptr<const Transport> Make(const TransportOptions& options) {
  absl::StatusOr<std::shared_ptr<const Transport>> made = Transport::Create(options);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *made : nullptr;
}

class Prefill final : public v1::PrefillService::Service {
 public:
  grpc::Status CancelPrefill(grpc::ServerContext*, const v1::CancelPrefillRequest*,
                             v1::CancelPrefillResponse*) override {
    ++calls;
    return grpc::Status::OK;
  }
  std::atomic<int> calls{0};
};

class Admin final : public v1::AdminService::Service {
 public:
  grpc::Status ListWorkers(grpc::ServerContext*, const v1::ListWorkersRequest*,
                           v1::ListWorkersResponse*) override {
    return grpc::Status::OK;
  }
};

class Kv final : public v1::KvTransferService::Service {
 public:
  grpc::Status AbortSession(grpc::ServerContext*, const v1::AbortSessionRequest*,
                            v1::AbortSessionResponse*) override {
    return grpc::Status::OK;
  }
};

template <typename Stub, typename Request, typename Response>
grpc::Status Call(Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*)) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  Response response;
  return (stub->*method)(&context, {}, &response);
}

class TransportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    server_transport_ = Make(server_files_.options());
    auto started = StartServer("127.0.0.1:0", {&prefill_, &admin_, &kv_}, server_transport_.get());
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
  }

  std::shared_ptr<grpc::Channel> Dial(const Transport* transport, Role server = Role::kCoordinator) {
    return DialPrivate(server_.address, transport, server);
  }
  grpc::Status CancelBy(const std::shared_ptr<grpc::Channel>& channel) {
    const auto stub = v1::PrefillService::NewStub(channel);
    return Call<v1::PrefillService::Stub, v1::CancelPrefillRequest, v1::CancelPrefillResponse>(
        stub.get(), &v1::PrefillService::Stub::CancelPrefill);
  }
  grpc::Status ListBy(const std::shared_ptr<grpc::Channel>& channel) {
    const auto stub = v1::AdminService::NewStub(channel);
    return Call<v1::AdminService::Stub, v1::ListWorkersRequest, v1::ListWorkersResponse>(
        stub.get(), &v1::AdminService::Stub::ListWorkers);
  }
  grpc::Status AbortBy(const std::shared_ptr<grpc::Channel>& channel) {
    const auto stub = v1::KvTransferService::NewStub(channel);
    return Call<v1::KvTransferService::Stub, v1::AbortSessionRequest, v1::AbortSessionResponse>(
        stub.get(), &v1::KvTransferService::Stub::AbortSession);
  }

  CertificateAuthority authority_{"ours"};
  IdentityFiles server_files_{authority_, "coordinator"};
  std::shared_ptr<const Transport> server_transport_;
  Prefill prefill_;
  Admin admin_;
  Kv kv_;
  RunningServer server_;
};

TEST_F(TransportTest, RolesMayCallWhatIsTheirs) {
  struct {
    const char* role;
    grpc::StatusCode cancel, list, abort;
  } const cases[] = {
      {"client", grpc::OK, grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED},
      {"admin", grpc::OK, grpc::OK, grpc::PERMISSION_DENIED},
      {"worker", grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED},
      {"decode", grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED},
      {"coordinator", grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED, grpc::OK},
      {"nobody", grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED, grpc::PERMISSION_DENIED},
  };
  int allowed = 0;
  for (const auto& c : cases) {
    SCOPED_TRACE(c.role);
    const IdentityFiles files(authority_, c.role);
    const auto transport = Make(files.options());
    const auto channel = Dial(transport.get());
    EXPECT_EQ(CancelBy(channel).error_code(), c.cancel);
    EXPECT_EQ(ListBy(channel).error_code(), c.list);
    EXPECT_EQ(AbortBy(channel).error_code(), c.abort);
    allowed += c.cancel == grpc::OK;
  }
  EXPECT_EQ(prefill_.calls, allowed) << "a refused call came to the service";
}

TEST_F(TransportTest, WhoeverHasNoCertificateOfOursIsRefused) {
  const CertificateAuthority other("theirs");
  const IdentityFiles foreign(other, "client");
  TransportOptions trusting = foreign.options();  // believes our server, but is not believed
  trusting.ca = server_files_.directory() + "/now/ca.crt";
  for (const TransportOptions& options : {foreign.options(), trusting}) {
    const auto transport = Make(options);
    EXPECT_EQ(CancelBy(Dial(transport.get())).error_code(), grpc::UNAVAILABLE);
  }
  EXPECT_EQ(CancelBy(Dial(nullptr)).error_code(), grpc::UNAVAILABLE) << "plaintext";
  IdentityFiles late(authority_, "client");
  const absl::Time end = absl::Now() + absl::Seconds(2);
  late.Rewrite(authority_.Issue({SpiffeId("client")}, end - absl::Hours(1), end), authority_.pem());
  const auto transport = Make(late.options());
  absl::SleepFor(end + absl::Seconds(1) - absl::Now());
  EXPECT_EQ(CancelBy(Dial(transport.get())).error_code(), grpc::UNAVAILABLE) << "expired";
  EXPECT_EQ(prefill_.calls, 0);
}

TEST_F(TransportTest, AServerOfAnotherRoleIsNotSpokenTo) {
  const IdentityFiles files(authority_, "client");
  const auto transport = Make(files.options());
  EXPECT_EQ(CancelBy(Dial(transport.get(), Role::kDecode)).error_code(), grpc::UNAVAILABLE);
  EXPECT_EQ(CancelBy(Dial(transport.get(), Role::kCoordinator)).error_code(), grpc::OK);
  EXPECT_EQ(prefill_.calls, 1);
}

// Every certificate and the authority itself are replaced under load.
TEST_F(TransportTest, RotationFailsNoCall) {
  IdentityFiles files(authority_, "client");
  const auto transport = Make(files.options());
  const CertificateAuthority next("next");
  const std::string both = authority_.pem() + next.pem();
  std::atomic<bool> stop{false};
  std::atomic<int> calls{0}, failed{0};
  std::thread load([&] {
    while (!stop) {
      // A handshake each.
      if (!CancelBy(Dial(transport.get())).ok()) ++failed;
      ++calls;
    }
  });
  const absl::Duration read = absl::Seconds(3.5);
  const auto ours = [&](const char* role) { return authority_.Issue({SpiffeId(role)}); };
  const auto theirs = [&](const char* role) { return next.Issue({SpiffeId(role)}); };
  server_files_.Rewrite(ours("coordinator"), both);
  files.Rewrite(ours("client"), both);
  absl::SleepFor(read);
  server_files_.Rewrite(theirs("coordinator"), both);
  files.Rewrite(theirs("client"), both);
  absl::SleepFor(read);
  server_files_.Rewrite(theirs("coordinator"), next.pem());
  files.Rewrite(theirs("client"), next.pem());
  absl::SleepFor(read);
  stop = true;
  load.join();
  EXPECT_GT(calls, 100);
  EXPECT_EQ(failed, 0) << "of " << calls;
  const IdentityFiles old(authority_, "client");
  TransportOptions options = old.options();
  options.ca = files.directory() + "/now/ca.crt";
  EXPECT_EQ(CancelBy(Dial(Make(options).get())).error_code(), grpc::UNAVAILABLE)
      << "the old authority is believed still";
}

TEST_F(TransportTest, NewConnectionsGoOnWhileTheFilesCannotBeUsed) {
  const IdentityFiles files(authority_, "client");
  const auto transport = Make(files.options());
  const Issued right = authority_.Issue({SpiffeId("coordinator")});
  server_files_.Rewrite({right.cert, authority_.Issue({SpiffeId("coordinator")}).key}, authority_.pem());
  absl::SleepFor(absl::Seconds(3.5));
  EXPECT_GE(server_transport_->reload_failures(), 1) << "the key is another certificate's";
  EXPECT_EQ(CancelBy(Dial(transport.get())).error_code(), grpc::OK);
  server_files_.Rewrite(right, "no PEM");
  absl::SleepFor(absl::Seconds(3.5));
  EXPECT_EQ(CancelBy(Dial(transport.get())).error_code(), grpc::OK) << "authorities that are none";
  EXPECT_EQ(prefill_.calls, 2);
}

TEST_F(TransportTest, MetricsTellTheCertificateInUse) {
  TransportStats stats(server_transport_);
  const auto families = stats.Collect();
  ASSERT_EQ(families.size(), 4u);
  EXPECT_EQ(families[0].name, "headwater_connections_refused_total");
  EXPECT_EQ(families[1].name, "headwater_connections_cut_total");
  EXPECT_EQ(families[2].name, "headwater_tls_certificate_expiry_seconds");
  EXPECT_EQ(families[2].metric[0].gauge.value,
            static_cast<double>(absl::ToUnixSeconds(server_transport_->identity().not_after)));
  EXPECT_NEAR(families[2].metric[0].gauge.value, static_cast<double>(absl::ToUnixSeconds(absl::Now())) + 3600,
              60);
  EXPECT_EQ(families[3].name, "headwater_tls_reload_failures_total");
  EXPECT_EQ(families[3].metric[0].counter.value, 0);
  EXPECT_EQ(TransportStats(nullptr).Collect().size(), 2u) << "plaintext has no certificate";
}

TEST_F(TransportTest, RolesOfAFileAreReadAgain) {
  const std::string path = server_files_.directory() + "/roles.txtpb";
  const auto write = [&](const std::string& text) { std::ofstream(path) << text; };
  write(DefaultRoles());
  TransportOptions options = server_files_.options();
  options.roles = path;
  const auto guarded = Make(options);
  auto started = StartServer("127.0.0.1:0", {&admin_}, guarded.get());
  ASSERT_TRUE(started.ok()) << started.status();
  const IdentityFiles files(authority_, "auditor");
  const auto transport = Make(files.options());
  const auto channel = DialPrivate(started->address, transport.get(), Role::kCoordinator);
  EXPECT_EQ(ListBy(channel).error_code(), grpc::PERMISSION_DENIED);
  write("rules { principals: 7 }");
  absl::SleepFor(absl::Seconds(1.1));
  EXPECT_EQ(ListBy(channel).error_code(), grpc::PERMISSION_DENIED) << "a wrong file opens nothing";
  write(DefaultRoles() + R"(rules { principals: "*/auditor" methods: "/headwater.v1.AdminService/List*" })");
  absl::SleepFor(absl::Seconds(1.1));
  EXPECT_EQ(ListBy(channel).error_code(), grpc::OK);
}

TEST(RolesTest, PatternsStandForWhatTheySay) {
  const auto roles = Roles::Parse(
      R"(rules { principals: "spiffe://a/x" principals: "*/worker" methods: "/s.S/*" methods: "/t.T/M" })");
  ASSERT_TRUE(roles.ok()) << roles.status();
  EXPECT_TRUE(roles->Allows("spiffe://a/x", "/s.S/Anything"));
  EXPECT_TRUE(roles->Allows("spiffe://b/worker", "/t.T/M"));
  EXPECT_FALSE(roles->Allows("spiffe://a/xy", "/t.T/M"));
  EXPECT_FALSE(roles->Allows("spiffe://b/worker", "/t.T/MM"));
  EXPECT_FALSE(roles->Allows("spiffe://b/worker/x", "/t.T/M"));
  EXPECT_FALSE(roles->Allows("", "/t.T/M"));
  EXPECT_FALSE(roles->Allows("spiffe://b/worker", ""));
  EXPECT_TRUE(Roles::Parse(DefaultRoles()).ok());
}

TEST(RolesTest, TheFileToStartFromIsWhatHoldsWithoutOne) {
  std::ifstream file(HW_SOURCE_DIRECTORY "/deploy/roles.txtpb");
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  EXPECT_EQ(text, DefaultRoles());
}

TEST(RolesTest, WhatIsWrongIsNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "it has no rules"},
      {"rules { name: \"a\" }", "rule \"a\": principals: at least one is wanted"},
      {"rules { name: \"a\" principals: \"x\" }", "rule \"a\": methods: at least one is wanted"},
      {"rules { principals: \"\" methods: \"x\" }", "an empty one"},
      {"rules { principals: \"a*b\" methods: \"x\" }",
       "\"a*b\": one '*' at the beginning or the end at most"},
      {"rules { principals: \"*a*\" methods: \"x\" }", "one '*' at the beginning"},
      {"rules {\n  principal: \"x\" }", "line 2, column"},
      {"rules { principals: 7 }", "line 1, column"},
  };
  for (const auto& [text, wanted] : cases) {
    const auto roles = Roles::Parse(text);
    EXPECT_EQ(roles.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(roles.status().message()), HasSubstr(wanted)) << text;
  }
}

TEST(TransportFilesTest, WhatIsWrongIsNamed) {
  const CertificateAuthority authority("ours");
  IdentityFiles files(authority, "worker"), others(authority, "worker");
  const auto message = [](const TransportOptions& options) {
    const auto made = Transport::Create(options);
    EXPECT_EQ(made.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(made.status().message());
  };
  ASSERT_TRUE(Transport::Create({}).ok());
  EXPECT_EQ(*Transport::Create({}), nullptr);
  EXPECT_EQ(Make(files.options())->identity().spiffe_id, SpiffeId("worker"));

  EXPECT_TRUE(Transport::Create(files.options(), Role::kWorker).ok());
  const auto other_role = Transport::Create(files.options(), Role::kDecode);
  EXPECT_EQ(other_role.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(other_role.status().message()), HasSubstr("they want .../decode"));

  TransportOptions options = files.options();
  options.key = "";
  EXPECT_THAT(message(options), HasSubstr("--tls_key: a file is required"));
  options.key = "/nonexistent";
  EXPECT_THAT(message(options), HasSubstr("--tls_key=/nonexistent: it cannot be read"));
  options.key = others.options().key;
  EXPECT_THAT(message(options), HasSubstr("it is not the key of --tls_cert"));
  options = files.options();
  options.cert = options.key;
  EXPECT_THAT(message(options), HasSubstr("it has no certificate in PEM"));
  options = files.options();
  options.roles = "/nonexistent";
  EXPECT_THAT(message(options), HasSubstr("--roles=/nonexistent"));
  options.cert = options.key = options.ca = "";
  EXPECT_THAT(message(options), HasSubstr("--tls_cert is required"));
  for (const std::vector<std::string>& uris :
       {std::vector<std::string>{}, {"https://x/worker"}, {SpiffeId("worker"), SpiffeId("admin")}}) {
    files.Rewrite(authority.Issue(uris), authority.pem());
    EXPECT_THAT(message(files.options()), HasSubstr("it has not exactly one URI name"));
  }
  files.Rewrite(
      authority.Issue({SpiffeId("worker")}, absl::Now() - absl::Hours(3), absl::Now() - absl::Hours(2)),
      authority.pem());
  EXPECT_THAT(message(files.options()), HasSubstr("it is valid from"));
}

}  // namespace
}  // namespace headwater
