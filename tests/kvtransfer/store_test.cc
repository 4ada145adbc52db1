#include "kvtransfer/store.h"

#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/kvtransfer/store_fixture.h"

namespace headwater {
namespace {

// What holds whatever becomes of the blocks.
class KvAnyStoreTest : public KvStoreTest, public ::testing::WithParamInterface<KvSink> {
 protected:
  KvAnyStoreTest() : KvStoreTest(GetParam()) {}
};
INSTANTIATE_TEST_SUITE_P(Sinks, KvAnyStoreTest, ::testing::Values(KvSink::kMemory, KvSink::kVerify),
                         SinkName);

TEST_F(KvStoreTest, CommitsACompleteCacheAndGivesItOut) {
  ASSERT_TRUE(Open().ok());
  ExpectError(store_->Acquire(kSession).status(), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_SESSION_NOT_COMMITTED, "not committed");
  PutAll();
  v1::CommitSessionRequest request = MakeCommit(geometry_, cache_.Digest());
  for (const float logprob : {-3.0f, -0.5f, -1.25f}) request.add_top_logprobs()->set_logprob(logprob);
  const auto response = store_->Commit(request);
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->blocks_verified(), geometry_.num_blocks());
  EXPECT_EQ(response->bytes_stored(), geometry_.total_bytes());
  const auto kv = store_->Acquire(kSession);
  ASSERT_TRUE(kv.ok()) << kv.status();
  EXPECT_TRUE(cache_.Equals(**kv));
  EXPECT_EQ((*kv)->first_token(), 7);
  EXPECT_FLOAT_EQ((*kv)->first_top2_gap(), 0.75f);
  ASSERT_EQ((*kv)->prompt().size(), 100u);
  EXPECT_EQ((*kv)->prompt()[99], 99);
}

TEST_P(KvAnyStoreTest, CommitIsIdempotentForTheSameDigestOnly) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Commit().ok());
  EXPECT_TRUE(Commit().ok());
  ExpectError(store_->Commit(MakeCommit(geometry_, KvDigest())).status(), absl::StatusCode::kDataLoss,
              v1::ERROR_REASON_KV_CORRUPT, "digest");
  ExpectCommitted(cache_);
}

TEST_P(KvAnyStoreTest, RefusesACommitThatDoesNotFit) {
  ASSERT_TRUE(Open().ok());
  for (uint64_t i = 0; i + 2 < geometry_.num_blocks(); ++i) ASSERT_EQ(Put(i), PutResult::kStored);
  ExpectError(Commit(), absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_SESSION_NOT_COMMITTED,
              "2 of 24 blocks are missing");
  ASSERT_EQ(Put(geometry_.num_blocks() - 2), PutResult::kStored);
  ASSERT_EQ(Put(geometry_.num_blocks() - 1), PutResult::kStored);
  const auto with = [&](const std::function<void(v1::CommitSessionRequest*)>& change) {
    v1::CommitSessionRequest request = MakeCommit(geometry_, cache_.Digest());
    change(&request);
    return store_->Commit(request).status();
  };
  const auto bad = absl::StatusCode::kInvalidArgument;
  ExpectError(with([](auto* r) { r->add_token_ids(1); }), bad, v1::ERROR_REASON_BAD_FIELD, "101 token ids");
  ExpectError(with([](auto* r) { r->set_first_token(1u << 31); }), bad, v1::ERROR_REASON_BAD_FIELD,
              "2147483648");
  ExpectError(with([](auto* r) { r->set_token_ids(4, UINT32_MAX); }), bad, v1::ERROR_REASON_BAD_FIELD,
              "4294967295");
  ExpectError(with([](auto* r) { r->set_kv_digest("short"); }), bad, v1::ERROR_REASON_BAD_FIELD, "5 bytes");
  ExpectError(with([](auto* r) { r->set_epoch(2); }), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_BAD_FIELD, "epoch 2 is not open");
  ExpectError(with([](auto* r) { r->set_epoch(0); }), absl::StatusCode::kAborted,
              v1::ERROR_REASON_STALE_EPOCH, "epoch 0 is over");
  ExpectError(with([](auto* r) { r->set_session_token("guess"); }), absl::StatusCode::kPermissionDenied,
              v1::ERROR_REASON_BAD_FIELD, "session_token");
  ExpectError(with([](auto* r) { r->set_session_id("other"); }), absl::StatusCode::kNotFound,
              v1::ERROR_REASON_UNKNOWN_SESSION, "other");
  KvDigest wrong = cache_.Digest();
  wrong.Add(0, 1, 2);
  ExpectError(with([&](auto* r) { r->set_kv_digest(wrong.Bytes()); }), absl::StatusCode::kDataLoss,
              v1::ERROR_REASON_KV_CORRUPT, "digest");
  EXPECT_EQ(store_->usage().committed, 0u);
  v1::CommitSessionRequest odd = MakeCommit(geometry_, cache_.Digest());
  odd.add_top_logprobs()->set_logprob(std::numeric_limits<float>::quiet_NaN());
  odd.add_top_logprobs()->set_logprob(-1);
  ASSERT_TRUE(store_->Commit(odd).ok());
  ExpectCommitted(cache_);
  if (GetParam() == KvSink::kMemory) {
    EXPECT_EQ((*store_->Acquire(kSession))->first_top2_gap(), 0.0f);
  }
}

