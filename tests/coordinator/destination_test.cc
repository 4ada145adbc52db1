// What callers try in order to have the service connect where they like. A request names a registered decode
// node or a pool: whatever else stands there is refused, and nobody is dialled.
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/rpc/grpc_status.h"
#include "coordinator/address.h"
#include "coordinator/coordinator_server.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tests/coordinator/fakes.h"
#include "tests/coordinator/loopback.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

// Listens and takes nothing: a connection stays where it can be seen.
class Listener {
 public:
  // On a free port of every address of this machine, of IPv4 and IPv6.
  Listener() {
    fd_ = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int no = 0;
    setsockopt(fd_, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no));
    sockaddr_in6 address = {};
    address.sin6_family = AF_INET6;
    Open(reinterpret_cast<sockaddr*>(&address), sizeof(address));
    socklen_t size = sizeof(address);
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin6_port);
  }
  explicit Listener(const std::string& path) {
    fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof(address.sun_path) - 1);
    Open(reinterpret_cast<sockaddr*>(&address), sizeof(address));
  }
  ~Listener() { close(fd_); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int port() const { return port_; }
  bool connected(int wait_ms = 0) const {
    pollfd waiting = {fd_, POLLIN, 0};
    return poll(&waiting, 1, wait_ms) > 0;
  }

 private:
  void Open(const sockaddr* address, socklen_t size) {
    EXPECT_EQ(bind(fd_, address, size), 0);
    EXPECT_EQ(listen(fd_, 64), 0);
  }
  int fd_ = -1;
  int port_ = 0;
};

// Whether this process has a connection, or has tried for one, to 169.254.0.0/16.
bool DialsLinkLocal() {
  for (const char* table : {"/proc/self/net/tcp", "/proc/self/net/tcp6"}) {
    std::ifstream file(table);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (absl::StrContains(text, "FEA9:")) return true;  // 169.254, as the last of an address's bytes
  }
  return false;
}

class DestinationTest : public ::testing::Test {
 protected:
  void SetUp() override {
    CoordinatorOptions options;
    options.worker_wait = absl::ZeroDuration();
    options.decode_ranges = ParseAddressRanges("127.0.0.1/32").value();
    auto server = CoordinatorServer::Start(options, {"127.0.0.1:0", "", "", nullptr});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = v1::PrefillService::NewStub(DialPlaintext(server_->address()));
    decode_ = std::make_unique<ScriptedDecodeNode>(server_->address(), "d0");
    ASSERT_TRUE(decode_->WaitUntilRegistered());
    worker_ = std::make_unique<ScriptedWorker>(server_->address(), "w0", ScriptedWorker::CompleteAtOnce);
    ASSERT_TRUE(worker_->WaitUntilRegistered());
  }
  void TearDown() override {
    EXPECT_FALSE(tcp_.connected(200)) << "somebody dialled what a request named";
    EXPECT_FALSE(unix_.connected());
    EXPECT_FALSE(DialsLinkLocal());
    unlink(path_.c_str());
  }

  // With the listener's port and path filled in.
  std::string Fill(const std::string& text) const {
    return absl::StrReplaceAll(text, {{"PORT", absl::StrCat(tcp_.port())}, {"PATH", path_}});
  }
  absl::Status Prefill(const v1::PrefillRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    const auto reader = stub_->Prefill(&context, request);
    v1::PrefillResponse event, last;
    while (reader->Read(&event)) last = event;
    const absl::Status status = FromGrpcStatus(reader->Finish());
    return status.ok() && last.has_failed() ? FromRpcStatus(last.failed().error()) : status;
  }
  // The request ends so, in words that fit a log line, and left nothing anywhere.
  void ExpectRefused(const v1::PrefillRequest& request, absl::StatusCode code, v1::ErrorReason reason) {
    const absl::Status status = Prefill(request);
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(ReasonName(ReasonOf(status)), ReasonName(reason)) << status;
    EXPECT_LT(status.message().size(), 512u);
    for (const char c : status.message()) EXPECT_GE(static_cast<unsigned char>(c), 0x20) << status;
    EXPECT_FALSE(tcp_.connected()) << status;
    EXPECT_FALSE(unix_.connected()) << status;
    EXPECT_EQ(decode_->num_open() + decode_->num_committed(), 0u);
  }

