// What a decode node's KV port gets, in any order: sessions opened, blocks, commits, aborts.
#include <set>
#include <string>

#include "base/rpc/grpc_status.h"
#include "fuzz.pb.h"
#include "kvtransfer/store.h"
#include "tests/fuzz/fuzz.h"
#include "tests/kvtransfer/kv_fixture.h"
#include "tests/support/fake_clock.h"

namespace headwater::fuzz {
namespace {

using absl::StatusCode;

constexpr uint64_t kBudget = 64 << 10;
constexpr int kMostSteps = 64;

void CheckSessionRefusal(const absl::Status& status) {
  // A session being made by another call is the one refusal without a reason; nothing here is concurrent.
  ExpectRefusal(status, {StatusCode::kInvalidArgument, StatusCode::kFailedPrecondition, StatusCode::kNotFound,
                         StatusCode::kPermissionDenied, StatusCode::kAborted, StatusCode::kResourceExhausted,
                         StatusCode::kDataLoss});
}

class Node {
 public:
  explicit Node(bool verify_only)
      : geometry_(MakeGeometry(MakeLayout(1, 1, 8, 40, 16))), cache_(geometry_, 1) {
    static const TempDir* const directory = new TempDir(true);
    options_.sink = verify_only ? KvSink::kVerify : KvSink::kMemory;
    options_.directory = verify_only ? "" : directory->path();
    options_.budget_bytes = kBudget;
    options_.max_sessions = 4;
    options_.clock = &clock_;
    auto store = KvStore::Open(options_);
    FUZZ_EXPECT(store.ok(), store.status().ToString().c_str());
    store_ = *std::move(store);
  }

  // Nothing is left behind for the next input.
  ~Node() {
    for (const std::string& id : ids_) store_->Release(id);
    FUZZ_EXPECT(store_->usage().sessions == 0 && store_->usage().bytes == 0,
                "all that was taken is given back");
  }

  void Step(const KvStep& step) {
    switch (step.step_case()) {
      case KvStep::kOpen:
        ids_.insert(step.open().session_id());
        Expect(store_->OpenSession(step.open()).status());
        break;
      case KvStep::kFrame:
        Frame(step.frame(), step.payload(), step.right_crc());
        break;
      case KvStep::kCommit:
        Expect(store_->Commit(step.commit()).status());
        break;
      case KvStep::kGoodCommit:
        Expect(store_->Commit(MakeCommit(geometry_, cache_.Digest(), epoch_)).status());
        break;
      case KvStep::kAbort:
        Expect(store_->Abort(step.abort()).status());
        break;
      case KvStep::kRelease:
        store_->Release(step.release());
        break;
      case KvStep::kAcquire:
        Acquire(step.acquire());
        break;
      case KvStep::kAdvanceS:
        clock_.Advance(absl::Seconds(step.advance_s() % 1000));
        store_->ExpireLeases();
        break;
      case KvStep::kGoodBlock: {
        const uint64_t index = step.good_block() % geometry_.num_blocks();
        Put(MakeBlock(geometry_, index, cache_.Crc(index), epoch_), cache_.View(index));
        break;
      }
      case KvStep::STEP_NOT_SET:
        break;
    }
    FUZZ_EXPECT(store_->usage().bytes <= kBudget, "the budget holds");
    FUZZ_EXPECT(store_->usage().sessions <= options_.max_sessions, "the number of sessions is bounded");
  }

 private:
  void Expect(const absl::Status& status) {
    if (!status.ok()) CheckSessionRefusal(status);
  }

  void Frame(const v1::KvFrameHeader& header, const std::string& payload, bool right_crc) {
    if (header.has_hello()) {
      const auto state = store_->Hello(header.hello(), nullptr);
      Expect(state.status());
      if (state.ok()) {
        session_ = header.hello().session_id();
        epoch_ = header.hello().epoch();
        FUZZ_EXPECT(state->epoch() == epoch_, "a hello of this epoch");
      }
    } else if (header.has_block()) {
      v1::KvBlock block = header.block();
      if (right_crc) block.set_crc32c(Crc32c(payload.data(), payload.size()));
      Put(block, payload);
    }
  }

  void Put(const v1::KvBlock& block, absl::string_view payload) {
    uint64_t index = UINT64_MAX;
    std::string error;
    // In two pieces, as a transport may bring it.
    const absl::string_view front = payload.substr(0, payload.size() / 3);
    const PutResult result =
        store_->Put(session_, block, {front, payload.substr(front.size())}, &index, &error);
    FUZZ_EXPECT(error.size() < 1024, "a message that grows with its input");
    if (result == PutResult::kStored) {
      FUZZ_EXPECT(Crc32c(payload.data(), payload.size()) == block.crc32c(), "only what matches is stored");
    } else if (result == PutResult::kRefused) {
      FUZZ_EXPECT(!error.empty(), "a refusal says why");
    }
  }

  void Acquire(const std::string& id) {
    const auto kv = store_->Acquire(id);
    Expect(kv.status());
    if (!kv.ok()) return;
    const KvGeometry& geometry = (*kv)->geometry();
    FUZZ_EXPECT((*kv)->prompt().size() == geometry.layout().num_tokens(), "a token id for each token");
    uint32_t crc = 0;
    for (uint32_t layer = 0; layer < geometry.layout().num_layers(); ++layer) {
      for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
        crc = ExtendCrc32c(crc, (*kv)->Tensor(layer, kind), geometry.tensor_bytes());
      }
    }
    Consume(crc);
  }

  const KvGeometry geometry_;
  const CacheBytes cache_;
  FakeClock clock_;
  KvStoreOptions options_;
  std::unique_ptr<KvStore> store_;
  std::set<std::string> ids_;
  // Of the stream, after its hello.
  std::string session_ = kSession;
  uint32_t epoch_ = 1;
};

void Run(absl::string_view input) {
  KvSteps steps;
  if (!steps.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  Node node(steps.verify_only());
  for (int i = 0; i < steps.steps_size() && i < kMostSteps; ++i) node.Step(steps.steps(i));
}

std::vector<std::string> Seeds() {
  const KvGeometry geometry = MakeGeometry(MakeLayout(1, 1, 8, 40, 16));
  const CacheBytes cache(geometry, 1);
  KvSteps steps;
  *steps.add_steps()->mutable_open() = MakeOpen(geometry.layout());
  *steps.add_steps()->mutable_frame()->mutable_hello() = MakeHello();
  KvStep* const block = steps.add_steps();
  *block->mutable_frame()->mutable_block() = MakeBlock(geometry, 0, cache.Crc(0));
  block->set_payload(std::string(cache.View(0)));
  for (uint32_t i = 1; i < geometry.num_blocks(); ++i) steps.add_steps()->set_good_block(i);
  *steps.add_steps()->mutable_commit() = MakeCommit(geometry, cache.Digest());
  steps.add_steps()->set_acquire(kSession);
  const std::string kept = steps.SerializeAsString();
  steps.set_verify_only(true);
  steps.add_steps()->set_release(kSession);
  *steps.add_steps()->mutable_open() = MakeOpen(geometry.layout(), 2);
  steps.add_steps()->set_advance_s(400);
  *steps.add_steps()->mutable_open() = MakeOpen(geometry.layout(), 2, 1);
  steps.add_steps()->mutable_abort()->set_session_id(kSession);
  steps.mutable_steps(steps.steps_size() - 1)->mutable_abort()->set_session_token(kToken);
  return {kept, steps.SerializeAsString()};
}

const Registration kTarget({"kv_session", Run, Seeds, Prototype<KvSteps>});

}  // namespace
}  // namespace headwater::fuzz