TEST_P(KvAnyStoreTest, DoesNotMarkACorruptBlock) {
  ASSERT_TRUE(Open().ok());
  std::string flipped(cache_.View(5));
  flipped[3] = static_cast<char>(flipped[3] ^ 4);
  EXPECT_EQ(PutAs(MakeBlock(geometry_, 5, cache_.Crc(5)), flipped), PutResult::kCorrupt);
  EXPECT_EQ(index_, 5u);
  EXPECT_EQ(NumStored(), 0u);
  EXPECT_EQ(Put(5), PutResult::kStored);
}

TEST_P(KvAnyStoreTest, NeverWritesAStoredBlockAgain) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  EXPECT_EQ(Put(5), PutResult::kAlreadyStored);
  EXPECT_EQ(index_, 5u);
  // The same checksum with other bytes behind it changes nothing either.
  EXPECT_EQ(PutAs(MakeBlock(geometry_, 5, cache_.Crc(5)), cache_.View(6)), PutResult::kAlreadyStored);
  EXPECT_EQ(PutAs(MakeBlock(geometry_, 5, cache_.Crc(6)), cache_.View(6)), PutResult::kRefused);
  EXPECT_NE(error_.find("another CRC"), std::string::npos) << error_;
  ASSERT_TRUE(Commit().ok());
  ExpectCommitted(cache_);
  EXPECT_EQ(Put(5), PutResult::kAlreadyStored);
  EXPECT_EQ(PutAs(MakeBlock(geometry_, 5, cache_.Crc(6)), cache_.View(6)), PutResult::kRefused);
}

TEST_P(KvAnyStoreTest, TakesAPayloadInManyPieces) {
  ASSERT_TRUE(Open().ok());
  const absl::string_view bytes = cache_.View(0);
  std::vector<absl::string_view> pieces;
  for (size_t at = 0; at < bytes.size(); at += 7) pieces.push_back(bytes.substr(at, 7));
  pieces.insert(pieces.begin() + 3, absl::string_view());
  EXPECT_EQ(store_->Put(kSession, MakeBlock(geometry_, 0, cache_.Crc(0)), pieces, &index_, &error_),
            PutResult::kStored);
}