  const std::string path_ = absl::StrCat(::testing::TempDir(), "hwd", getpid(), ".sock");
  const Listener tcp_, unix_{path_};
  std::unique_ptr<CoordinatorServer> server_;
  std::unique_ptr<v1::PrefillService::Stub> stub_;
  std::unique_ptr<ScriptedDecodeNode> decode_;
  std::unique_ptr<ScriptedWorker> worker_;
};

// PORT is that of a listener on every address of this machine, PATH that of its socket.
std::vector<std::string> NotIds() {
  return {
      "",
      " ",
      "127.0.0.1:PORT",
      "127.1:PORT",
      "127.0.0.1",
      "2130706433:PORT",
      "0x7f000001:PORT",
      "0177.0.0.1:PORT",
      "0.0.0.0:PORT",
      "0:PORT",
      "localhost:PORT",
      "LOCALHOST:PORT",
      "localhost.:PORT",
      "localhost",
      "[::1]:PORT",
      "::1:PORT",
      "[::]:PORT",
      "[::ffff:127.0.0.1]:PORT",
      "[0:0:0:0:0:0:0:1]:PORT",
      "169.254.169.254",
      "169.254.169.254:80",
      "[::ffff:169.254.169.254]:80",
      "[fe80::1%25lo]:PORT",
      "metadata.google.internal:80",
      "evil.example:PORT",
      "http://127.0.0.1:PORT/",
      "https://user:password@127.0.0.1:PORT/latest/meta-data",
      "grpc://127.0.0.1:PORT",
      "dns:localhost:PORT",
      "dns:///localhost:PORT",
      "dns://127.0.0.1:PORT/d0",
      "ipv4:127.0.0.1:PORT",
      "ipv6:[::1]:PORT",
      "xds:///d0",
      "file:///etc/passwd",
      "unix:PATH",
      "unix://PATH",
      "PATH",
      "unix-abstract:d0",
      "../d0",
      "d0/../../d0",
      "d0%00",
      "d0%0d%0aHost: x",
      std::string("d0\0"
                  "127.0.0.1:PORT",
                  17),
      "d0\n127.0.0.1:PORT",
      "d0\r\nX-Decode: 127.0.0.1:PORT",
      "d0@127.0.0.1:PORT",
      "d0,127.0.0.1:PORT",
      "d0;127.0.0.1:PORT",
      "d0 ",
      " d0",
      "D0",
      "d",
      "d00",
      "d*",
      "*",
      "w0",
      "$(nc 127.0.0.1 PORT)",
      "\u202ed0",
      std::string(1 << 20, 'd'),
  };
}

TEST_F(DestinationTest, WhatIsNoRegisteredNodeIsNoDestination) {
  const std::vector<std::string> names = NotIds();
  ASSERT_GE(names.size(), 40u);
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string name = Fill(names[i]);
    SCOPED_TRACE(absl::StrCat(i, ": ", name.substr(0, 100)));
    v1::PrefillRequest request = MakeRequest(absl::StrCat("node-", i), 3);
    request.set_decode_node(name);
    ExpectRefused(request, absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_DECODE_NODE);
  }
}

// The empty pool is the default one; a pool that nobody has may come to have a node, so its refusal is for
// now.
TEST_F(DestinationTest, WhatIsNoPoolIsNoDestination) {
  const std::vector<std::string> names = NotIds();
  for (size_t i = 1; i < names.size(); ++i) {
    const std::string name = Fill(names[i]);
    SCOPED_TRACE(absl::StrCat(i, ": ", name.substr(0, 100)));
    v1::PrefillRequest request = MakeRequest(absl::StrCat("pool-", i), 3);
    request.set_decode_pool(name);
    ExpectRefused(request, absl::StatusCode::kUnavailable, v1::ERROR_REASON_NO_DECODE_NODE);
  }
}

// Both in one message: the later field holds, as in every oneof, and is judged as if it were alone.
TEST_F(DestinationTest, OfANodeAndAPoolTheLaterHolds) {
  v1::PrefillRequest node = MakeRequest("both", 3), pool;
  node.set_decode_node("d0");
  pool.set_decode_pool(Fill("127.0.0.1:PORT"));
  v1::PrefillRequest both;
  ASSERT_TRUE(both.ParseFromString(node.SerializeAsString() + pool.SerializeAsString()));
  ExpectRefused(both, absl::StatusCode::kUnavailable, v1::ERROR_REASON_NO_DECODE_NODE);
  pool = MakeRequest("both", 3);
  pool.set_decode_pool("default");
  node.Clear();
  node.set_decode_node(Fill("127.0.0.1:PORT"));
  ASSERT_TRUE(both.ParseFromString(pool.SerializeAsString() + node.SerializeAsString()));
  ExpectRefused(both, absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_DECODE_NODE);
}

