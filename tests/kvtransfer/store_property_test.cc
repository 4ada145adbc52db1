// Random schedules of everything that a network and lost senders can do to a session, against a model of what
// must be there.
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kvtransfer/store.h"
#include "tests/kvtransfer/store_fixture.h"

namespace headwater {
namespace {

constexpr int kSchedules = 2500;
constexpr uint32_t kMostEpochs = 4;

class Schedule {
 public:
  Schedule(KvStore* store, const KvGeometry& geometry, const std::vector<CacheBytes>& caches, uint32_t seed)
      : store_(store), geometry_(geometry), caches_(caches), random_(seed), owner_(geometry.num_blocks()) {}

  // The session's epoch e has the bytes of caches[e]; owner_ is the epoch whose bytes each block holds.
  void Run() {
    NewEpoch();
    const uint64_t steps = 20 + Below(4 * geometry_.num_blocks());
    for (uint64_t step = 0; step < steps && !::testing::Test::HasFailure(); ++step) {
      const uint64_t kind = Below(100);
      if (kind < 70) {
        PutGood(Below(geometry_.num_blocks()));
      } else if (kind < 78) {
        PutDamaged(Below(geometry_.num_blocks()));
      } else if (kind < 86) {
        PutStale(Below(geometry_.num_blocks()));
      } else if (kind < 90) {
        PutMisfit(Below(geometry_.num_blocks()));
      } else if (kind < 96) {
        TryCommit();
      } else if (epoch_ + 1 < kMostEpochs) {
        NewEpoch();
      }
    }
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) PutGood(i);
    TryCommit();
    EXPECT_TRUE(committed_);
    EXPECT_EQ(store_->usage().committed, 1u);
    if (store_->sink() != KvSink::kMemory) return;
    const auto kv = store_->Acquire(kSession);
    ASSERT_TRUE(kv.ok()) << kv.status();
    ExpectBytes(**kv);
  }

 private:
  uint64_t Below(uint64_t limit) { return random_() % limit; }

  PutResult Put(const v1::KvBlock& block, absl::string_view payload) {
    std::vector<absl::string_view> pieces;
    while (!payload.empty()) {
      pieces.push_back(payload.substr(0, 1 + Below(payload.size())));
      payload.remove_prefix(pieces.back().size());
    }
    uint64_t index = 0;
    std::string error;
    return store_->Put(kSession, block, pieces, &index, &error);
  }

  void PutGood(uint64_t index) {
    const CacheBytes& mine = caches_[epoch_];
    const PutResult result = Put(MakeBlock(geometry_, index, mine.Crc(index), epoch_), mine.View(index));
    if (!owner_[index].has_value()) {
      EXPECT_EQ(result, PutResult::kStored);
      owner_[index] = epoch_;
    } else {
      EXPECT_EQ(result, *owner_[index] == epoch_ ? PutResult::kAlreadyStored : PutResult::kRefused);
    }
  }

  void PutDamaged(uint64_t index) {
    std::string bytes(caches_[epoch_].View(index));
    bytes[Below(bytes.size())] ^= static_cast<char>(1 << Below(8));
    const PutResult result = Put(MakeBlock(geometry_, index, caches_[epoch_].Crc(index), epoch_), bytes);
    EXPECT_NE(result, PutResult::kStored);
    if (!owner_[index].has_value()) {
      EXPECT_EQ(result, PutResult::kCorrupt);
    }
  }

  void PutStale(uint64_t index) {
    const uint32_t old = static_cast<uint32_t>(Below(epoch_));
    EXPECT_EQ(Put(MakeBlock(geometry_, index, caches_[old].Crc(index), old), caches_[old].View(index)),
              PutResult::kStaleEpoch);
  }