TEST_P(KvAnyStoreTest, RefusesBlocksThatAreNotTheLayouts) {
  ASSERT_TRUE(Open().ok());
  const auto with = [&](const std::function<void(v1::KvBlock*)>& change) {
    v1::KvBlock block = MakeBlock(geometry_, 1, cache_.Crc(1));
    change(&block);
    index_ = 77;
    const PutResult result = PutAs(block, cache_.View(1));
    EXPECT_FALSE(error_.empty());
    EXPECT_EQ(index_, 77u);
    return result;
  };
  for (const auto& change : std::vector<std::function<void(v1::KvBlock*)>>{
           [](v1::KvBlock* b) { b->set_layer(3); }, [](v1::KvBlock* b) { b->set_layer(UINT32_MAX); },
           [](v1::KvBlock* b) { b->set_kind(v1::KV_KIND_UNSPECIFIED); },
           [](v1::KvBlock* b) { b->set_kind(static_cast<v1::KvKind>(3)); },
           [](v1::KvBlock* b) { b->set_head_begin(1); }, [](v1::KvBlock* b) { b->set_head_end(1); },
           [](v1::KvBlock* b) { b->set_head_end(3); }, [](v1::KvBlock* b) { b->set_token_begin(33); },
           [](v1::KvBlock* b) { b->set_token_end(63); }, [](v1::KvBlock* b) { b->set_token_end(96); },
           [](v1::KvBlock* b) { b->set_token_begin(0); },
           [](v1::KvBlock* b) { b->set_token_begin(UINT64_MAX - 31); },
           [](v1::KvBlock* b) { b->set_token_end(UINT64_MAX); },
           [](v1::KvBlock* b) {
             b->set_token_begin(96);
             b->set_token_end(128);
           }}) {
    EXPECT_EQ(with(change), PutResult::kRefused);
  }
  const v1::KvBlock block = MakeBlock(geometry_, 1, cache_.Crc(1));
  EXPECT_EQ(PutAs(block, cache_.View(1).substr(1)), PutResult::kRefused);
  EXPECT_EQ(PutAs(block, std::string(cache_.View(1)) + "x"), PutResult::kRefused);
  EXPECT_EQ(PutAs(block, ""), PutResult::kRefused);
  EXPECT_EQ(store_->Put("other", block, {cache_.View(1)}, &index_, &error_), PutResult::kRefused);
  EXPECT_EQ(Put(1, 2), PutResult::kRefused);
  EXPECT_EQ(NumStored(), 0u);
}

TEST_P(KvAnyStoreTest, AHigherEpochDiscardsTheLayersFromItsResumeLayer) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Open(2, 1).ok());
  const uint64_t kept = 2 * geometry_.blocks_per_tensor();
  EXPECT_EQ(NumStored(2), kept);
  EXPECT_EQ(Put(kept, 1), PutResult::kStaleEpoch);
  EXPECT_EQ(Put(0, 1), PutResult::kStaleEpoch);
  EXPECT_EQ(NumStored(2), kept);
  ExpectError(Open(1), absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH, "epoch 1 is over");
  ExpectError(store_->Hello(MakeHello(1), nullptr).status(), absl::StatusCode::kAborted,
              v1::ERROR_REASON_STALE_EPOCH, "epoch 1 is over");
  ExpectError(store_->Hello(MakeHello(3), nullptr).status(), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_BAD_FIELD, "epoch 3 is not open");
  ExpectError(Commit(1), absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH, "");
  PutAll(2, kept);
  EXPECT_TRUE(Commit(2).ok());
}

TEST_P(KvAnyStoreTest, TheSameEpochAgainChangesNothing) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  const auto again = store_->OpenSession(MakeOpen(geometry_.layout()));
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(*again, BytesOf(geometry_));
  EXPECT_EQ(NumStored(), geometry_.num_blocks());
  for (const uint32_t epoch : {1u, 2u}) {
    v1::OpenSessionRequest other = MakeOpen(MakeLayout(3, 2, 8, 101, 32), epoch);
    ExpectError(store_->OpenSession(other).status(), absl::StatusCode::kInvalidArgument,
                v1::ERROR_REASON_BAD_FIELD, "layout");
  }
  ExpectError(Open(2, 4), absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD, "resume_layer 4");
  EXPECT_EQ(store_->usage().bytes, BytesOf(geometry_));
}

TEST_F(KvStoreTest, ACommittedSessionTakesANewEpochOnlyWhileNobodyReadsIt) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Commit().ok());
  auto kv = store_->Acquire(kSession);
  ASSERT_TRUE(kv.ok());
  ExpectError(Open(2), absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_STALE_EPOCH, "in use");
  kv->reset();
  ASSERT_TRUE(Open(2).ok());
  EXPECT_EQ(store_->usage().committed, 0u);
  PutAll(2);
  EXPECT_TRUE(Commit(2).ok());
}

TEST_P(KvAnyStoreTest, NeedsTheRightToken) {
  ASSERT_TRUE(Open().ok());
  const auto denied = absl::StatusCode::kPermissionDenied;
  const std::string good = kToken;
  for (const std::string& token :
       {std::string("x"), good + "x", good.substr(1), std::string(good.size(), 'x')}) {
    v1::OpenSessionRequest open = MakeOpen(geometry_.layout(), 2);
    open.set_session_token(token);
    EXPECT_EQ(store_->OpenSession(open).status().code(), denied);
    v1::KvHello hello = MakeHello();
    hello.set_session_token(token);
    EXPECT_EQ(store_->Hello(hello, nullptr).status().code(), denied);
    v1::AbortSessionRequest abort;
    abort.set_session_id(kSession);
    abort.set_session_token(token);
    EXPECT_EQ(store_->Abort(abort).status().code(), denied);
  }
  EXPECT_EQ(store_->usage().sessions, 1u);
}

