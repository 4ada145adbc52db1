// What a KvStore finds when it opens a directory that an earlier process used.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "kvtransfer/store.h"
#include "tests/kvtransfer/kv_fixture.h"

namespace headwater {
namespace {

void Overwrite(const std::string& path, uint64_t offset, const std::string& bytes) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.good()) << path;
}

char ReadByte(const std::string& path, uint64_t offset) {
  std::ifstream file(path, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offset));
  return static_cast<char>(file.get());
}

class KvRecoveryTest : public ::testing::Test {
 protected:
  KvRecoveryTest() : geometry_(MakeGeometry(MakeLayout(2, 2, 8, 90, 32))), cache_(geometry_, 2) {
    options_.directory = directory_.path();
    options_.budget_bytes = 1 << 20;
    Open();
  }
  void Open() {
    auto store = KvStore::Open(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  void Close() { store_.reset(); }
  // Opens the session and stores all blocks but those of `without`.
  void Fill(const std::vector<uint64_t>& without = {}) {
    ASSERT_TRUE(store_->OpenSession(MakeOpen(geometry_.layout())).ok());
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
      if (std::find(without.begin(), without.end(), i) == without.end()) Put(i);
    }
  }
  void Put(uint64_t i) {
    uint64_t index = 0;
    std::string error;
    ASSERT_EQ(store_->Put(kSession, MakeBlock(geometry_, i, cache_.Crc(i)), {cache_.View(i)}, &index, &error),
              PutResult::kStored)
        << error;
  }
  bool Stored(uint64_t i) {
    const auto state = store_->Hello(MakeHello(), nullptr);
    EXPECT_TRUE(state.ok()) << state.status();
    const std::string& bits = state->stored_blocks();
    return i / 8 < bits.size() && (static_cast<unsigned char>(bits[i / 8]) >> (i % 8) & 1) != 0;
  }
  absl::Status Commit() { return store_->Commit(MakeCommit(geometry_, cache_.Digest())).status(); }
  void ExpectSetAside() {
    EXPECT_EQ(store_->usage().sessions, 0u);
    EXPECT_EQ(store_->usage().bytes, 0u);
    EXPECT_FALSE(std::filesystem::is_empty(directory_.path() + "/set_aside"));
    // The name is free again.
    Fill();
    EXPECT_TRUE(Commit().ok());
  }

  const KvGeometry geometry_;
  const CacheBytes cache_;
  TempDir directory_{/*in_memory=*/true};
  KvStoreOptions options_;
  std::unique_ptr<KvStore> store_;
};

TEST_F(KvRecoveryTest, GoesOnWhereTheProcessBeforeWasKilled) {
  Close();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    Open();
    Fill({3, 7});
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  Open();
  EXPECT_EQ(store_->usage().bytes, geometry_.total_bytes());
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) EXPECT_EQ(Stored(i), i != 3 && i != 7) << i;
  Put(3);
  Put(7);
  EXPECT_TRUE(Commit().ok());
  EXPECT_TRUE(cache_.Equals(**store_->Acquire(kSession)));
}

TEST_F(KvRecoveryTest, KeepsEpochTokenAndCommit) {
  Fill();
  ASSERT_TRUE(store_->OpenSession(MakeOpen(geometry_.layout(), 5, 2)).ok());
  Close();
  Open();
  EXPECT_EQ(store_->Hello(MakeHello(1), nullptr).status().code(), absl::StatusCode::kAborted);
  v1::KvHello hello = MakeHello(5);
  EXPECT_TRUE(store_->Hello(hello, nullptr).ok());
  hello.set_session_token("guess");
  EXPECT_EQ(store_->Hello(hello, nullptr).status().code(), absl::StatusCode::kPermissionDenied);
  ASSERT_TRUE(store_->Commit(MakeCommit(geometry_, cache_.Digest(), 5)).ok());
  Close();
  Open();
  EXPECT_EQ(store_->usage().committed, 1u);
  const auto kv = store_->Acquire(kSession);
  ASSERT_TRUE(kv.ok()) << kv.status();
  EXPECT_TRUE(cache_.Equals(**kv));
  EXPECT_EQ((*kv)->first_token(), 7);
  EXPECT_EQ((*kv)->prompt().size(), 90u);
  EXPECT_TRUE(store_->Commit(MakeCommit(geometry_, cache_.Digest(), 5)).ok());
}

TEST_F(KvRecoveryTest, DropsABlockWhoseByteWasFlipped) {
  Fill();
  Close();
  const std::string path = directory_.Only(".kv");
  const uint64_t offset = geometry_.OffsetOf(geometry_.BlockAt(4)) + 11;
  Overwrite(path, offset, std::string(1, static_cast<char>(ReadByte(path, offset) ^ 1)));
  Open();
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) EXPECT_EQ(Stored(i), i != 4) << i;
  EXPECT_EQ(Commit().code(), absl::StatusCode::kFailedPrecondition);
  Put(4);
  EXPECT_TRUE(Commit().ok());
}

