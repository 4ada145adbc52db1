// Sender and receiver over loopback gRPC, with everything going wrong that may.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/rpc/grpc_status.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "kvtransfer/frame.h"
#include "tests/integration/chaos_proxy.h"
#include "tests/kvtransfer/kv_fixture.h"
#include "tests/kvtransfer/raw_client.h"
#include "tests/support/dial.h"

namespace headwater {
namespace {

using std::chrono::steady_clock;
using testing::ChaosProxy;

int PortOf(const std::string& address) {
  int port = 0;
  EXPECT_TRUE(absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &port));
  return port;
}

std::string Local(int port) { return "127.0.0.1:" + std::to_string(port); }

// Polls for a state that another thread reaches.
bool Eventually(const std::function<bool()>& condition,
                std::chrono::seconds limit = std::chrono::seconds(20)) {
  const auto end = steady_clock::now() + limit;
  while (!condition()) {
    if (steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

double Seconds(steady_clock::time_point since) {
  return std::chrono::duration<double>(steady_clock::now() - since).count();
}

class KvStreamFaults : public ::testing::Test {
 protected:
  KvStreamFaults() : geometry_(MakeGeometry(MakeLayout(4, 8, 64, 1024, 64))), cache_(geometry_, 3) {
    EXPECT_TRUE(receiver_.store()->OpenSession(MakeOpen(geometry_.layout())).ok());
  }
  // 64 KiB each, 128 of them.
  int num_blocks() const { return static_cast<int>(geometry_.num_blocks()); }

  void SubmitAll(KvSender* sender) {
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
      (void)sender->Submit(geometry_.BlockAt(i), cache_.Block(i), done_.Callback());
    }
  }
  void ExpectWholeCache() {
    const auto commit = receiver_.store()->Commit(MakeCommit(geometry_, cache_.Digest()));
    ASSERT_TRUE(commit.ok()) << commit.status();
    EXPECT_TRUE(cache_.Equals(**receiver_.store()->Acquire(kSession)));
  }
  void ExpectFails(const absl::Status& status, absl::StatusCode code, v1::ErrorReason reason) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(ReasonOf(status), reason) << status;
    EXPECT_TRUE(done_.WaitFor(num_blocks())) << done_.count();
  }

  const KvGeometry geometry_;
  const CacheBytes cache_;
  DoneCounter done_;
  TestReceiver receiver_;
};

TEST_F(KvStreamFaults, ResumesAfterTheReceiverRestartsAndSendsOnlyWhatIsMissing) {
  ChaosProxy proxy(PortOf(receiver_.address()));
  for (const int channels : {1, 3}) {
    SCOPED_TRACE(channels);
    receiver_.store()->Release(kSession);
    ASSERT_TRUE(receiver_.store()->OpenSession(MakeOpen(geometry_.layout())).ok());
    const double stored_before = receiver_.Blocks("stored"), duplicate_before = receiver_.Blocks("duplicate");
    proxy.LimitForwardedBytes(proxy.forwarded_bytes() + geometry_.total_bytes() / 3);
    KvSenderOptions options = MakeSenderOptions(Local(proxy.port()));
    options.num_channels = channels;
    options.max_inflight_bytes = 1 << 20;
    const auto sender = KvSender::Create(options, geometry_);
    SubmitAll(sender.get());
    ASSERT_TRUE(Eventually([&] { return receiver_.Blocks("stored") - stored_before >= num_blocks() / 5; }));

    receiver_.Stop();
    proxy.LimitForwardedBytes(UINT64_MAX);
    receiver_.Start();
    const absl::Status finished = sender->Finish();

    ASSERT_TRUE(finished.ok()) << finished;
    const KvSenderStats stats = sender->Stats();
    EXPECT_GE(stats.stream_resumes, 1u);
    EXPECT_EQ(stats.blocks_acked, geometry_.num_blocks());
    EXPECT_EQ(stats.digest, cache_.Digest());
    // Every block landed once, those whose ACK was lost included.
    EXPECT_EQ(receiver_.Blocks("stored") - stored_before, num_blocks());
    EXPECT_EQ(receiver_.Blocks("duplicate") - duplicate_before, 0);
    EXPECT_LE(stats.blocks_resent, options.max_inflight_bytes / geometry_.BytesOf(geometry_.BlockAt(0)));
    ExpectWholeCache();
  }
}

TEST_F(KvStreamFaults, FindsAFlippedBitAndSendsTheBlockAgain) {
  ChaosProxy proxy(PortOf(receiver_.address()));
  const double corrupt_before = receiver_.Blocks("corrupt");
  uint64_t resent = 0;
  int flips = 0;
  for (int run = 0; run < 10; ++run) {
    receiver_.store()->Release(kSession);
    ASSERT_TRUE(receiver_.store()->OpenSession(MakeOpen(geometry_.layout())).ok());
    proxy.FlipBitInNextPiece(16 << 10);
    const auto sender = KvSender::Create(MakeSenderOptions(Local(proxy.port())), geometry_);
    SubmitAll(sender.get());
    const absl::Status finished = sender->Finish();
    ASSERT_TRUE(finished.ok()) << finished;
    resent += sender->Stats().blocks_resent;
    EXPECT_EQ(sender->Stats().digest, cache_.Digest());
    ExpectWholeCache();
    flips = proxy.flips_done();
  }
  EXPECT_GE(flips, 1);
  EXPECT_GE(resent, 1u);
  EXPECT_GE(receiver_.Blocks("corrupt") - corrupt_before, 1);
}

TEST_F(KvStreamFaults, ASlowReceiverBoundsWhatIsInFlight) {
  ChaosProxy proxy(PortOf(receiver_.address()));
  proxy.LimitForwardedBytes(256 << 10);
  Metrics metrics("test");
  KvSenderOptions options = MakeSenderOptions(Local(proxy.port()));
  options.metrics = &metrics;
  options.max_inflight_bytes = 1 << 20;
  const auto sender = KvSender::Create(options, geometry_);
  SubmitAll(sender.get());
  auto& unacked = metrics.Gauge("headwater_kv_unacked_bytes", "KV payload bytes sent and not acknowledged.");
  ASSERT_TRUE(Eventually([&] { return unacked.Value() == 1 << 20; }));
  for (uint64_t limit = 512 << 10; sender->Stats().blocks_acked < geometry_.num_blocks();
       limit += 256 << 10) {
    proxy.LimitForwardedBytes(limit);
    ASSERT_LT(limit, 4 * geometry_.total_bytes());
    ASSERT_TRUE(Eventually([&] {
      EXPECT_LE(unacked.Value(), 1 << 20);
      return proxy.forwarded_bytes() >= limit || sender->Stats().blocks_acked == geometry_.num_blocks();
    }));
  }
  EXPECT_TRUE(sender->Finish().ok());
  EXPECT_EQ(unacked.Value(), 0);
  ExpectWholeCache();
}

TEST_F(KvStreamFaults, GivesUpOnAReceiverThatDoesNotMove) {
  ChaosProxy proxy(PortOf(receiver_.address()));
  proxy.LimitForwardedBytes(512 << 10);
  KvSenderOptions options = MakeSenderOptions(Local(proxy.port()));
  options.stall_timeout = absl::Seconds(1);
  const auto sender = KvSender::Create(options, geometry_);
  SubmitAll(sender.get());
  const auto start = steady_clock::now();
  ExpectFails(sender->Finish(), absl::StatusCode::kUnavailable, v1::ERROR_REASON_KV_STREAM_STALLED);
  EXPECT_LT(Seconds(start), 10);
  EXPECT_EQ(sender->Submit(geometry_.BlockAt(0), cache_.Block(0), done_.Callback()).code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(KvStreamFaults, GivesUpWhenNobodyListens) {
  receiver_.Stop();
  KvSenderOptions options = MakeSenderOptions(receiver_.address());
  options.stall_timeout = absl::Milliseconds(500);
  const auto sender = KvSender::Create(options, geometry_);
  SubmitAll(sender.get());
  ExpectFails(sender->Finish(), absl::StatusCode::kUnavailable, v1::ERROR_REASON_KV_STREAM_STALLED);
}

TEST_F(KvStreamFaults, CancelsMidStream) {
  for (const uint64_t forwarded : {0, 300'000, 5'000'000}) {
    ChaosProxy proxy(PortOf(receiver_.address()));
    proxy.LimitForwardedBytes(forwarded);
    DoneCounter done;
    auto sender = KvSender::Create(MakeSenderOptions(Local(proxy.port())), geometry_);
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
      (void)sender->Submit(geometry_.BlockAt(i), cache_.Block(i), done.Callback());
    }
    ASSERT_TRUE(Eventually([&] { return proxy.forwarded_bytes() >= forwarded; }));
    const auto start = steady_clock::now();
    std::thread canceller([&] { sender->Cancel(); });
    const absl::Status finished = sender->Finish();
    canceller.join();
    EXPECT_EQ(finished.code(), absl::StatusCode::kCancelled) << finished;
    EXPECT_EQ(sender->Submit(geometry_.BlockAt(0), cache_.Block(0), done.Callback()).code(),
              absl::StatusCode::kCancelled);
    sender.reset();
    EXPECT_EQ(done.count(), num_blocks() + 1);
    EXPECT_LT(Seconds(start), 5);
  }
}

TEST_F(KvStreamFaults, IsDestroyedSafelyAtAnyTime) {
  for (int run = 0; run < 30; ++run) {
    DoneCounter done;
    // Freed with `done`: the sanitizers see any later read.
    std::vector<std::unique_ptr<std::string>> buffers;
    auto sender = KvSender::Create(MakeSenderOptions(receiver_.address()), geometry_);
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
      auto buffer = std::make_shared<std::string>(cache_.View(i));
      const char* data = buffer->data();
      (void)sender->Submit(geometry_.BlockAt(i), data,
                           [buffer = std::move(buffer), count = done.Callback()]() mutable {
                             buffer.reset();
                             count();
                           });
    }
    if (run % 3 > 0) done.WaitFor(run);
    if (run % 2 > 0) sender->Cancel();
    sender.reset();
    EXPECT_EQ(done.count(), num_blocks());
  }
  ExpectWholeCache();
}

// Accepts connections and never reads.
class FrozenPeer {
 public:
  FrozenPeer() : listener_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 16), 0);
    socklen_t size = sizeof(address);
    EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
  }
  ~FrozenPeer() { close(listener_); }
  int port() const { return port_; }

