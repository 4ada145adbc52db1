// The whole node in this process: registration, a KV stream from a real sender, generation, metrics, drain.
#include "decode/node.h"

#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "kvtransfer/sender.h"
#include "tests/decode/decode_fixture.h"
#include "tests/decode/fake_coordinator.h"
#include "tests/support/dial.h"

namespace headwater::testing {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

class DecodeNodeTest : public ::testing::Test {
 protected:
  DecodeOptions MakeOptions() {
    DecodeOptions options;
    options.coordinator = coordinator_.address();
    options.decode_node = "d0";
    options.pool = "p";
    options.listen = "127.0.0.1:0";
    options.metrics = "";
    options.model = files_.directory();
    options.compute = "f32";
    options.threads = 1;
    options.kv_dir = kv_dir_.path();
    options.kv_budget_bytes = 64 << 20;
    return options;
  }

  // What coordinator and worker do: opens the session, sends the cache over the wire, commits it.
  void SendCache(const std::string& address, const Model& model, const PrefilledPrompt& prompt) {
    const auto kv = v1::KvTransferService::NewStub(DialPlaintext(address));
    v1::OpenSessionRequest open;
    open.set_session_id("s");
    open.set_request_id("r");
    open.set_epoch(1);
    open.set_session_token("secret-of-the-session");
    v1::KvLayout& layout = *open.mutable_layout();
    layout.set_num_layers(static_cast<uint32_t>(model.config().num_layers));
    layout.set_num_kv_heads(static_cast<uint32_t>(model.config().num_kv_heads));
    layout.set_head_dim(static_cast<uint32_t>(model.config().head_dim));
    layout.set_num_tokens(prompt.tokens.size());
    layout.set_block_tokens(16);
    layout.set_dtype(v1::KV_DTYPE_F32);
    layout.set_model_fingerprint(model.fingerprint());
    {
      grpc::ClientContext context;
      v1::OpenSessionResponse response;
      const absl::Status status = FromGrpcStatus(kv->OpenSession(&context, open, &response));
      ASSERT_TRUE(status.ok()) << status;
    }
    const KvGeometry geometry = *KvGeometry::Create(layout);
    KvSenderOptions options;
    options.address = address;
    options.session_id = open.session_id();
    options.session_token = open.session_token();
    options.request_id = open.request_id();
    options.epoch = 1;
    const auto sender = KvSender::Create(options, geometry);
    for (uint64_t index = 0; index < geometry.num_blocks(); ++index) {
      const KvBlockId id = geometry.BlockAt(index);
      const auto& tensor = id.kind == KvKind::kK ? prompt.k[id.layer] : prompt.v[id.layer];
      const float* const data = tensor.data() + id.token_begin * geometry.token_bytes() / sizeof(float);
      ASSERT_TRUE(sender->Submit(id, data, [] {}).ok());
    }
    ASSERT_TRUE(sender->Finish().ok()) << sender->status();
    v1::CommitSessionRequest commit;
    commit.set_session_id(open.session_id());
    commit.set_session_token(open.session_token());
    commit.set_epoch(1);
    commit.set_kv_digest(sender->Stats().digest.Bytes());
    commit.set_first_token(static_cast<uint32_t>(prompt.first_token));
    for (const int32_t token : prompt.tokens) commit.add_token_ids(static_cast<uint32_t>(token));
    grpc::ClientContext context;
    v1::CommitSessionResponse response;
    const absl::Status status = FromGrpcStatus(kv->CommitSession(&context, commit, &response));
    ASSERT_TRUE(status.ok()) << status;
  }

  absl::StatusOr<std::vector<int32_t>> TryGenerate(const std::string& address, uint32_t count) {
    const auto stub = v1::DecodeService::NewStub(DialPlaintext(address));
    grpc::ClientContext context;
    v1::GenerateRequest request;
    request.set_session_id("s");
    request.set_max_new_tokens(count);
    const auto reader = stub->Generate(&context, request);
    std::vector<int32_t> ids;
    v1::GenerateResponse token;
    while (reader->Read(&token)) ids.push_back(static_cast<int32_t>(token.token_id()));
    const absl::Status status = FromGrpcStatus(reader->Finish());
    if (!status.ok()) return status;
    return ids;
  }
  std::vector<int32_t> Generate(const std::string& address, uint32_t count) {
    const auto ids = TryGenerate(address, count);
    EXPECT_TRUE(ids.ok()) << ids.status();
    return ids.value_or(std::vector<int32_t>());
  }