TEST_P(KvAnyStoreTest, RefusesBadOpens) {
  const auto with = [&](const std::function<void(v1::OpenSessionRequest*)>& change) {
    v1::OpenSessionRequest request = MakeOpen(geometry_.layout());
    change(&request);
    return store_->OpenSession(request).status();
  };
  const auto bad = absl::StatusCode::kInvalidArgument;
  const auto field = v1::ERROR_REASON_BAD_FIELD;
  ExpectError(with([](auto* r) { r->set_session_id(""); }), bad, field, "session_id has 0 bytes");
  ExpectError(with([](auto* r) { r->set_session_id(std::string(257, 'x')); }), bad, field, "257 bytes");
  ExpectError(with([](auto* r) { r->set_session_token(""); }), bad, field, "session_token has 0 bytes");
  ExpectError(with([](auto* r) { r->set_request_id(std::string(300, 'x')); }), bad, field, "request_id");
  ExpectError(with([](auto* r) { r->mutable_layout()->set_num_layers(0); }), bad, field, "num_layers");
  ExpectError(with([](auto* r) { r->clear_layout(); }), bad, field, "num_layers");
  ExpectError(with([](auto* r) { r->set_resume_layer(1); }), absl::StatusCode::kNotFound,
              v1::ERROR_REASON_UNKNOWN_SESSION, kSession);
  EXPECT_EQ(store_->usage().sessions, 0u);
  EXPECT_EQ(store_->usage().bytes, 0u);
  // A name that would be a path is just a name.
  EXPECT_TRUE(with([](auto* r) { r->set_session_id("../../../etc/passwd"); }).ok());
}

TEST_P(KvAnyStoreTest, KeepsToItsBudget) {
  const auto open = [&](const std::string& id, uint64_t tokens) {
    v1::OpenSessionRequest request = MakeOpen(MakeLayout(3, 2, 8, tokens, 32));
    request.set_session_id(id);
    return store_->OpenSession(request).status();
  };
  for (const char* id : {"a", "b", "c", "d"}) ASSERT_TRUE(open(id, 100).ok());
  const absl::Status full = open("e", 100);
  ExpectError(full, absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL, "0 are free");
  ExpectError(open("e", GetParam() == KvSink::kMemory ? 401 : 100'000), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE, "whole budget");
  EXPECT_EQ(store_->usage().bytes, options_.budget_bytes);
  EXPECT_EQ(store_->Release("b"), BytesOf(geometry_));
  EXPECT_TRUE(open("e", 100).ok());
}

TEST_P(KvAnyStoreTest, KeepsToItsNumberOfSessions) {
  options_.max_sessions = 1;
  Reopen();
  ASSERT_TRUE(Open().ok());
  v1::OpenSessionRequest second = MakeOpen(geometry_.layout());
  second.set_session_id("second");
  ExpectError(store_->OpenSession(second).status(), absl::StatusCode::kResourceExhausted,
              v1::ERROR_REASON_KV_MEMORY_FULL, "all 1 KV sessions");
  EXPECT_EQ(store_->usage().bytes, BytesOf(geometry_));
}

TEST_P(KvAnyStoreTest, RefusesAnotherModelsCache) {
  options_.model_fingerprint = "model-a";
  Reopen();
  v1::OpenSessionRequest request = MakeOpen(geometry_.layout());
  request.mutable_layout()->set_model_fingerprint("model-b");
  ExpectError(store_->OpenSession(request).status(), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_MODEL_MISMATCH, "model-b");
}

TEST_P(KvAnyStoreTest, AbortAndReleaseFreeTheSession) {
  ASSERT_TRUE(Open().ok());
  ASSERT_EQ(Put(0), PutResult::kStored);
  v1::AbortSessionRequest abort;
  abort.set_session_id(kSession);
  abort.set_session_token(kToken);
  EXPECT_EQ(store_->Abort(abort).value(), BytesOf(geometry_));
  EXPECT_EQ(store_->usage().bytes, 0u);
  EXPECT_EQ(store_->Abort(abort).value(), 0u);
  EXPECT_EQ(store_->Release(kSession), 0u);
  EXPECT_EQ(Put(0), PutResult::kRefused);
  ASSERT_TRUE(Open().ok());
  EXPECT_EQ(NumStored(), 0u);
  PutAll();
  ASSERT_TRUE(Commit().ok());
  EXPECT_EQ(store_->Abort(abort).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(store_->Release(kSession), BytesOf(geometry_));
  EXPECT_EQ(store_->usage().bytes, 0u);
  ExpectError(store_->Acquire(kSession).status(), absl::StatusCode::kNotFound,
              v1::ERROR_REASON_UNKNOWN_SESSION, "");
}

TEST_F(KvStoreTest, AHeldCacheOutlivesItsRelease) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Commit().ok());
  auto kv = store_->Acquire(kSession);
  ASSERT_TRUE(kv.ok());
  EXPECT_EQ(store_->Release(kSession), geometry_.total_bytes());
  EXPECT_TRUE(cache_.Equals(**kv));
  EXPECT_EQ(store_->usage().sessions, 0u);
  EXPECT_EQ(store_->usage().bytes, geometry_.total_bytes());
  kv->reset();
  EXPECT_EQ(store_->usage().bytes, 0u);
}

TEST_P(KvAnyStoreTest, FreesWhatTheLeaseSays) {
  options_.lease = absl::Seconds(60);
  Reopen();
  ASSERT_TRUE(Open().ok());
  clock_.Advance(absl::Seconds(50));
  ASSERT_EQ(Put(0), PutResult::kStored);
  clock_.Advance(absl::Seconds(50));
  EXPECT_EQ(store_->ExpireLeases(), 0);
  clock_.Advance(absl::Seconds(11));
  EXPECT_EQ(store_->ExpireLeases(), 1);
  EXPECT_EQ(store_->usage().bytes, 0u);

  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Commit().ok());
  if (GetParam() == KvSink::kMemory) {
    auto kv = store_->Acquire(kSession);
    clock_.Advance(absl::Seconds(1000));
    EXPECT_EQ(store_->ExpireLeases(), 0);
  }
  clock_.Advance(absl::Seconds(59));
  EXPECT_EQ(store_->ExpireLeases(), 0);
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(store_->ExpireLeases(), 1);
}