TEST_F(DestinationTest, AnAddressInAnotherFieldIsNoDestinationEither) {
  using Set = void (*)(v1::PrefillRequest*, const std::string&);
  const struct {
    Set set;
    v1::ErrorReason reason;
  } cases[] = {
      {[](auto* r, const std::string& v) { r->set_request_id(v); }, v1::ERROR_REASON_BAD_REQUEST_ID},
      {[](auto* r, const std::string& v) { r->set_request_id("___decode_addr_" + v); },
       v1::ERROR_REASON_BAD_REQUEST_ID},
      {[](auto* r, const std::string& v) { r->set_tenant(v); }, v1::ERROR_REASON_BAD_FIELD},
      {[](auto* r, const std::string& v) { r->mutable_policy()->set_name(v); },
       v1::ERROR_REASON_UNKNOWN_POLICY},
      {[](auto* r, const std::string& v) { (*r->mutable_policy()->mutable_parameters())[v] = 1; },
       v1::ERROR_REASON_BAD_POLICY_PARAMETER},
  };
  for (const auto& c : cases) {
    v1::PrefillRequest request = MakeRequest("elsewhere", 3);
    c.set(&request, Fill("127.0.0.1:PORT"));
    ExpectRefused(request, absl::StatusCode::kInvalidArgument, c.reason);
  }
  v1::PrefillRequest model = MakeRequest("elsewhere", 3);
  model.set_model(Fill("http://127.0.0.1:PORT/model"));
  ExpectRefused(model, absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_MODEL);
}

TEST_F(DestinationTest, ANodeThatNamesAnotherPlaceIsNotRegistered) {
  const auto registry = v1::DecodeRegistryService::NewStub(DialPlaintext(server_->address()));
  for (const char* text :
       {"localhost:PORT", "127.0.0.2:PORT", "127.1:PORT", "[::1]:PORT", "[::]:PORT", "0.0.0.0:PORT",
        "10.0.0.1:PORT", "169.254.169.254:80", "[::ffff:169.254.169.254]:80", "ipv4:127.0.0.1:PORT",
        "dns:localhost:PORT", "unix:PATH:1", "d0.example:PORT"}) {
    SCOPED_TRACE(text);
    for (const bool kv : {false, true}) {
      v1::RegisterRequest request;
      v1::DecodeRegistration& registration = *request.mutable_registration() = MakeDecodeNode("evil");
      registration.set_kv_address(kv ? Fill(text) : "127.0.0.1:7080");
      registration.set_decode_address(kv ? "127.0.0.1:7080" : Fill(text));
      grpc::ClientContext context;
      const auto stream = registry->Register(&context);
      stream->Write(request);
      v1::RegisterResponse response;
      EXPECT_FALSE(stream->Read(&response));
      const absl::Status status = FromGrpcStatus(stream->Finish());
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
      EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_BAD_FIELD) << status;
    }
    v1::PrefillRequest prefill = MakeRequest("to-evil", 3);
    prefill.set_decode_node("evil");
    ExpectRefused(prefill, absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_DECODE_NODE);
  }
}

// What the others rely on: the node and its pool are found, and a listener sees who connects.
TEST_F(DestinationTest, ARegisteredNodeAndItsPoolAreDestinations) {
  v1::PrefillRequest request = MakeRequest("by-node", 3);
  request.set_decode_node("d0");
  EXPECT_TRUE(Prefill(request).ok());
  request = MakeRequest("by-pool", 3);
  request.set_decode_pool("default");
  EXPECT_TRUE(Prefill(request).ok());
  request = MakeRequest("by-empty-pool", 3);
  request.set_decode_pool("");
  EXPECT_TRUE(Prefill(request).ok());
  EXPECT_EQ(decode_->num_committed(), 3u);

  const Listener seen;
  const auto channel = DialPlaintext(absl::StrCat("127.0.0.1:", seen.port()));
  channel->GetState(true);
  EXPECT_TRUE(seen.connected(10'000));
}

}  // namespace
}  // namespace headwater::testing