  void PutMisfit(uint64_t index) {
    v1::KvBlock block = MakeBlock(geometry_, index, caches_[epoch_].Crc(index), epoch_);
    absl::string_view payload = caches_[epoch_].View(index);
    switch (Below(4)) {
      case 0:
        payload.remove_suffix(1 + Below(payload.size()));
        break;
      case 1:
        block.set_token_end(block.token_end() - 1);
        break;
      case 2:
        block.set_layer(block.layer() + 1000);
        break;
      default:
        block.set_epoch(epoch_ + 1);
    }
    EXPECT_EQ(Put(block, payload), PutResult::kRefused);
  }

  KvDigest ExpectedDigest() const {
    KvDigest digest;
    for (uint64_t i = 0; i < owner_.size(); ++i) {
      const uint32_t epoch = owner_[i].value_or(epoch_);
      digest.Add(i, caches_[epoch].BlockBytes(i), caches_[epoch].Crc(i));
    }
    return digest;
  }

  void TryCommit() {
    bool whole = true;
    for (const auto& owner : owner_) whole &= owner.has_value();
    KvDigest wrong = ExpectedDigest();
    wrong.Add(0, 0, 0);
    EXPECT_FALSE(store_->Commit(MakeCommit(geometry_, wrong, epoch_)).ok());
    const auto response = store_->Commit(MakeCommit(geometry_, ExpectedDigest(), epoch_));
    EXPECT_EQ(response.ok(), whole) << response.status();
    committed_ = response.ok();
  }

  void NewEpoch() {
    ++epoch_;
    const uint32_t resume =
        epoch_ == 1 ? 0 : static_cast<uint32_t>(Below(geometry_.layout().num_layers() + 1));
    const auto opened = store_->OpenSession(MakeOpen(geometry_.layout(), epoch_, resume));
    ASSERT_TRUE(opened.ok()) << opened.status();
    for (uint64_t i = 0; i < owner_.size(); ++i) {
      if (geometry_.BlockAt(i).layer >= resume) owner_[i].reset();
    }
    committed_ = false;
  }

  void ExpectBytes(const CommittedKv& kv) const {
    for (uint64_t i = 0; i < owner_.size(); ++i) {
      const KvBlockId id = geometry_.BlockAt(i);
      const char* tensor = static_cast<const char*>(kv.Tensor(id.layer, id.kind));
      const absl::string_view stored(tensor + id.token_begin * geometry_.token_bytes(),
                                     geometry_.BytesOf(id));
      ASSERT_EQ(stored, caches_[*owner_[i]].View(i)) << BlockName(id);
    }
  }

  KvStore* const store_;
  const KvGeometry& geometry_;
  const std::vector<CacheBytes>& caches_;
  std::mt19937 random_;
  std::vector<std::optional<uint32_t>> owner_;
  uint32_t epoch_ = 0;
  bool committed_ = false;
};

class KvStoreProperty : public ::testing::TestWithParam<KvSink> {};
INSTANTIATE_TEST_SUITE_P(Sinks, KvStoreProperty, ::testing::Values(KvSink::kMemory, KvSink::kVerify),
                         SinkName);

TEST_P(KvStoreProperty, NoScheduleCommitsAHoleOrAWrongByte) {
  const TempDir directory(/*in_memory=*/true);
  KvStoreOptions options;
  options.sink = GetParam();
  options.directory = directory.path();
  options.budget_bytes = 1 << 20;
  auto store = KvStore::Open(options);
  ASSERT_TRUE(store.ok()) << store.status();
  for (uint32_t seed = 0; seed < kSchedules && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    const KvGeometry geometry = MakeGeometry(MakeLayout(1 + seed % 3, 1, 4, 1 + seed % 50, 16));
    std::vector<CacheBytes> caches;
    for (uint32_t epoch = 0; epoch < kMostEpochs; ++epoch)
      caches.emplace_back(geometry, seed * kMostEpochs + epoch);
    Schedule(store->get(), geometry, caches, seed).Run();
    (*store)->Release(kSession);
  }
  EXPECT_EQ((*store)->usage().bytes, 0u);
}

}  // namespace
}  // namespace headwater