 private:
  const int listener_;
  int port_ = 0;
};

TEST_F(KvStreamFaults, GivesUpOnAPeerThatAcceptsAndSaysNothing) {
  const FrozenPeer peer;
  KvSenderOptions options = MakeSenderOptions(Local(peer.port()));
  options.stall_timeout = absl::Seconds(1);
  auto sender = KvSender::Create(options, geometry_);
  SubmitAll(sender.get());
  ExpectFails(sender->Finish(), absl::StatusCode::kUnavailable, v1::ERROR_REASON_KV_STREAM_STALLED);
  const auto start = steady_clock::now();
  sender.reset();
  EXPECT_LT(Seconds(start), 3);
}

TEST_F(KvStreamFaults, AnOldSenderLearnsThatItsEpochIsOver) {
  const CacheBytes old_cache(geometry_, 99);
  ChaosProxy proxy(PortOf(receiver_.address()));
  proxy.LimitForwardedBytes(geometry_.total_bytes() / 2);
  KvSenderOptions options = MakeSenderOptions(Local(proxy.port()));
  options.max_inflight_bytes = 1 << 20;
  const auto old_sender = KvSender::Create(options, geometry_);
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
    (void)old_sender->Submit(geometry_.BlockAt(i), old_cache.Block(i), done_.Callback());
  }
  ASSERT_TRUE(Eventually([&] { return receiver_.Blocks("stored") >= num_blocks() / 4; }));

  ASSERT_TRUE(receiver_.store()->OpenSession(MakeOpen(geometry_.layout(), 2)).ok());
  DoneCounter done;
  options = MakeSenderOptions(receiver_.address());
  options.epoch = 2;
  const auto new_sender = KvSender::Create(options, geometry_);
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
    ASSERT_TRUE(new_sender->Submit(geometry_.BlockAt(i), cache_.Block(i), done.Callback()).ok());
    if (i == geometry_.num_blocks() / 2) proxy.LimitForwardedBytes(UINT64_MAX);
  }
  const absl::Status finished = new_sender->Finish();
  EXPECT_TRUE(finished.ok()) << finished;
  ExpectFails(old_sender->Finish(), absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH);
  const auto commit = receiver_.store()->Commit(MakeCommit(geometry_, new_sender->Stats().digest, 2));
  ASSERT_TRUE(commit.ok()) << commit.status();
  EXPECT_TRUE(cache_.Equals(**receiver_.store()->Acquire(kSession)));
  // A sender that begins in the old epoch is refused at its hello.
  options.epoch = 1;
  const auto late = KvSender::Create(options, geometry_);
  DoneCounter late_done;
  (void)late->Submit(geometry_.BlockAt(0), cache_.Block(0), late_done.Callback());
  EXPECT_EQ(ReasonOf(late->Finish()), v1::ERROR_REASON_STALE_EPOCH);
}

