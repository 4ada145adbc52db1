#include "tests/kvtransfer/kv_fixture.h"

#include <cstring>
#include <filesystem>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

namespace headwater {

v1::KvLayout MakeLayout(uint32_t layers, uint32_t heads, uint32_t head_dim, uint64_t tokens,
                        uint32_t block_tokens) {
  v1::KvLayout layout;
  layout.set_num_layers(layers);
  layout.set_num_kv_heads(heads);
  layout.set_head_dim(head_dim);
  layout.set_num_tokens(tokens);
  layout.set_block_tokens(block_tokens);
  layout.set_dtype(v1::KV_DTYPE_BF16);
  return layout;
}

KvGeometry MakeGeometry(const v1::KvLayout& layout) { return KvGeometry::Create(layout).value(); }

v1::OpenSessionRequest MakeOpen(const v1::KvLayout& layout, uint32_t epoch, uint32_t resume_layer) {
  v1::OpenSessionRequest request;
  request.set_session_id(kSession);
  request.set_request_id("request-1");
  request.set_session_token(kToken);
  request.set_epoch(epoch);
  request.set_resume_layer(resume_layer);
  *request.mutable_layout() = layout;
  return request;
}

v1::KvHello MakeHello(uint32_t epoch) {
  v1::KvHello hello;
  hello.set_session_id(kSession);
  hello.set_session_token(kToken);
  hello.set_epoch(epoch);
  return hello;
}

v1::KvBlock MakeBlock(const KvGeometry& geometry, uint64_t index, uint32_t crc, uint32_t epoch) {
  const KvBlockId id = geometry.BlockAt(index);
  v1::KvBlock block;
  block.set_epoch(epoch);
  block.set_layer(id.layer);
  block.set_kind(id.kind == KvKind::kK ? v1::KV_KIND_K : v1::KV_KIND_V);
  block.set_head_end(geometry.layout().num_kv_heads());
  block.set_token_begin(id.token_begin);
  block.set_token_end(id.token_end);
  block.set_crc32c(crc);
  return block;
}

v1::CommitSessionRequest MakeCommit(const KvGeometry& geometry, const KvDigest& digest, uint32_t epoch) {
  v1::CommitSessionRequest request;
  request.set_session_id(kSession);
  request.set_session_token(kToken);
  request.set_epoch(epoch);
  request.set_kv_digest(digest.Bytes());
  request.set_first_token(7);
  for (uint32_t i = 0; i < geometry.layout().num_tokens(); ++i) request.add_token_ids(i);
  return request;
}

CacheBytes::CacheBytes(const KvGeometry& geometry, uint32_t seed) : geometry_(geometry) {
  std::mt19937_64 random(seed);
  bytes_.resize(geometry.total_bytes());
  for (size_t i = 0; i < bytes_.size(); i += 8) {
    const uint64_t word = random();
    std::memcpy(&bytes_[i], &word, std::min<size_t>(8, bytes_.size() - i));
  }
}

uint32_t CacheBytes::Crc(uint64_t index) const { return Crc32c(Block(index), BlockBytes(index)); }

KvDigest CacheBytes::Digest() const {
  KvDigest digest;
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) digest.Add(i, BlockBytes(i), Crc(i));
  return digest;
}

bool CacheBytes::Equals(const CommittedKv& kv) const {
  for (uint32_t layer = 0; layer < geometry_.layout().num_layers(); ++layer) {
    for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
      const char* mine = bytes_.data() + geometry_.OffsetOf({layer, kind, 0, 0});
      if (std::memcmp(mine, kv.Tensor(layer, kind), geometry_.tensor_bytes()) != 0) return false;
    }
  }
  return true;
}

TempDir::TempDir(bool in_memory) {
  std::string base = std::filesystem::temp_directory_path().string();
  if (in_memory && access("/dev/shm", W_OK) == 0) base = "/dev/shm";
  std::string pattern = base + "/hwkv.XXXXXX";
  EXPECT_NE(mkdtemp(pattern.data()), nullptr);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

std::string TempDir::Only(absl::string_view suffix) const {
  std::string found;
  for (const auto& entry : std::filesystem::directory_iterator(path_)) {
    if (!absl::EndsWith(entry.path().string(), suffix)) continue;
    EXPECT_EQ(found, "");
    found = entry.path().string();
  }
  EXPECT_NE(found, "") << suffix;
  return found;
}

TestReceiver::TestReceiver(uint64_t budget_bytes, KvSink sink) : budget_bytes_(budget_bytes), sink_(sink) {
  Start();
}

void TestReceiver::Start() {
  KvStoreOptions options;
  options.sink = sink_;
  options.directory = directory_.path();
  options.budget_bytes = budget_bytes_;
  auto store = KvStore::Open(options);
  ASSERT_TRUE(store.ok()) << store.status();
  store_ = *std::move(store);
  service_ = MakeKvReceiver(store_.get(), &metrics_);
  // The port of the server before may take a moment to be free.
  for (int i = 0; i < 200; ++i) {
    auto server = StartServer(address_, {service_.get()});
    if (server.ok()) {
      server_ = *std::move(server);
      address_ = server_.address;
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  FAIL() << "cannot listen on " << address_;
}

void TestReceiver::Stop() {
  if (server_.server == nullptr) return;
  server_.server->Shutdown(std::chrono::system_clock::now());
  server_.server->Wait();
  server_.server.reset();
  service_.reset();
  store_.reset();
}

double TestReceiver::Blocks(const std::string& result) {
  return metrics_
      .Counter("headwater_kv_ingress_blocks_total", "KV blocks received, by result.", {{"result", result}})
      .Value();
}

std::function<void()> DoneCounter::Callback() {
  return [this] {
    std::lock_guard<std::mutex> lock(mutex_);
    ++count_;
    changed_.notify_all();
  };
}

int DoneCounter::count() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return count_;
}

bool DoneCounter::WaitFor(int count, std::chrono::seconds limit) const {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, limit, [&] { return count_ >= count; });
}

KvSenderOptions MakeSenderOptions(const std::string& address) {
  KvSenderOptions options;
  options.address = address;
  options.session_id = kSession;
  options.session_token = kToken;
  options.request_id = "request-1";
  options.epoch = 1;
  return options;
}

}  // namespace headwater
