// Clients that open streams and reset them at once, by the hundred thousand (HW_ABUSE_FULL=1; else a
// twentieth): they are cut (base/rpc/reset_limit.h), and nobody else notices.
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <arpa/inet.h>
#include <grpcpp/client_context.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/integration/abuse.h"
#include "tests/integration/raw_http2.h"

namespace headwater::testing {
namespace {

constexpr char kCut[] = "headwater_connections_cut_total";

int Streams() { return Full() ? 100'000 : 5'000; }

// Opens and resets `count` streams. False: the connection was cut before all were sent.
template <typename Connection>
bool OpenAndReset(Connection* connection, const char* path, int count) {
  if (!connection->Send(Preface())) return false;
  const std::string headers = CallHeaders(path);
  for (int i = 0; i < count; ++i) {
    const auto stream = static_cast<uint32_t>(2 * i + 1);
    if (!connection->Send(Encode({FrameType::kHeaders, kEndHeaders, stream, headers}) +
                          Encode({FrameType::kReset, 0, stream, std::string("\0\0\0\x08", 4)}))) {
      return false;
    }
    if (i % 64 == 0) connection->Receive(absl::ZeroDuration());
  }
  return true;
}

// A raw connection with a certificate.
class PrivateConnection {
 public:
  PrivateConnection(int port, const TransportOptions& identity) : context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX_use_certificate_chain_file(context_, identity.cert.c_str());
    SSL_CTX_use_PrivateKey_file(context_, identity.key.c_str(), SSL_FILETYPE_PEM);
    const unsigned char protocols[] = {2, 'h', '2'};
    SSL_CTX_set_alpn_protos(context_, protocols, sizeof(protocols));
    ssl_ = SSL_new(context_);
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const timeval limit = {5, 0};
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(static_cast<uint16_t>(port));
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0 &&
                 SSL_set_fd(ssl_, fd_) == 1 && SSL_connect(ssl_) == 1;
  }
  PrivateConnection(const PrivateConnection&) = delete;
  ~PrivateConnection() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
    close(fd_);
  }

  bool connected() const { return connected_; }
  bool Send(const std::string& bytes) {
    return SSL_write(ssl_, bytes.data(), static_cast<int>(bytes.size())) == static_cast<int>(bytes.size());
  }
  // What came is left where it is: it fits into the buffers.
  void Receive(absl::Duration) {}
  // Whether the peer closes it within 5 s.
  bool IsClosed() {
    const timeval limit = {5, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    char sink[4096];
    int got = 1;
    while (got > 0) got = SSL_read(ssl_, sink, sizeof(sink));
    return SSL_get_error(ssl_, got) != SSL_ERROR_WANT_READ;
  }

 private:
  SSL_CTX* context_;
  SSL* ssl_;
  int fd_;
  bool connected_ = false;
};

class ResetTest : public AbuseTest {
 protected:
  double NumCut() { return ReadMetric(cluster_->coordinator_metrics_port(), kCut); }

  // The probes go on meanwhile, and a while longer.
  void ExpectNobodyNoticed(const char* what) {
    const absl::Time begin = absl::Now();
    ExpectFullServiceToNewcomers();
    std::printf("%s: served again after %s, %.0f connections cut\n", what,
                absl::FormatDuration(absl::Now() - begin).c_str(), NumCut());
    absl::SleepFor(absl::Milliseconds(300));
    ExpectHealthy(what);
  }
};

TEST_F(ResetTest, AFloodOnFewConnections) {
  Start();
  int sent = 0, all_sent = 0;
  for (; sent < Streams(); sent += 2'500) {
    RawConnection connection(port_);
    ASSERT_TRUE(connection.connected());
    all_sent += OpenAndReset(&connection, kPrefill, 2'500) ? 1 : 0;
  }
  ExpectNobodyNoticed("resets on few connections");
  EXPECT_GE(NumCut(), Full() ? 30 : 1) << all_sent << " connections took all";
}

// None of which sends so many that it would be cut for them alone.
TEST_F(ResetTest, AFloodOnManyConnections) {
  Start();
  for (int sent = 0; sent < Streams(); sent += 100) {
    RawConnection connection(port_);
    ASSERT_TRUE(connection.connected());
    OpenAndReset(&connection, kPrefill, 100);
  }
  ExpectNobodyNoticed("resets on many connections");
  EXPECT_GE(NumCut(), Full() ? 100 : 0);
}

TEST_F(ResetTest, AFloodWithACertificate) {
  signal(SIGPIPE, SIG_IGN);  // OpenSSL writes to what was cut
  StartPrivate();
  for (int sent = 0; sent < Streams(); sent += 2'500) {
    PrivateConnection connection(port_, admin_.options());
    ASSERT_TRUE(connection.connected());
    OpenAndReset(&connection, "/headwater.v1.AdminService/ListWorkers", 2'500);
    EXPECT_TRUE(sent > 0 || connection.IsClosed());
  }
  ExpectNobodyNoticed("resets with a certificate");
  EXPECT_GE(NumCut(), Full() ? 30 : 1);
}

TEST_F(ResetTest, AClientThatCancelsAllItsCallsIsNotCut) {
  Start();
  const auto stub =
      v1::PrefillService::NewStub(DialPrivate(cluster_->coordinator_address(), nullptr, Role::kCoordinator));
  for (int round = 0; round < 7; ++round) {
    std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
    std::vector<std::unique_ptr<grpc::ClientReader<v1::PrefillResponse>>> calls;
    for (int i = 0; i < 128; ++i) {
      contexts.push_back(std::make_unique<grpc::ClientContext>());
      calls.push_back(stub->Prefill(contexts.back().get(), MakeRequest(RandomTokens(3, 200, kVocab))));
    }
    for (const auto& context : contexts) context->TryCancel();
    for (const auto& call : calls) EXPECT_EQ(call->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ExpectNobodyNoticed("cancelled calls");
  EXPECT_EQ(NumCut(), 0);
}

}  // namespace
}  // namespace headwater::testing