TEST_F(KvStreamFaults, SaysThatTheReceiverLostTheSession) {
  receiver_.store()->Release(kSession);
  const auto sender = KvSender::Create(MakeSenderOptions(receiver_.address()), geometry_);
  SubmitAll(sender.get());
  ExpectFails(sender->Finish(), absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST);
}

TEST_F(KvStreamFaults, SaysThatTheReceiverLostAnAcknowledgedBlock) {
  const auto sender = KvSender::Create(MakeSenderOptions(receiver_.address()), geometry_);
  for (uint64_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(sender->Submit(geometry_.BlockAt(i), cache_.Block(i), done_.Callback()).ok());
  }
  ASSERT_TRUE(done_.WaitFor(10));
  receiver_.Stop();
  FILE* file = fopen(receiver_.temp_dir().Only(".kv").c_str(), "r+");
  ASSERT_NE(file, nullptr);
  fseek(file, static_cast<int64_t>(geometry_.OffsetOf(geometry_.BlockAt(4))), SEEK_SET);
  fputs("damage", file);
  fclose(file);
  receiver_.Start();
  ASSERT_TRUE(Eventually([&] { return !sender->status().ok(); }));
  const absl::Status status = sender->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_KV_CORRUPT);
  EXPECT_NE(status.message().find(BlockName(geometry_.BlockAt(4))), absl::string_view::npos) << status;
}

