#include "kvtransfer/send_ledger.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/kvtransfer/kv_fixture.h"
#include "tests/support/fake_clock.h"

namespace headwater {
namespace {

class SendLedgerTest : public ::testing::Test {
 protected:
  SendLedgerTest() : geometry_(MakeGeometry(MakeLayout(2, 1, 8, 64, 16))), cache_(geometry_, 1) {
    options_ = MakeSenderOptions("nowhere");
    options_.num_channels = 2;
    options_.metrics = &metrics_;
    options_.max_inflight_bytes = 4 * geometry_.BytesOf(geometry_.BlockAt(0));
    options_.stall_timeout = absl::Seconds(30);
    options_.max_corrupt_retries = 2;
    Restart();
  }
  ~SendLedgerTest() override { End(); }

  void Restart() {
    End();
    ledger_ = std::make_unique<SendLedger>(options_, geometry_, &clock_,
                                           [this](bool all) { all ? ++wakes_all_ : ++wakes_; });
    completions_ = std::thread([this] { ledger_->RunCompletions(); });
  }
  void End() {
    if (ledger_ == nullptr) return;
    ledger_->Fail(absl::CancelledError("end of the test"));
    ledger_->Stop();
    completions_.join();
    ledger_.reset();
  }
  absl::Status Submit(uint64_t index) {
    return ledger_->Submit(geometry_.BlockAt(index), cache_.Block(index), done_.Callback());
  }
  void SubmitFirst(uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) ASSERT_TRUE(Submit(i).ok());
  }
  // Takes a block and releases its slice, as a write that is through.
  SendBlock* Send(int channel) {
    SendBlock* block = ledger_->Take(channel);
    if (block == nullptr) return nullptr;
    if (!block->has_crc) ledger_->SetCrc(block, cache_.Crc(block->index));
    ledger_->SliceReleased(block);
    return block;
  }
  absl::Status Ack(int channel, uint64_t index, v1::KvAckStatus status = v1::KV_ACK_STATUS_STORED) {
    v1::KvAck ack;
    ack.set_status(status);
    ack.add_block_indices(index);
    ack.set_message("because");
    return ledger_->Acknowledge(channel, ack);
  }
  v1::KvSessionState State(const std::vector<uint64_t>& stored) {
    v1::KvSessionState state;
    state.set_epoch(1);
    std::string bits((geometry_.num_blocks() + 7) / 8, '\0');
    for (const uint64_t i : stored) bits[i / 8] = static_cast<char>(bits[i / 8] | 1 << (i % 8));
    state.set_stored_blocks(bits);
    return state;
  }
  void ExpectFails(const absl::Status& status, absl::StatusCode code, v1::ErrorReason reason) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(ReasonOf(status), reason) << status;
  }

  const KvGeometry geometry_;
  const CacheBytes cache_;
  FakeClock clock_;
  Metrics metrics_{"test"};
  KvSenderOptions options_;
  DoneCounter done_;
  std::atomic<int> wakes_{0};
  std::atomic<int> wakes_all_{0};
  std::unique_ptr<SendLedger> ledger_;
  std::thread completions_;
};

TEST_F(SendLedgerTest, SendsInOrderWithinTheWindow) {
  SubmitFirst(8);
  EXPECT_EQ(wakes_, 8);
  for (uint64_t i = 0; i < 4; ++i) EXPECT_EQ(Send(static_cast<int>(i % 2))->index, i);
  EXPECT_EQ(Send(0), nullptr);
  ASSERT_TRUE(Ack(1, 1).ok());
  EXPECT_EQ(Send(0)->index, 4u);
  EXPECT_EQ(Send(1), nullptr);
  EXPECT_EQ(
      metrics_.Gauge("headwater_kv_unacked_bytes", "KV payload bytes sent and not acknowledged.").Value(),
      static_cast<double>(options_.max_inflight_bytes));
}

TEST_F(SendLedgerTest, ABlockLargerThanTheWindowGoesAlone) {
  options_.max_inflight_bytes = 1;
  Restart();
  SubmitFirst(2);
  EXPECT_NE(Send(0), nullptr);
  EXPECT_EQ(Send(0), nullptr);
  ASSERT_TRUE(Ack(0, 0).ok());
  EXPECT_NE(Send(0), nullptr);
}

TEST_F(SendLedgerTest, DoneWaitsForTheAckAndForTheLastSlice) {
  SubmitFirst(2);
  SendBlock* first = ledger_->Take(0);
  Send(0);
  ASSERT_TRUE(Ack(0, 0).ok());
  ASSERT_TRUE(Ack(0, 1).ok());
  // Block 1 was through; block 0's memory is still in use.
  ASSERT_TRUE(done_.WaitFor(1));
  EXPECT_EQ(done_.count(), 1);
  ledger_->SliceReleased(first);
  ASSERT_TRUE(done_.WaitFor(2));
  EXPECT_TRUE(ledger_->Finish().ok());
  EXPECT_EQ(wakes_all_, 1);
}