TEST_P(KvAnyStoreTest, WritersOfTheSameBlocksAndANewEpochDoNotMix) {
  const KvGeometry large = MakeGeometry(MakeLayout(2, 4, 64, 1024, 256));
  const CacheBytes old_bytes(large, 5), new_bytes(large, 6);
  options_.budget_bytes = BytesOf(large);
  Reopen();
  for (int run = 0; run < 20; ++run) {
    ASSERT_TRUE(store_->OpenSession(MakeOpen(large.layout(), 1)).ok());
    const auto push = [&](const CacheBytes& bytes, uint32_t epoch) {
      for (uint64_t i = 0; i < large.num_blocks(); ++i) {
        uint64_t index = 0;
        std::string error;
        store_->Put(kSession, MakeBlock(large, i, bytes.Crc(i), epoch), {bytes.View(i)}, &index, &error);
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) threads.emplace_back([&] { push(old_bytes, 1); });
    threads.emplace_back([&] {
      ASSERT_TRUE(store_->OpenSession(MakeOpen(large.layout(), 2)).ok());
      push(new_bytes, 2);
    });
    for (std::thread& thread : threads) thread.join();
    const auto commit = store_->Commit(MakeCommit(large, new_bytes.Digest(), 2));
    ASSERT_TRUE(commit.ok()) << commit.status();
    ExpectCommitted(new_bytes);
    store_->Release(kSession);
  }
}

TEST_F(KvStoreTest, RefusesBadOptions) {
  for (const auto& change : std::vector<std::function<void(KvStoreOptions*)>>{
           [](KvStoreOptions* o) { o->directory = ""; },
           [](KvStoreOptions* o) { o->directory = "/proc/nothing/here"; },
           [](KvStoreOptions* o) { o->budget_bytes = 0; }, [](KvStoreOptions* o) { o->max_sessions = 0; }}) {
    KvStoreOptions options = options_;
    const TempDir other;
    options.directory = other.path();
    change(&options);
    EXPECT_FALSE(KvStore::Open(options).ok());
  }
}

}  // namespace
}  // namespace headwater
