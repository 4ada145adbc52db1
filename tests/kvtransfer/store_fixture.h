// A store of a small cache on a clock that stands still, for the tests of KvStore.
#ifndef HW_TESTS_KVTRANSFER_STORE_FIXTURE_H_
#define HW_TESTS_KVTRANSFER_STORE_FIXTURE_H_

#include <memory>
#include <string>

#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "kvtransfer/store.h"
#include "tests/kvtransfer/kv_fixture.h"
#include "tests/support/fake_clock.h"

namespace headwater {

class KvStoreTest : public ::testing::Test {
 protected:
  explicit KvStoreTest(KvSink sink = KvSink::kMemory)
      : geometry_(MakeGeometry(MakeLayout(3, 2, 8, 100, 32))), cache_(geometry_, 1) {
    options_.sink = sink;
    options_.directory = sink == KvSink::kMemory ? directory_.path() : "";
    options_.budget_bytes = 4 * BytesOf(geometry_);
    options_.clock = &clock_;
    Reopen();
  }

  void Reopen() {
    store_.reset();
    auto store = KvStore::Open(options_);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  // What a session of that cache takes of the budget.
  uint64_t BytesOf(const KvGeometry& geometry) const {
    return options_.sink == KvSink::kMemory ? geometry.total_bytes() : 16384 + 8 * geometry.num_blocks();
  }
  absl::Status Open(uint32_t epoch = 1, uint32_t resume_layer = 0) {
    return store_->OpenSession(MakeOpen(geometry_.layout(), epoch, resume_layer)).status();
  }

  PutResult Put(uint64_t index, uint32_t epoch = 1) {
    return PutAs(MakeBlock(geometry_, index, cache_.Crc(index), epoch), cache_.View(index));
  }
  PutResult PutAs(const v1::KvBlock& block, absl::string_view payload) {
    error_.clear();
    return store_->Put(kSession, block, {payload}, &index_, &error_);
  }
  void PutAll(uint32_t epoch = 1, uint64_t from = 0) {
    for (uint64_t i = from; i < geometry_.num_blocks(); ++i)
      ASSERT_EQ(Put(i, epoch), PutResult::kStored) << error_;
  }
  absl::Status Commit(uint32_t epoch = 1) {
    return store_->Commit(MakeCommit(geometry_, cache_.Digest(), epoch)).status();
  }
  uint64_t NumStored(uint32_t epoch = 1) {
    const auto state = store_->Hello(MakeHello(epoch), nullptr);
    EXPECT_TRUE(state.ok()) << state.status();
    uint64_t count = 0;
    for (const char byte : state->stored_blocks()) {
      count += static_cast<uint64_t>(__builtin_popcount(static_cast<unsigned char>(byte)));
    }
    return count;
  }
  // The one session is committed, and holds those bytes where the store keeps any.
  void ExpectCommitted(const CacheBytes& cache) {
    EXPECT_EQ(store_->usage().committed, 1u);
    if (options_.sink != KvSink::kMemory) return;
    const auto kv = store_->Acquire(kSession);
    ASSERT_TRUE(kv.ok()) << kv.status();
    EXPECT_TRUE(cache.Equals(**kv));
  }

  const KvGeometry geometry_;
  const CacheBytes cache_;
  FakeClock clock_;
  TempDir directory_;
  KvStoreOptions options_;
  std::unique_ptr<KvStore> store_;
  uint64_t index_ = 0;
  std::string error_;
};

inline void ExpectError(const absl::Status& status, absl::StatusCode code, v1::ErrorReason reason,
                        absl::string_view part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(ReasonOf(status), reason) << status;
  EXPECT_NE(status.message().find(part), absl::string_view::npos) << status;
}

inline std::string SinkName(const ::testing::TestParamInfo<KvSink>& info) {
  return info.param == KvSink::kMemory ? "Memory" : "Verify";
}

}  // namespace headwater

#endif  // HW_TESTS_KVTRANSFER_STORE_FIXTURE_H_
