// A sender that speaks frames by hand.
#ifndef HW_TESTS_KVTRANSFER_RAW_CLIENT_H_
#define HW_TESTS_KVTRANSFER_RAW_CLIENT_H_

#include <chrono>
#include <memory>
#include <string>

#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "kvtransfer/frame.h"
#include "tests/support/dial.h"

namespace headwater {

class RawClient {
 public:
  explicit RawClient(const std::string& address) : stub_(DialPlaintext(address)) {
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    call_ = stub_.PrepareCall(&context_, kPushBlocksMethod, &queue_);
    call_->StartCall(nullptr);
    EXPECT_TRUE(Next());
  }
  ~RawClient() {
    context_.TryCancel();
    if (!ended_) (void)End();
    queue_.Shutdown();
    Next();
  }
  bool Write(const grpc::ByteBuffer& message) {
    call_->Write(message, nullptr);
    return Next();
  }
  bool Read(DecodedFrame* frame) {
    grpc::ByteBuffer message;
    call_->Read(&message, nullptr);
    return Next() && frame->Decode(message, kMaxServerHeaderBytes).ok();
  }
  // Says that this was all, and reads what the receiver has to say until it ends.
  absl::Status EndAfterAll() {
    call_->WritesDone(nullptr);
    Next();
    for (;;) {
      DecodedFrame frame;
      if (!Read(&frame)) return End();
    }
  }
  absl::Status End() {
    ended_ = true;
    grpc::Status status;
    call_->Finish(&status, nullptr);
    EXPECT_TRUE(Next());
    return FromGrpcStatus(status);
  }

 private:
  bool Next() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }
  grpc::GenericStub stub_;
  grpc::CompletionQueue queue_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool ended_ = false;
};

}  // namespace headwater

#endif  // HW_TESTS_KVTRANSFER_RAW_CLIENT_H_