  FakeCoordinator coordinator_;
  TinyModelFiles files_;
  TempDir kv_dir_;
};

TEST_F(DecodeNodeTest, RegistersWithWhatOthersNeedToKnow) {
  DecodeOptions options = MakeOptions();
  options.advertise_kv = "proxy:1";
  const auto node = DecodeNode::Start(options);
  ASSERT_TRUE(node.ok()) << node.status();

  ASSERT_TRUE(coordinator_.WaitForRegistrations(1));

  const v1::DecodeRegistration registration = coordinator_.registrations()[0];
  EXPECT_EQ(registration.decode_node(), "d0");
  EXPECT_EQ(registration.pool(), "p");
  EXPECT_EQ(registration.kv_address(), "proxy:1");
  EXPECT_EQ(registration.decode_address(), (*node)->address());
  EXPECT_EQ(registration.model_fingerprint().size(), 16u);
  EXPECT_EQ(registration.max_position(), 2048u);
  EXPECT_EQ(registration.kv_budget_bytes(), (64u << 20) / 8 * 7);
  EXPECT_EQ(registration.kv_dtypes_size(), 3);
  EXPECT_EQ(registration.protocol_version(), 1u);
  EXPECT_FALSE(registration.incarnation().empty());
}

TEST_F(DecodeNodeTest, GeneratesFromAStreamedCacheAlsoAfterARestart) {
  const auto model = LoadModel(files_.directory());
  const PrefilledPrompt prompt = Prefill(*model, RandomPrompt(*model, 50, 3));
  std::vector<int32_t> expected;
  for (const auto& token : ContinueFromScratch(*model, prompt.tokens, 6)) expected.push_back(token.token);
  auto node = DecodeNode::Start(MakeOptions());
  ASSERT_TRUE(node.ok()) << node.status();
  ASSERT_NO_FATAL_FAILURE(SendCache((*node)->address(), *model, prompt));

  EXPECT_THAT(Generate((*node)->address(), 6), ElementsAreArray(expected));
  EXPECT_TRUE((*node)->Drain(absl::Seconds(10)));
  *node = nullptr;
  node = DecodeNode::Start(MakeOptions());
  ASSERT_TRUE(node.ok()) << node.status();

  EXPECT_THAT(Generate((*node)->address(), 6), ElementsAreArray(expected))
      << "the committed cache survives; generation starts anew";
}

TEST_F(DecodeNodeTest, AVerifyingNodeChecksTheCacheAndRefusesToGenerate) {
  const auto model = LoadModel(files_.directory());
  DecodeOptions options = MakeOptions();
  options.sink = "verify";
  // Far less than the cache.
  options.kv_budget_bytes = 20'000;
  const PrefilledPrompt prompt = Prefill(*model, RandomPrompt(*model, 500, 3));
  const auto node = DecodeNode::Start(options);
  ASSERT_TRUE(node.ok()) << node.status();

  ASSERT_NO_FATAL_FAILURE(SendCache((*node)->address(), *model, prompt));

  const absl::Status refused = TryGenerate((*node)->address(), 1).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("--sink=verify"));
  EXPECT_TRUE(std::filesystem::is_empty(kv_dir_.path()));
  ASSERT_TRUE(coordinator_.WaitForRegistrations(1));
  EXPECT_EQ(coordinator_.registrations()[0].kv_budget_bytes(), kMaxCacheBytes);
  ASSERT_TRUE(coordinator_.WaitForHeartbeats(coordinator_.heartbeats().size() + 2));
  const v1::DecodeHeartbeat heartbeat = coordinator_.heartbeats().back();
  EXPECT_EQ(heartbeat.sessions(), 1u);
  EXPECT_GT(heartbeat.kv_bytes_used(), 0u);
  EXPECT_LE(heartbeat.kv_bytes_used(), options.kv_budget_bytes);
}

TEST_F(DecodeNodeTest, NamesWhatItCannotUse) {
  const auto first = DecodeNode::Start(MakeOptions());
  ASSERT_TRUE(first.ok()) << first.status();
  DecodeOptions locked = MakeOptions();
  DecodeOptions no_model = MakeOptions();
  no_model.model = "/no/such/model";
  DecodeOptions no_directory = MakeOptions();
  no_directory.kv_dir = "/proc/no/such/folder";
  TempDir other_dir;
  DecodeOptions taken = MakeOptions();
  taken.kv_dir = other_dir.path();
  taken.listen = (*first)->address();

  EXPECT_THAT(std::string(DecodeNode::Start(locked).status().message()), HasSubstr(kv_dir_.path()));
  EXPECT_THAT(std::string(DecodeNode::Start(no_model).status().message()), HasSubstr("/no/such/model"));
  EXPECT_THAT(std::string(DecodeNode::Start(no_directory).status().message()),
              HasSubstr("/proc/no/such/folder"));
  EXPECT_THAT(std::string(DecodeNode::Start(taken).status().message()), HasSubstr((*first)->address()));
}

TEST_F(DecodeNodeTest, EndsInTimeWhileAGenerationRuns) {
  const auto model = LoadModel(files_.directory());
  auto node = DecodeNode::Start(MakeOptions());
  ASSERT_TRUE(node.ok()) << node.status();
  ASSERT_NO_FATAL_FAILURE(
      SendCache((*node)->address(), *model, Prefill(*model, RandomPrompt(*model, 50, 3))));
  const auto stub = v1::DecodeService::NewStub(DialPlaintext((*node)->address()));
  grpc::ClientContext context;
  v1::GenerateRequest request;
  request.set_session_id("s");
  request.set_max_new_tokens(65536);
  const auto reader = stub->Generate(&context, request);
  v1::GenerateResponse token;
  ASSERT_TRUE(reader->Read(&token));

  EXPECT_FALSE((*node)->Drain(absl::ZeroDuration()));
  const auto start = std::chrono::steady_clock::now();
  *node = nullptr;

  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

}  // namespace
}  // namespace headwater::testing
