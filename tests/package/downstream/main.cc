// Receives a KV cache as a decode engine does, with nothing but what is installed:
//   receive_session DIRECTORY
// serves a store in DIRECTORY on loopback, plays coordinator and worker to it over gRPC, and compares what
// the store holds after the commit with what was sent. Prints "received N bytes in M blocks"; exit status 1
// where anything differs.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "base/metrics.h"
#include "base/rpc/server.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/store.h"

namespace {

namespace v1 = headwater::v1;
using headwater::BlockName;
using headwater::DialPrivate;
using headwater::KvBlockId;
using headwater::KvDigest;
using headwater::KvGeometry;
using headwater::KvKind;
using headwater::KvSender;
using headwater::KvSenderOptions;
using headwater::KvStore;
using headwater::KvStoreOptions;
using headwater::MakeKvReceiver;
using headwater::Metrics;
using headwater::RandomId;
using headwater::Role;
using headwater::StartServer;

constexpr char kSession[] = "session-1";

v1::KvLayout Layout() {
  v1::KvLayout layout;
  layout.set_num_layers(3);
  layout.set_num_kv_heads(2);
  layout.set_head_dim(64);
  layout.set_num_tokens(1000);  // the last block of a tensor is a short one
  layout.set_block_tokens(64);
  layout.set_dtype(v1::KV_DTYPE_BF16);
  return layout;
}

// Bytes in which no two blocks are alike.
std::string Cache(const KvGeometry& geometry) {
  std::string bytes(geometry.total_bytes(), '\0');
  uint32_t state = 1;
  for (char& byte : bytes) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<char>(state >> 24);
  }
  return bytes;
}

bool Report(const char* what, const std::string& error) {
  std::cerr << what << ": " << error << "\n";
  return false;
}

// The coordinator's part before the workers'.
bool Open(v1::KvTransferService::Stub* stub, const std::string& token) {
  v1::OpenSessionRequest request;
  request.set_session_id(kSession);
  request.set_request_id("request-1");
  request.set_session_token(token);
  request.set_epoch(1);
  *request.mutable_layout() = Layout();
  v1::OpenSessionResponse response;
  grpc::ClientContext context;
  const grpc::Status status = stub->OpenSession(&context, request, &response);
  return status.ok() || Report("OpenSession", status.error_message());
}

// The worker's part.
bool Send(const std::string& address, const std::string& token, const KvGeometry& geometry,
          const std::string& cache, KvDigest* digest) {
  KvSenderOptions options;
  options.address = address;
  options.session_id = kSession;
  options.session_token = token;
  options.epoch = 1;
  const auto sender = KvSender::Create(options, geometry);
  for (uint64_t i = 0; i < geometry.num_blocks(); ++i) {
    const KvBlockId block = geometry.BlockAt(i);
    const absl::Status status = sender->Submit(block, cache.data() + geometry.OffsetOf(block), [] {});
    if (!status.ok()) return Report("Submit", status.ToString());
  }
  const absl::Status status = sender->Finish();
  if (!status.ok()) return Report("Finish", status.ToString());
  *digest = sender->Stats().digest;
  return true;
}

// The coordinator's part after the workers'.
bool Commit(v1::KvTransferService::Stub* stub, const std::string& token, const KvDigest& digest) {
  v1::CommitSessionRequest request;
  request.set_session_id(kSession);
  request.set_session_token(token);
  request.set_epoch(1);
  request.set_kv_digest(digest.Bytes());
  request.set_first_token(7);
  for (uint32_t i = 0; i < Layout().num_tokens(); ++i) request.add_token_ids(i);
  v1::CommitSessionResponse response;
  grpc::ClientContext context;
  const grpc::Status status = stub->CommitSession(&context, request, &response);
  return status.ok() || Report("CommitSession", status.error_message());
}

bool Holds(KvStore* store, const KvGeometry& geometry, const std::string& cache) {
  const auto kv = store->Acquire(kSession);
  if (!kv.ok()) return Report("Acquire", kv.status().ToString());
  for (uint32_t layer = 0; layer < geometry.layout().num_layers(); ++layer) {
    for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
      const char* sent = cache.data() + geometry.OffsetOf({layer, kind, 0, geometry.layout().block_tokens()});
      if (std::memcmp((*kv)->Tensor(layer, kind), sent, geometry.tensor_bytes()) != 0) {
        return Report("the cache differs", BlockName({layer, kind, 0, geometry.layout().num_tokens()}));
      }
    }
  }
  return (*kv)->first_token() == 7 || Report("the first token differs", std::to_string((*kv)->first_token()));
}

bool Run(const std::string& directory) {
  KvStoreOptions options;
  options.directory = directory;
  options.budget_bytes = 64 << 20;
  const auto store = KvStore::Open(options);
  if (!store.ok()) return Report("Open", store.status().ToString());
  Metrics metrics("downstream");
  const auto service = MakeKvReceiver(store->get(), &metrics);
  const auto server = StartServer("127.0.0.1:0", {service.get()});
  if (!server.ok()) return Report("StartServer", server.status().ToString());

  const KvGeometry geometry = KvGeometry::Create(Layout()).value();
  const std::string cache = Cache(geometry);
  const std::string token = RandomId();
  const auto stub = v1::KvTransferService::NewStub(DialPrivate(server->address, nullptr, Role::kDecode));
  KvDigest digest;
  const bool received = Open(stub.get(), token) && Send(server->address, token, geometry, cache, &digest) &&
                        Commit(stub.get(), token, digest) && Holds(store->get(), geometry, cache);
  server->server->Shutdown(std::chrono::system_clock::now());
  if (!received) return false;
  std::cout << "received " << geometry.total_bytes() << " bytes in " << geometry.num_blocks() << " blocks\n";
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: receive_session DIRECTORY\n";
    return 2;
  }
  return Run(argv[1]) ? 0 : 1;
}