TEST_F(KvStreamFaults, SaysThatTheTokenIsWrongAndThatTheGeometryIs) {
  KvSenderOptions options = MakeSenderOptions(receiver_.address());
  options.session_token = "guess";
  const auto sender = KvSender::Create(options, geometry_);
  SubmitAll(sender.get());
  EXPECT_EQ(sender->Finish().code(), absl::StatusCode::kPermissionDenied);

  const KvGeometry other = MakeGeometry(MakeLayout(4, 8, 64, 1000, 64));
  const auto misfit = KvSender::Create(MakeSenderOptions(receiver_.address()), other);
  DoneCounter done;
  const KvBlockId last = other.BlockAt(other.num_blocks() - 1);
  ASSERT_TRUE(misfit->Submit(last, cache_.Block(0), done.Callback()).ok());
  EXPECT_EQ(misfit->Finish().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(done.WaitFor(1));
}

TEST_F(KvStreamFaults, TheReceiverEndsHostileStreams) {
  v1::KvFrameHeader hello;
  *hello.mutable_hello() = MakeHello();
  v1::KvFrameHeader block;
  *block.mutable_block() = MakeBlock(geometry_, 0, cache_.Crc(0));
  const auto payload = [&] { return grpc::Slice(cache_.Block(0), cache_.BlockBytes(0)); };
  DecodedFrame frame;
  {
    RawClient client(receiver_.address());
    const grpc::Slice junk("these are no frames at all");
    client.Write(grpc::ByteBuffer(&junk, 1));
    EXPECT_FALSE(client.Read(&frame));
    EXPECT_EQ(client.End().code(), absl::StatusCode::kDataLoss);
  }
  {
    RawClient client(receiver_.address());
    client.Write(EncodeFrame(block, payload()));
    EXPECT_FALSE(client.Read(&frame));
    EXPECT_EQ(client.End().code(), absl::StatusCode::kInvalidArgument);
  }
  {
    RawClient client(receiver_.address());
    client.Write(EncodeFrame(hello));
    ASSERT_TRUE(client.Read(&frame));
    EXPECT_EQ(frame.header().state().epoch(), 1u);
    client.Write(EncodeFrame(hello));
    EXPECT_FALSE(client.Read(&frame));
    EXPECT_EQ(client.End().code(), absl::StatusCode::kInvalidArgument);
  }
  {
    RawClient client(receiver_.address());
    client.Write(EncodeFrame(hello));
    ASSERT_TRUE(client.Read(&frame));
    client.Write(EncodeFrame(block, payload()));
    ASSERT_TRUE(client.Read(&frame));
    EXPECT_EQ(frame.header().ack().status(), v1::KV_ACK_STATUS_STORED);
    client.Write(EncodeFrame(block));
    ASSERT_TRUE(client.Read(&frame));
    EXPECT_EQ(frame.header().ack().status(), v1::KV_ACK_STATUS_REFUSED);
    EXPECT_FALSE(frame.header().ack().message().empty());
    EXPECT_FALSE(client.Read(&frame));
    EXPECT_EQ(client.End().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(receiver_.Blocks("stored"), 1);
}

TEST_F(KvStreamFaults, TheReceiverDoesNotWaitForAHelloForEver) {
  RawClient client(receiver_.address());
  const auto start = steady_clock::now();
  DecodedFrame frame;
  EXPECT_FALSE(client.Read(&frame));
  EXPECT_EQ(client.End().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_LT(Seconds(start), 20);
  EXPECT_GT(Seconds(start), 5);
}

TEST_F(KvStreamFaults, TheSessionCallsTravelOverTheService) {
  const auto stub = v1::KvTransferService::NewStub(DialPlaintext(receiver_.address()));
  v1::OpenSessionResponse opened;
  {
    grpc::ClientContext context;
    const grpc::Status status = stub->OpenSession(&context, MakeOpen(geometry_.layout()), &opened);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(opened.bytes_reserved(), geometry_.total_bytes());
  }
  {
    grpc::ClientContext context;
    v1::CommitSessionResponse response;
    const absl::Status status =
        FromGrpcStatus(stub->CommitSession(&context, MakeCommit(geometry_, cache_.Digest()), &response));
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_SESSION_NOT_COMMITTED);
  }
  const auto sender = KvSender::Create(MakeSenderOptions(receiver_.address()), geometry_);
  SubmitAll(sender.get());
  ASSERT_TRUE(sender->Finish().ok());
  {
    grpc::ClientContext context;
    v1::CommitSessionResponse response;
    const grpc::Status status =
        stub->CommitSession(&context, MakeCommit(geometry_, sender->Stats().digest), &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.blocks_verified(), geometry_.num_blocks());
  }
  v1::AbortSessionRequest abort;
  abort.set_session_id("unknown");
  grpc::ClientContext context;
  v1::AbortSessionResponse response;
  const grpc::Status status = stub->AbortSession(&context, abort, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.bytes_reclaimed(), 0u);
}

}  // namespace
}  // namespace headwater