TEST_F(SendLedgerTest, DoneRunsOnceForEachBlockWhenTheSenderFails) {
  SubmitFirst(6);
  SendBlock* in_use = ledger_->Take(0);
  Send(1);
  ledger_->Fail(absl::InternalError("first"));
  ledger_->Fail(absl::InternalError("second"));
  EXPECT_EQ(ledger_->status().message(), "first");
  ASSERT_TRUE(done_.WaitFor(5));
  EXPECT_EQ(done_.count(), 5);
  EXPECT_EQ(Submit(7).message(), "first");
  ASSERT_TRUE(done_.WaitFor(6));
  ledger_->SliceReleased(in_use);
  ASSERT_TRUE(done_.WaitFor(7));
  EXPECT_EQ(Send(0), nullptr);
  EXPECT_EQ(ledger_->Finish().message(), "first");
  EXPECT_FALSE(ledger_->running());
  EXPECT_EQ(
      metrics_.Gauge("headwater_kv_unacked_bytes", "KV payload bytes sent and not acknowledged.").Value(),
      0.0);
}

TEST_F(SendLedgerTest, RefusesBlocksThatMakeNoSense) {
  SubmitFirst(1);
  EXPECT_EQ(Submit(0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ledger_->Submit({0, KvKind::kK, 1, 2}, cache_.Block(0), done_.Callback()).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(done_.WaitFor(2));
  Send(0);
  ASSERT_TRUE(Ack(0, 0).ok());
  ASSERT_TRUE(ledger_->Finish().ok());
  EXPECT_EQ(Submit(1).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(done_.WaitFor(4));
  EXPECT_EQ(ledger_->Stats().blocks_acked, 1u);
}

TEST_F(SendLedgerTest, ResendsACorruptBlockABoundedNumberOfTimes) {
  SubmitFirst(3);
  for (int i = 0; i < 3; ++i) Send(0);
  ASSERT_TRUE(Ack(0, 1, v1::KV_ACK_STATUS_CORRUPT).ok());
  EXPECT_EQ(Send(1)->index, 1u);
  ASSERT_TRUE(Ack(1, 1, v1::KV_ACK_STATUS_CORRUPT).ok());
  EXPECT_EQ(Send(0)->index, 1u);
  EXPECT_EQ(ledger_->Stats().blocks_resent, 2u);
  const absl::Status status = Ack(0, 1, v1::KV_ACK_STATUS_CORRUPT);
  ExpectFails(status, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT);
  EXPECT_NE(status.message().find("layer 0 K tokens [16, 32)"), absl::string_view::npos) << status;
  // Each block counts once in the digest, however often it was sent.
  KvDigest digest;
  for (uint64_t i = 0; i < 3; ++i) digest.Add(i, cache_.BlockBytes(i), cache_.Crc(i));
  EXPECT_EQ(ledger_->Stats().digest, digest);
}

TEST_F(SendLedgerTest, TellsTheEndsThatAreNotItsOwn) {
  SubmitFirst(2);
  Send(0);
  ExpectFails(Ack(0, 0, v1::KV_ACK_STATUS_STALE_EPOCH), absl::StatusCode::kAborted,
              v1::ERROR_REASON_STALE_EPOCH);
  ExpectFails(Ack(0, 0, v1::KV_ACK_STATUS_REFUSED), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
  ExpectFails(Ack(0, 0, v1::KV_ACK_STATUS_UNSPECIFIED), absl::StatusCode::kInternal,
              v1::ERROR_REASON_INTERNAL);
  // Not sent yet, sent on another stream, far outside, acknowledged twice.
  ExpectFails(Ack(0, 1), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
  ExpectFails(Ack(1, 0), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
  ExpectFails(Ack(0, UINT64_MAX), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
  ASSERT_TRUE(Ack(0, 0).ok());
  ExpectFails(Ack(0, 0), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
}

TEST_F(SendLedgerTest, ResendsAfterALossOnlyWhatTheReceiverLacks) {
  SubmitFirst(4);
  ledger_->HelloSent(0);
  ASSERT_TRUE(ledger_->Resume(0, State({})).ok());
  for (int i = 0; i < 3; ++i) Send(0);
  Send(1);
  ASSERT_TRUE(Ack(0, 0).ok());
  ledger_->StreamLost(0);
  // Until the receiver has said what it has, nothing is sent twice.
  EXPECT_EQ(Send(1), nullptr);
  ledger_->HelloSent(0);
  ASSERT_TRUE(ledger_->Resume(0, State({0, 2})).ok());
  EXPECT_EQ(Send(0)->index, 1u);
  EXPECT_EQ(Send(0), nullptr);
  ASSERT_TRUE(Ack(0, 1).ok());
  ASSERT_TRUE(Ack(1, 3).ok());
  EXPECT_TRUE(ledger_->Finish().ok());
  const KvSenderStats stats = ledger_->Stats();
  EXPECT_EQ(stats.blocks_acked, 4u);
  EXPECT_EQ(stats.blocks_resent, 1u);
  EXPECT_EQ(stats.stream_resumes, 1u);
  EXPECT_EQ(stats.bytes_acked, stats.bytes_submitted);
}

TEST_F(SendLedgerTest, FailsWhenTheReceiverHasLostAnAcknowledgedBlock) {
  SubmitFirst(2);
  Send(0);
  Send(0);
  ASSERT_TRUE(Ack(0, 0).ok());
  ledger_->StreamLost(0);
  ledger_->HelloSent(0);
  // Acknowledged after the hello: the answer need not have it.
  Send(1);
  const absl::Status status = ledger_->Resume(0, State({1}));
  ExpectFails(status, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT);
  EXPECT_NE(status.message().find("layer 0 K tokens [0, 16)"), absl::string_view::npos) << status;
}

TEST_F(SendLedgerTest, OnlyWhatWasAckedBeforeTheHelloMustBeInTheAnswer) {
  SubmitFirst(2);
  Send(1);
  ledger_->HelloSent(0);
  ASSERT_TRUE(Ack(1, 0).ok());
  EXPECT_TRUE(ledger_->Resume(0, State({})).ok());
}

TEST_F(SendLedgerTest, RefusesAStateOfAnotherShape) {
  v1::KvSessionState state = State({});
  state.set_epoch(2);
  ledger_->HelloSent(0);
  ExpectFails(ledger_->Resume(0, state), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
  state = State({});
  state.set_stored_blocks("x");
  ExpectFails(ledger_->Resume(0, state), absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL);
  state.clear_stored_blocks();
  EXPECT_TRUE(ledger_->Resume(0, state).ok());
}

TEST_F(SendLedgerTest, TellsWhatIsAcknowledgedBelowALayer) {
  const uint64_t layer = 2 * geometry_.blocks_per_tensor();  // blocks of one
  const uint64_t last = layer - 1;
  KvDigest digest;
  uint64_t bytes = 0;
  for (uint64_t i = 0; i < layer; ++i) {
    ASSERT_TRUE(Submit(i).ok());
    ASSERT_NE(Send(0), nullptr);
    digest.Add(i, geometry_.BytesOf(geometry_.BlockAt(i)), cache_.Crc(i));
    bytes += geometry_.BytesOf(geometry_.BlockAt(i));
    if (i == last) continue;
    ASSERT_TRUE(Ack(0, i).ok());
  }
  EXPECT_EQ(ledger_->AckedBelow(0)->blocks, 0u);
  EXPECT_FALSE(ledger_->AckedBelow(1).has_value());
  ASSERT_TRUE(Ack(0, last, v1::KV_ACK_STATUS_CORRUPT).ok());
  EXPECT_FALSE(ledger_->AckedBelow(1).has_value());
  ASSERT_NE(Send(0), nullptr);
  ASSERT_TRUE(Ack(0, last).ok());
  ASSERT_TRUE(Submit(layer).ok());
  const std::optional<KvShare> share = ledger_->AckedBelow(1);
  ASSERT_TRUE(share.has_value());
  EXPECT_EQ(share->digest, digest);
  EXPECT_EQ(share->bytes, bytes);
  EXPECT_EQ(share->blocks, layer);
  EXPECT_FALSE(ledger_->AckedBelow(2).has_value());
}

TEST_F(SendLedgerTest, StallsOnlyWhileBlocksWait) {
  clock_.Advance(absl::Seconds(1000));
  SubmitFirst(2);
  Send(0);
  clock_.Advance(absl::Seconds(29));
  ASSERT_TRUE(Ack(0, 0).ok());
  clock_.Advance(absl::Seconds(29));
  EXPECT_TRUE(ledger_->status().ok());
  clock_.Advance(absl::Seconds(2));
  ASSERT_TRUE(done_.WaitFor(2));
  ExpectFails(ledger_->status(), absl::StatusCode::kUnavailable, v1::ERROR_REASON_KV_STREAM_STALLED);
  EXPECT_EQ(wakes_all_, 1);
}

}  // namespace
}  // namespace headwater
