// Bad sessions, commits and frames, sent to a live KV receiver.
#include <string>

#include "gtest/gtest.h"
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include "base/rpc/grpc_status.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "kvtransfer/frame.h"
#include "tests/badinputs/cases.h"
#include "tests/kvtransfer/kv_fixture.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

class KvWireTest : public ::testing::Test {
 protected:
  KvWireTest() : layout_(MakeLayout(2, 2, 8, 40, 16)) {
    stub_ = v1::KvTransferService::NewStub(DialPlaintext(receiver_.address()));
    EXPECT_TRUE(Open(MakeOpen(layout_)).ok());
  }
  void TearDown() override { EXPECT_TRUE(Open(MakeOpen(layout_)).ok()) << "the receiver no longer lives"; }

  static void Limit(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  }
  absl::Status Open(const v1::OpenSessionRequest& request) {
    grpc::ClientContext context;
    Limit(&context);
    v1::OpenSessionResponse response;
    return FromGrpcStatus(stub_->OpenSession(&context, request, &response));
  }
  absl::Status Commit(const v1::CommitSessionRequest& request) {
    grpc::ClientContext context;
    Limit(&context);
    v1::CommitSessionResponse response;
    return FromGrpcStatus(stub_->CommitSession(&context, request, &response));
  }

  static grpc::ByteBuffer Raw(const std::string& bytes) {
    const grpc::Slice slice(bytes);
    return grpc::ByteBuffer(&slice, 1);
  }
  static grpc::ByteBuffer Hello() {
    v1::KvFrameHeader header;
    *header.mutable_hello() = MakeHello();
    return EncodeFrame(header);
  }
  static std::string Bytes(const grpc::ByteBuffer& buffer) {
    grpc::Slice slice;
    EXPECT_TRUE(buffer.DumpToSingleSlice(&slice).ok());
    return std::string(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }

  // How a stream of these messages ends.
  absl::Status Push(const std::vector<grpc::ByteBuffer>& messages) {
    grpc::GenericStub stub(DialPlaintext(receiver_.address()));
    grpc::ClientContext context;
    Limit(&context);
    grpc::CompletionQueue queue;
    const auto stream = stub.PrepareCall(&context, kPushBlocksMethod, &queue);
    const auto wait = [&queue] {
      void* tag = nullptr;
      bool ok = false;
      return queue.Next(&tag, &ok) && ok;
    };
    stream->StartCall(nullptr);
    wait();
    for (const grpc::ByteBuffer& message : messages) {
      stream->Write(message, nullptr);
      if (!wait()) break;
    }
    stream->WritesDone(nullptr);
    wait();
    grpc::ByteBuffer answer;
    do {
      stream->Read(&answer, nullptr);
    } while (wait());
    grpc::Status status;
    stream->Finish(&status, nullptr);
    wait();
    return FromGrpcStatus(status);
  }

  const v1::KvLayout layout_;
  TestReceiver receiver_;
  std::unique_ptr<v1::KvTransferService::Stub> stub_;
};

TEST_F(KvWireTest, RefusesBadSessions) {
  ExpectRefusals(kOpenSessionCases, [this](const BadInput& bad) {
    v1::OpenSessionRequest request = MakeOpen(layout_);
    request.set_session_id("fresh");
    Override(bad.text, &request);
    return Open(request);
  });
}

TEST_F(KvWireTest, RefusesBadCommits) {
  const KvGeometry geometry = MakeGeometry(layout_);
  ExpectRefusals(kCommitSessionCases, [&](const BadInput& bad) {
    v1::CommitSessionRequest request = MakeCommit(geometry, KvDigest());
    Override(bad.text, &request);
    return Commit(request);
  });
}

TEST_F(KvWireTest, RefusesBadFrames) {
  const std::string good = Bytes(Hello());
  const auto with = [&good](size_t at, char byte) {
    std::string bytes = good;
    bytes[at] = byte;
    return Raw(bytes);
  };
  v1::KvFrameHeader ack, state, block;
  ack.mutable_ack();
  state.mutable_state();
  *block.mutable_block() = MakeBlock(MakeGeometry(layout_), 0, 0);
  const struct {
    const char* name;
    std::vector<grpc::ByteBuffer> messages;
    absl::StatusCode code;
    v1::ErrorReason reason;
  } cases[] = {
      {"empty", {Raw("")}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"15 bytes", {Raw(good.substr(0, 15))}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"cut", {Raw(good.substr(0, 20))}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"magic", {with(0, 'X')}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"version", {with(4, '\x02')}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"reserved", {with(6, '\x01')}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"header 2^31", {with(11, '\x80')}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"header 0", {with(8, '\0')}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"checksum", {with(12, 'c')}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"no frame", {EncodeFrame({})}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"payload of a hello", {Raw(good + "x")}, absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT},
      {"ack first", {EncodeFrame(ack)}, absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD},
      {"state first", {EncodeFrame(state)}, absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD},
      {"block first", {EncodeFrame(block)}, absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD},
      {"two hellos", {Hello(), Hello()}, absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD},
      {"ack after hello",
       {Hello(), EncodeFrame(ack)},
       absl::StatusCode::kInvalidArgument,
       v1::ERROR_REASON_BAD_FIELD},
  };
  for (const auto& bad : cases) {
    const absl::Status status = Push(bad.messages);
    EXPECT_EQ(status.code(), bad.code) << bad.name << ": " << status;
    EXPECT_EQ(ReasonOf(status), bad.reason) << bad.name << ": " << status;
  }
}

TEST_F(KvWireTest, RefusesBadHellosAndBlocks) {
  const KvGeometry geometry = MakeGeometry(layout_);
  const CacheBytes cache(geometry, 1);
  const auto hello = [](const char* text) {
    v1::KvFrameHeader header;
    *header.mutable_hello() = MakeHello();
    Override(text, header.mutable_hello());
    return EncodeFrame(header);
  };
  const auto block = [&](const char* text, size_t payload = SIZE_MAX) {
    v1::KvFrameHeader header;
    *header.mutable_block() = MakeBlock(geometry, 0, cache.Crc(0));
    Override(text, header.mutable_block());
    const absl::string_view bytes = cache.View(0).substr(0, payload);
    return EncodeFrame(header, grpc::Slice(bytes.data(), bytes.size()));
  };
  const struct {
    const char* name;
    std::vector<grpc::ByteBuffer> messages;
    absl::StatusCode code;
  } cases[] = {
      {"unknown session", {hello("session_id: 'nobody'")}, absl::StatusCode::kNotFound},
      {"empty session", {hello("session_id: ''")}, absl::StatusCode::kNotFound},
      {"wrong token", {hello("session_token: 'guess'")}, absl::StatusCode::kPermissionDenied},
      {"stale epoch", {hello("epoch: 0")}, absl::StatusCode::kAborted},
      {"future epoch", {hello("epoch: 4294967295")}, absl::StatusCode::kFailedPrecondition},
      {"block's epoch", {Hello(), block("epoch: 2")}, absl::StatusCode::kInvalidArgument},
      {"layer 2", {Hello(), block("layer: 2")}, absl::StatusCode::kInvalidArgument},
      {"layer 2^32 - 1", {Hello(), block("layer: 4294967295")}, absl::StatusCode::kInvalidArgument},
      {"no kind", {Hello(), block("kind: KV_KIND_UNSPECIFIED")}, absl::StatusCode::kInvalidArgument},
      {"kind 9", {Hello(), block("kind: 9")}, absl::StatusCode::kInvalidArgument},
      {"heads", {Hello(), block("head_end: 1")}, absl::StatusCode::kInvalidArgument},
      {"heads 2^31", {Hello(), block("head_begin: 2147483648")}, absl::StatusCode::kInvalidArgument},
      {"tokens", {Hello(), block("token_begin: 1")}, absl::StatusCode::kInvalidArgument},
      {"tokens 2^63",
       {Hello(), block("token_begin: 9223372036854775808")},
       absl::StatusCode::kInvalidArgument},
      {"tokens 2^64 - 1",
       {Hello(), block("token_end: 18446744073709551615")},
       absl::StatusCode::kInvalidArgument},
      {"tokens reversed",
       {Hello(), block("token_begin: 16 token_end: 0")},
       absl::StatusCode::kInvalidArgument},
      {"short payload", {Hello(), block("", 8)}, absl::StatusCode::kInvalidArgument},
      {"no payload", {Hello(), block("", 0)}, absl::StatusCode::kInvalidArgument},
  };
  for (const auto& bad : cases) {
    const absl::Status status = Push(bad.messages);
    EXPECT_EQ(status.code(), bad.code) << bad.name << ": " << status;
    EXPECT_NE(ReasonOf(status), v1::ERROR_REASON_UNSPECIFIED) << bad.name << ": " << status;
  }
}

}  // namespace
}  // namespace headwater::testing