TEST_F(KvRecoveryTest, SetsACommittedSessionWithAFlippedByteAside) {
  Fill();
  ASSERT_TRUE(Commit().ok());
  Close();
  const std::string path = directory_.Only(".kv");
  Overwrite(path, 100, std::string(1, static_cast<char>(ReadByte(path, 100) ^ 1)));
  Open();
  EXPECT_EQ(store_->Acquire(kSession).status().code(), absl::StatusCode::kNotFound);
  ExpectSetAside();
}

TEST_F(KvRecoveryTest, SetsTruncatedAndStretchedFilesAside) {
  for (const char* suffix : {".kv", ".meta"}) {
    for (const int64_t change : {-1, -4096, -100'000'000, 1, 4096}) {
      Fill();
      Close();
      const std::string path = directory_.Only(suffix);
      const int64_t size = static_cast<int64_t>(std::filesystem::file_size(path)) + change;
      std::filesystem::resize_file(path, static_cast<uintmax_t>(std::max<int64_t>(size, 0)));
      Open();
      ExpectSetAside();
      store_->Release(kSession);
    }
  }
}

TEST_F(KvRecoveryTest, ACommitRecordThatDoesNotMatchIsSetAside) {
  Fill();
  ASSERT_TRUE(Commit().ok());
  Close();
  const std::string path = directory_.Only(".meta");
  // A token id of the prompt: the table of 12 entries fills one page after the two of the header.
  Overwrite(path, 3 * 4096 + 8, "\x7f");
  Open();
  ExpectSetAside();
}

TEST_F(KvRecoveryTest, SurvivesAnyByteOfTheMetadataBeingWrong) {
  Fill();
  ASSERT_TRUE(Commit().ok());
  Close();
  const std::string meta = directory_.Only(".meta"), payload = directory_.Only(".kv");
  const TempDir spare(/*in_memory=*/true);
  std::filesystem::copy_file(meta, spare.path() + "/meta");
  std::filesystem::copy_file(payload, spare.path() + "/kv");
  const uint64_t size = std::filesystem::file_size(meta);
  int whole = 0;
  // Most of the damage is warned about, hundreds of times.
  InitLogging(LogFormat::kText, LogSeverity::kERROR, "");
  for (uint64_t offset = 0; offset < size; offset += offset % 4096 < 200 ? 1 : 331) {
    const auto copy = std::filesystem::copy_options::overwrite_existing;
    std::filesystem::copy_file(spare.path() + "/meta", meta, copy);
    std::filesystem::copy_file(spare.path() + "/kv", payload, copy);
    Overwrite(meta, offset, std::string(1, static_cast<char>(ReadByte(meta, offset) ^ (1 << (offset % 8)))));
    Open();
    const auto kv = store_->Acquire(kSession);
    if (kv.ok()) {
      ++whole;
      EXPECT_TRUE(cache_.Equals(**kv)) << offset;
      EXPECT_EQ((*kv)->first_token(), 7);
      EXPECT_EQ((*kv)->prompt()[89], 89);
    }
    store_->Release(kSession);
    Close();
  }
  InitLogging(LogFormat::kText, LogSeverity::kINFO, "");
  // Bytes that mean nothing (padding) may change.
  EXPECT_GT(whole, 0);
}

TEST_F(KvRecoveryTest, RemovesWhatAHalfMadeSessionLeft) {
  Close();
  const std::string stem = directory_.path() + "/" + std::string(32, 'a');
  std::ofstream(stem + ".kv") << "payload without metadata";
  std::ofstream(stem + ".meta.tmp") << "metadata not renamed";
  std::ofstream(directory_.path() + "/notes.txt") << "somebody else's";
  Open();
  EXPECT_FALSE(std::filesystem::exists(stem + ".kv"));
  EXPECT_FALSE(std::filesystem::exists(stem + ".meta.tmp"));
  EXPECT_TRUE(std::filesystem::exists(directory_.path() + "/notes.txt"));
}

TEST_F(KvRecoveryTest, RemovesAnotherModelsSessions) {
  Fill();
  Close();
  options_.model_fingerprint = "another model";
  Open();
  EXPECT_EQ(store_->usage().sessions, 0u);
  EXPECT_EQ(store_->usage().bytes, 0u);
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path())) {
    EXPECT_EQ(entry.path().filename(), "lock");
  }
}

TEST_F(KvRecoveryTest, RefusesADirectoryThatAnotherProcessHolds) {
  const auto second = KvStore::Open(options_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(second.status().message().find("in use by another process"), absl::string_view::npos)
      << second.status();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(KvStore::Open(options_).ok() ? 1 : 0);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  Close();
  Open();
}

}  // namespace
}  // namespace headwater
