// What a KV stream tells its receiver of the trace that it belongs to.
#include <map>
#include <memory>
#include <string>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_builder.h>

#include "kvtransfer/sender.h"
#include "tests/kvtransfer/kv_fixture.h"

namespace headwater {
namespace {

// Keeps the metadata of the first call, and refuses every one.
class MetadataKeeper final : public grpc::CallbackGenericService {
 public:
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* context) override {
    class Refusal final : public grpc::ServerGenericBidiReactor {
     public:
      Refusal() { Finish({grpc::StatusCode::UNAVAILABLE, "only looking"}); }
      void OnDone() override { delete this; }
    };
    {
      const absl::MutexLock lock(&mutex_);
      for (const auto& [name, value] : context->client_metadata()) {
        metadata_.emplace(std::string(name.data(), name.size()), std::string(value.data(), value.size()));
      }
    }
    return new Refusal();
  }

  // Waits for a call.
  std::map<std::string, std::string> Get() {
    const absl::MutexLock lock(&mutex_);
    const auto called = [this] { return !metadata_.empty(); };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&called), absl::Seconds(10)));
    return metadata_;
  }

 private:
  absl::Mutex mutex_;
  std::map<std::string, std::string> metadata_ ABSL_GUARDED_BY(mutex_);
};

std::map<std::string, std::string> MetadataOf(KvSenderOptions options) {
  MetadataKeeper keeper;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&keeper);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  options.address = "127.0.0.1:" + std::to_string(port);
  options.session_id = kSession;
  options.session_token = kToken;
  options.epoch = 1;
  options.num_channels = 1;
  const std::unique_ptr<KvSender> sender =
      KvSender::Create(options, MakeGeometry(MakeLayout(2, 2, 16, 100, 64)));
  const auto metadata = keeper.Get();
  sender->Cancel();
  server->Shutdown(std::chrono::system_clock::now());
  return metadata;
}

TEST(SenderTraceTest, StreamsCarryTheTraceTheyBelongTo) {
  KvSenderOptions options;
  options.traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  options.tracestate = "vendor=1";
  const auto metadata = MetadataOf(options);
  ASSERT_EQ(metadata.count("traceparent"), 1u);
  EXPECT_EQ(metadata.at("traceparent"), options.traceparent);
  EXPECT_EQ(metadata.at("tracestate"), "vendor=1");
}

TEST(SenderTraceTest, WithoutATraceThereIsNone) {
  const auto metadata = MetadataOf({});
  EXPECT_EQ(metadata.count("traceparent"), 0u);
  EXPECT_EQ(metadata.count("tracestate"), 0u);
}

}  // namespace
}  // namespace headwater
