// What the tests of kvtransfer share: small caches with known contents, a directory, a receiver.
#ifndef HW_TESTS_KVTRANSFER_KV_FIXTURE_H_
#define HW_TESTS_KVTRANSFER_KV_FIXTURE_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

#include "base/metrics.h"
#include "base/rpc/server.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/store.h"

namespace headwater {

inline constexpr char kSession[] = "session-1";
inline constexpr char kToken[] = "a token that nobody guesses";

v1::KvLayout MakeLayout(uint32_t layers, uint32_t heads, uint32_t head_dim, uint64_t tokens,
                        uint32_t block_tokens);
KvGeometry MakeGeometry(const v1::KvLayout& layout);
v1::OpenSessionRequest MakeOpen(const v1::KvLayout& layout, uint32_t epoch = 1, uint32_t resume_layer = 0);
v1::KvHello MakeHello(uint32_t epoch = 1);
v1::KvBlock MakeBlock(const KvGeometry& geometry, uint64_t index, uint32_t crc, uint32_t epoch = 1);
// Without top_logprobs; prompt token i is i, the first token 7.
v1::CommitSessionRequest MakeCommit(const KvGeometry& geometry, const KvDigest& digest, uint32_t epoch = 1);

// A cache's bytes, the same for the same seed.
class CacheBytes {
 public:
  CacheBytes(const KvGeometry& geometry, uint32_t seed);
  const char* Block(uint64_t index) const {
    return bytes_.data() + geometry_.OffsetOf(geometry_.BlockAt(index));
  }
  uint64_t BlockBytes(uint64_t index) const { return geometry_.BytesOf(geometry_.BlockAt(index)); }
  absl::string_view View(uint64_t index) const { return absl::string_view(Block(index), BlockBytes(index)); }
  uint32_t Crc(uint64_t index) const;
  KvDigest Digest() const;
  // True if the committed cache holds exactly these bytes.
  bool Equals(const CommittedKv& kv) const;
  const KvGeometry& geometry() const { return geometry_; }

 private:
  const KvGeometry geometry_;
  std::string bytes_;
};

// A directory that goes with the object.
class TempDir {
 public:
  // `in_memory`: on a tmpfs where there is one, for tests that make many files.
  explicit TempDir(bool in_memory = false);
  ~TempDir();
  const std::string& path() const { return path_; }
  // Path of the only file with that suffix.
  std::string Only(absl::string_view suffix) const;

 private:
  std::string path_;
};

// A store and its service on a port that stays the same over restarts.
class TestReceiver {
 public:
  explicit TestReceiver(uint64_t budget_bytes = 1 << 30, KvSink sink = KvSink::kMemory);
  ~TestReceiver() { Stop(); }
  void Start();
  // As the end of the process: streams break at once.
  void Stop();
  KvStore* store() { return store_.get(); }
  Metrics& metrics() { return metrics_; }
  double Blocks(const std::string& result);
  const std::string& address() const { return address_; }
  const std::string& directory() const { return directory_.path(); }
  const TempDir& temp_dir() const { return directory_; }

 private:
  const uint64_t budget_bytes_;
  const KvSink sink_;
  TempDir directory_;
  Metrics metrics_{"test"};
  std::string address_ = "127.0.0.1:0";
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<grpc::Service> service_;
  RunningServer server_;
};

// Counts down from many threads.
class DoneCounter {
 public:
  std::function<void()> Callback();
  int count() const;
  bool WaitFor(int count, std::chrono::seconds limit = std::chrono::seconds(20)) const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  int count_ = 0;
};

KvSenderOptions MakeSenderOptions(const std::string& address);

}  // namespace headwater

#endif  // HW_TESTS_KVTRANSFER_KV_FIXTURE_H_
