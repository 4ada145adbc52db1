// Session files that a decode node finds when it starts, whatever became of them since.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/rpc/grpc_status.h"
#include "fuzz.pb.h"
#include "kvtransfer/session_files.h"
#include "kvtransfer/store.h"
#include "tests/fuzz/fuzz.h"
#include "tests/kvtransfer/kv_fixture.h"

namespace headwater::fuzz {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kBudget = 1 << 20;
constexpr size_t kPrefix = 24, kPage = 4096;

std::string Contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  FUZZ_EXPECT(file.good(), path.c_str());
}

// Size, checksum and text of the fixed part's request.
void PutRequest(const v1::OpenSessionRequest& request, std::string* meta) {
  const std::string bytes = request.SerializeAsString();
  if (meta->size() < kPage || bytes.size() > kPage - kPrefix) return;
  const auto size = static_cast<uint32_t>(bytes.size());
  const uint32_t crc = Crc32c(bytes.data(), bytes.size());
  std::memcpy(meta->data() + 12, &size, sizeof(size));
  std::memcpy(meta->data() + 16, &crc, sizeof(crc));
  std::memcpy(meta->data() + kPrefix, bytes.data(), bytes.size());
}

std::string Name() { return SessionFiles::NameOf(kSession); }

void Run(absl::string_view input) {
  SessionFile file;
  if (!file.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  static const TempDir* const directory = new TempDir(true);
  std::string meta = file.meta();
  if (file.has_request()) PutRequest(file.request(), &meta);
  Write(directory->path() + "/" + Name() + ".meta", meta);
  Write(directory->path() + "/" + Name() + ".kv", file.payload());
  KvStoreOptions options;
  options.directory = directory->path();
  options.budget_bytes = kBudget;
  const auto store = KvStore::Open(options);
  FUZZ_EXPECT(store.ok(), store.status().ToString().c_str());
  if ((*store)->usage().sessions == 0) return;
  const std::string id = file.has_request() ? file.request().session_id() : kSession;
  const auto kv = (*store)->Acquire(id);
  if (kv.ok()) {
    const KvGeometry& geometry = (*kv)->geometry();
    FUZZ_EXPECT((*kv)->prompt().size() == geometry.layout().num_tokens(), "a token id for each token");
    FUZZ_EXPECT(geometry.total_bytes() == file.payload().size(), "a file of the layout's size");
    Consume(Crc32c((*kv)->Tensor(0, KvKind::kK), geometry.total_bytes()));
  }
  (*store)->Release(id);
  (*store)->Release(kSession);
  for (const fs::directory_entry& entry : fs::directory_iterator(directory->path())) {
    if (entry.path().extension() == ".meta" || entry.path().extension() == ".kv") fs::remove(entry.path());
  }
}

std::vector<std::string> Seeds() {
  const KvGeometry geometry = MakeGeometry(MakeLayout(1, 1, 8, 40, 16));
  const CacheBytes cache(geometry, 1);
  std::vector<std::string> seeds;
  for (const bool committed : {false, true}) {
    const TempDir directory(true);
    KvStoreOptions options;
    options.directory = directory.path();
    options.budget_bytes = kBudget;
    SessionFile file;
    {
      const auto store = KvStore::Open(options);
      FUZZ_EXPECT(store.ok() && (*store)->OpenSession(MakeOpen(geometry.layout())).ok(), "a session");
      for (uint64_t i = 0; i < geometry.num_blocks(); ++i) {
        uint64_t index = 0;
        std::string error;
        (*store)->Put(kSession, MakeBlock(geometry, i, cache.Crc(i)), {cache.View(i)}, &index, &error);
      }
      if (committed) {
        FUZZ_EXPECT((*store)->Commit(MakeCommit(geometry, cache.Digest())).ok(), "a commit");
      }
    }
    file.set_meta(Contents(directory.path() + "/" + Name() + ".meta"));
    file.set_payload(Contents(directory.path() + "/" + Name() + ".kv"));
    seeds.push_back(file.SerializeAsString());
    *file.mutable_request() = MakeOpen(geometry.layout());
    seeds.push_back(file.SerializeAsString());
  }
  return seeds;
}

const Registration kTarget({"kv_recovery", Run, Seeds, Prototype<SessionFile>});

}  // namespace
}  // namespace headwater::fuzz
