// What is particular to a KvStore that checks blocks and drops them (KvSink::kVerify).
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include <google/protobuf/unknown_field_set.h>
#include <gtest/gtest.h>

#include "tests/kvtransfer/store_fixture.h"

namespace headwater {
namespace {

class KvVerifyStoreTest : public KvStoreTest {
 protected:
  KvVerifyStoreTest() : KvStoreTest(KvSink::kVerify) {}
};

TEST_F(KvVerifyStoreTest, ComparesTheDigestAndGivesNothingOut) {
  ASSERT_TRUE(Open().ok());
  ExpectError(store_->Acquire(kSession).status(), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_SESSION_NOT_COMMITTED, "not committed");
  PutAll();
  KvDigest wrong = cache_.Digest();
  wrong.Add(0, 0, 0);
  ExpectError(store_->Commit(MakeCommit(geometry_, wrong)).status(), absl::StatusCode::kDataLoss,
              v1::ERROR_REASON_KV_CORRUPT, wrong.Hex());
  const auto response = store_->Commit(MakeCommit(geometry_, cache_.Digest()));
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->blocks_verified(), geometry_.num_blocks());
  EXPECT_EQ(response->bytes_stored(), 0u);
  EXPECT_EQ(store_->usage().committed_bytes, BytesOf(geometry_));
  ExpectError(store_->Acquire(kSession).status(), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_BAD_FIELD, "--sink=verify");
}

TEST_F(KvVerifyStoreTest, ACommittedSessionTakesANewEpochAndKeepsTheLayersBelow) {
  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Commit().ok());
  ASSERT_TRUE(Open(2, 2).ok());
  const uint64_t kept = 4 * geometry_.blocks_per_tensor();
  EXPECT_EQ(NumStored(2), kept);
  EXPECT_EQ(store_->usage().committed, 0u);
  ExpectError(Commit(2), absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_SESSION_NOT_COMMITTED,
              "8 of 24 blocks");
  PutAll(2, kept);
  EXPECT_TRUE(Commit(2).ok());
}

TEST_F(KvVerifyStoreTest, AHugeCacheTakesNoMoreThanItsChecksums) {
  const KvGeometry huge = MakeGeometry(MakeLayout(64, 8, 128, 1 << 20, 512));
  ASSERT_EQ(huge.total_bytes(), uint64_t{256} << 30);
  options_.budget_bytes = 4 << 20;
  Reopen();

  const auto opened = store_->OpenSession(MakeOpen(huge.layout()));

  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(*opened, BytesOf(huge));
  EXPECT_LT(*opened, 3u << 20);
  EXPECT_EQ(store_->usage().bytes, *opened);
  const std::string payload(huge.BytesOf(huge.BlockAt(0)), 'x');
  const uint32_t crc = Crc32c(payload.data(), payload.size());
  for (const uint64_t index : {uint64_t{0}, huge.num_blocks() - 1}) {
    EXPECT_EQ(PutAs(MakeBlock(huge, index, crc), payload), PutResult::kStored) << error_;
  }
  EXPECT_EQ(NumStored(), 2u);
  v1::OpenSessionRequest second = MakeOpen(huge.layout());
  second.set_session_id("second");
  ExpectError(store_->OpenSession(second).status(), absl::StatusCode::kResourceExhausted,
              v1::ERROR_REASON_KV_MEMORY_FULL, "262144 blocks");
  second.mutable_layout()->set_block_tokens(256);
  ExpectError(store_->OpenSession(second).status(), absl::StatusCode::kFailedPrecondition,
              v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE, "524288 blocks");
  EXPECT_EQ(store_->Release(kSession), *opened);
  EXPECT_EQ(store_->usage().bytes, 0u);
}

TEST_F(KvVerifyStoreTest, NothingIsWrittenAndNothingSurvives) {
  options_.directory = directory_.path();
  Reopen();
  ASSERT_TRUE(Open().ok());
  PutAll();
  ASSERT_TRUE(Commit().ok());
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
  Reopen();
  EXPECT_EQ(store_->usage().sessions, 0u);
  ExpectError(store_->Hello(MakeHello(), nullptr).status(), absl::StatusCode::kNotFound,
              v1::ERROR_REASON_UNKNOWN_SESSION, kSession);
  ExpectError(Open(2, 1), absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION, kSession);
  EXPECT_TRUE(Open(2).ok());
}

TEST_F(KvVerifyStoreTest, RefusesARequestThatWouldTakeMoreThanItCounts) {
  v1::OpenSessionRequest request = MakeOpen(geometry_.layout());
  *request.GetReflection()->MutableUnknownFields(&request)->AddLengthDelimited(1000) = std::string(5000, 'x');
  ExpectError(store_->OpenSession(request).status(), absl::StatusCode::kInvalidArgument,
              v1::ERROR_REASON_BAD_FIELD, "the limit is 4096");
  EXPECT_EQ(store_->usage().bytes, 0u);
  EXPECT_TRUE(Open().ok());
}

TEST_F(KvVerifyStoreTest, EndsWhileBlocksCome) {
  const auto push = [&] {
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
      uint64_t index = 0;
      std::string error;
      store_->Put(kSession, MakeBlock(geometry_, i, cache_.Crc(i)), {cache_.View(i)}, &index, &error);
    }
  };
  for (int run = 0; run < 20; ++run) {
    ASSERT_TRUE(Open().ok());
    std::vector<std::thread> threads;
    threads.reserve(3);
    for (int i = 0; i < 3; ++i) threads.emplace_back(push);
    EXPECT_EQ(store_->Release(kSession), BytesOf(geometry_));
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(store_->usage().bytes, 0u);
  }
}

}  // namespace
}  // namespace headwater
