// A session's token over real gRPC: whoever does not have it, has another's, or comes after the session or
// its epoch has ended stores nothing.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

#include "base/rpc/epoch_token.h"
#include "base/rpc/grpc_status.h"
#include "headwater/v1/kv.grpc.pb.h"
#include "kvtransfer/frame.h"
#include "tests/kvtransfer/kv_fixture.h"
#include "tests/kvtransfer/raw_client.h"
#include "tests/support/dial.h"

namespace headwater {
namespace {

// Two requests of two tenants on one node.
constexpr char kMine[] = "6f1d2c3b4a59687786a5b4c3d2e1f001";
constexpr char kTheirs[] = "00112233445566778899aabbccddeeff";
constexpr char kOther[] = "session-2";

struct Guess {
  std::string name, session, token;
  uint32_t epoch;
  absl::StatusCode code;
  v1::ErrorReason reason;
};

class SessionTokenTest : public ::testing::Test {
 protected:
  void SetUp() override {
    stub_ = v1::KvTransferService::NewStub(DialPlaintext(receiver_.address()));
    // Mine is in its second epoch.
    for (const uint32_t epoch : {1u, 2u}) ASSERT_TRUE(Open(kSession, kMine, epoch).ok());
    ASSERT_TRUE(Open(kOther, kTheirs, 1).ok());
  }

  absl::Status Open(const std::string& session, const std::string& token, uint32_t epoch,
                    bool epoch_tokens = false) {
    v1::OpenSessionRequest request = MakeOpen(geometry_.layout(), epoch);
    request.set_session_id(session);
    request.set_session_token(token);
    request.set_epoch_tokens(epoch_tokens);
    grpc::ClientContext context;
    v1::OpenSessionResponse response;
    return FromGrpcStatus(stub_->OpenSession(&context, request, &response));
  }
  absl::Status Commit(const std::string& session, const std::string& token, uint32_t epoch) {
    v1::CommitSessionRequest request = MakeCommit(geometry_, cache_.Digest(), epoch);
    request.set_session_id(session);
    request.set_session_token(token);
    grpc::ClientContext context;
    v1::CommitSessionResponse response;
    return FromGrpcStatus(stub_->CommitSession(&context, request, &response));
  }
  absl::Status Abort(const std::string& session, const std::string& token) {
    v1::AbortSessionRequest request;
    request.set_session_id(session);
    request.set_session_token(token);
    grpc::ClientContext context;
    v1::AbortSessionResponse response;
    return FromGrpcStatus(stub_->AbortSession(&context, request, &response));
  }
  // A stream with all blocks of `cache`; how it ended.
  absl::Status Push(const std::string& session, const std::string& token, uint32_t epoch,
                    const CacheBytes& cache) {
    RawClient client(receiver_.address());
    Greet(&client, session, token, epoch);
    for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
      if (!WriteBlock(&client, cache, i, epoch)) break;
    }
    return client.EndAfterAll();
  }
  void Greet(RawClient* client, const std::string& session, const std::string& token, uint32_t epoch) {
    v1::KvFrameHeader hello;
    hello.mutable_hello()->set_session_id(session);
    hello.mutable_hello()->set_session_token(token);
    hello.mutable_hello()->set_epoch(epoch);
    EXPECT_TRUE(client->Write(EncodeFrame(hello)));
  }
  bool WriteBlock(RawClient* client, const CacheBytes& cache, uint64_t index, uint32_t epoch) {
    v1::KvFrameHeader block;
    *block.mutable_block() = MakeBlock(geometry_, index, cache.Crc(index), epoch);
    return client->Write(EncodeFrame(block, grpc::Slice(cache.Block(index), cache.BlockBytes(index))));
  }

  double BytesStored() {
    return receiver_.metrics()
        .Counter("headwater_kv_ingress_bytes_total",
                 "KV payload bytes stored, or verified and dropped (--sink=verify).")
        .Value();
  }
  void ExpectEnds(const absl::Status& status, absl::StatusCode code, v1::ErrorReason reason) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(ReasonName(ReasonOf(status)), ReasonName(reason)) << status;
    EXPECT_EQ(status.message().find(kMine), absl::string_view::npos) << "the token is told: " << status;
  }

  const KvGeometry geometry_ = MakeGeometry(MakeLayout(2, 2, 8, 64, 32));
  const CacheBytes cache_{geometry_, 1}, evil_{geometry_, 666};
  TestReceiver receiver_;
  std::unique_ptr<v1::KvTransferService::Stub> stub_;
};

constexpr auto kDenied = absl::StatusCode::kPermissionDenied;
constexpr auto kNotFound = absl::StatusCode::kNotFound;
constexpr auto kStale = v1::ERROR_REASON_STALE_EPOCH;
constexpr auto kBadField = v1::ERROR_REASON_BAD_FIELD;
constexpr auto kUnknown = v1::ERROR_REASON_UNKNOWN_SESSION;

// Tokens that are not session-1's.
std::vector<std::string> WrongTokens() {
  const std::string mine = kMine;
  std::vector<std::string> tokens = {
      "",
      kTheirs,
      mine.substr(0, 31),
      mine.substr(0, 16),
      mine.substr(0, 1),
      mine.substr(1),
      mine + "0",
      mine + std::string(1, '\0'),
      mine + mine,
      " " + mine,
      mine + "\n",
      "0x" + mine,
      absl::AsciiStrToUpper(mine),
      std::string(mine.rbegin(), mine.rend()),
      std::string(32, '0'),
      std::string(32, '\0'),
      std::string(1 << 16, 'f').substr(0, 60'000),
      kSession,
      "request-1",
      "null",
      "*",
      "Bearer " + mine,
  };
  for (const size_t digit : {0, 1, 15, 16, 30, 31}) {
    tokens.push_back(mine);
    tokens.back()[digit] = static_cast<char>(mine[digit] == '0' ? '1' : '0');
  }
  return tokens;
}

std::vector<Guess> Guesses() {
  std::vector<Guess> guesses;
  for (const std::string& token : WrongTokens()) {
    guesses.push_back({absl::StrCat("token of ", token.size(), " bytes ", token.substr(0, 40)), kSession,
                       token, 2, kDenied, kBadField});
  }
  guesses.push_back({"mine for theirs", kOther, kMine, 1, kDenied, kBadField});
  guesses.push_back({"theirs in their epoch for mine", kSession, kTheirs, 1, kDenied, kBadField});
  for (const std::string& session :
       std::vector<std::string>{"", "session-3", "session", "session-1 ", "SESSION-1", "./session-1",
                                "session-1/../session-2", std::string("session-1\0", 10), kTheirs}) {
    guesses.push_back({"session " + session, session, kMine, 2, kNotFound, kUnknown});
  }
  guesses.push_back({"the epoch before", kSession, kMine, 1, absl::StatusCode::kAborted, kStale});
  guesses.push_back({"no epoch", kSession, kMine, 0, absl::StatusCode::kAborted, kStale});
  guesses.push_back(
      {"the epoch after", kSession, kMine, 3, absl::StatusCode::kFailedPrecondition, kBadField});
  guesses.push_back(
      {"the last epoch", kSession, kMine, UINT32_MAX, absl::StatusCode::kFailedPrecondition, kBadField});
  return guesses;
}

TEST_F(SessionTokenTest, WhoeverGuessesStoresNothingAndEndsNothing) {
  const std::vector<Guess> guesses = Guesses();
  ASSERT_GE(guesses.size(), 40u);
  const KvStore::Usage before = receiver_.store()->usage();
  for (const Guess& guess : guesses) {
    SCOPED_TRACE(guess.name);
    ExpectEnds(Push(guess.session, guess.token, guess.epoch, evil_), guess.code, guess.reason);
    ExpectEnds(Commit(guess.session, guess.token, guess.epoch), guess.code, guess.reason);
    // An abort has no epoch, and of an unknown session it has nothing to do.
    if (guess.reason == kBadField && guess.code == kDenied) {
      ExpectEnds(Abort(guess.session, guess.token), kDenied, kBadField);
      // A session's next epoch is not for others to open; without a token it is no session's.
      const bool none = guess.token.empty() || guess.token.size() > 256;
      ExpectEnds(Open(guess.session, guess.token, 3), none ? absl::StatusCode::kInvalidArgument : kDenied,
                 kBadField);
    } else if (guess.reason == kUnknown) {
      EXPECT_TRUE(Abort(guess.session, guess.token).ok());
    }
    EXPECT_EQ(BytesStored(), 0);
    EXPECT_EQ(receiver_.store()->usage().sessions, before.sessions);
    EXPECT_EQ(receiver_.store()->usage().bytes, before.bytes);
  }
  // Both are as they were: who has the token goes on.
  EXPECT_TRUE(Push(kSession, kMine, 2, cache_).ok());
  EXPECT_TRUE(Commit(kSession, kMine, 2).ok());
  EXPECT_TRUE(Push(kOther, kTheirs, 1, cache_).ok());
  EXPECT_TRUE(Commit(kOther, kTheirs, 1).ok());
  EXPECT_EQ(BytesStored(), 2.0 * static_cast<double>(geometry_.total_bytes()));
}

TEST_F(SessionTokenTest, AReplayedTokenChangesNoCommittedCache) {
  ASSERT_TRUE(Push(kSession, kMine, 2, cache_).ok());
  ASSERT_TRUE(Commit(kSession, kMine, 2).ok());
  const double stored = BytesStored();
  ExpectEnds(Push(kSession, kMine, 2, evil_), absl::StatusCode::kInvalidArgument, kBadField);
  ExpectEnds(Push(kSession, kMine, 1, evil_), absl::StatusCode::kAborted, kStale);
  ExpectEnds(Abort(kSession, kMine), absl::StatusCode::kFailedPrecondition, kBadField);
  EXPECT_TRUE(Commit(kSession, kMine, 2).ok()) << "the same again is no change";
  v1::CommitSessionRequest other = MakeCommit(geometry_, evil_.Digest(), 2);
  other.set_session_token(kMine);
  EXPECT_EQ(receiver_.store()->Commit(other).status().code(), absl::StatusCode::kDataLoss);
  const auto kv = receiver_.store()->Acquire(kSession);
  ASSERT_TRUE(kv.ok()) << kv.status();
  ExpectEnds(Open(kSession, kMine, 3), absl::StatusCode::kFailedPrecondition, kStale);
  EXPECT_TRUE(cache_.Equals(**kv));
  EXPECT_EQ(BytesStored(), stored);
}

TEST_F(SessionTokenTest, ATokenEndsWithItsSession) {
  ASSERT_TRUE(Push(kSession, kMine, 2, cache_).ok());
  ASSERT_TRUE(Commit(kSession, kMine, 2).ok());
  EXPECT_GT(receiver_.store()->Release(kSession), 0u);
  ASSERT_TRUE(Abort(kOther, kTheirs).ok());
  const double stored = BytesStored();
  for (const auto& [session, token] : {std::pair(kSession, kMine), {kOther, kTheirs}}) {
    for (const uint32_t epoch : {1u, 2u, 3u}) {
      ExpectEnds(Push(session, token, epoch, evil_), kNotFound, kUnknown);
      ExpectEnds(Commit(session, token, epoch), kNotFound, kUnknown);
    }
    EXPECT_TRUE(Abort(session, token).ok());
  }
  // Nor does it open a session of the same name that came after.
  ASSERT_TRUE(Open(kSession, kTheirs, 1).ok());
  ExpectEnds(Push(kSession, kMine, 1, evil_), kDenied, kBadField);
  ExpectEnds(Push(kSession, kMine, 2, evil_), kDenied, kBadField);
  ExpectEnds(Abort(kSession, kMine), kDenied, kBadField);
  EXPECT_EQ(BytesStored(), stored);
  EXPECT_EQ(receiver_.store()->usage().sessions, 1u);
}

// Where workers have the token of the session, it is a request's, in all its epochs; what shuts a lost worker
// out is the number of its epoch.
TEST_F(SessionTokenTest, ALostWorkerStoresNothingOnceTheNextEpochIsOpen) {
  RawClient lost(receiver_.address());
  Greet(&lost, kSession, kMine, 2);
  DecodedFrame state;
  ASSERT_TRUE(lost.Read(&state)) << "its stream stands";
  ASSERT_TRUE(Open(kSession, kMine, 3).ok());
  EXPECT_TRUE(WriteBlock(&lost, evil_, 0, 2));
  ExpectEnds(lost.EndAfterAll(), absl::StatusCode::kAborted, kStale);
  ExpectEnds(Push(kSession, kMine, 2, evil_), absl::StatusCode::kAborted, kStale);
  ExpectEnds(Commit(kSession, kMine, 2), absl::StatusCode::kAborted, kStale);
  ExpectEnds(Open(kSession, kMine, 2), absl::StatusCode::kAborted, kStale);
  EXPECT_EQ(BytesStored(), 0);
  EXPECT_TRUE(Push(kSession, kMine, 3, cache_).ok());
  EXPECT_TRUE(Commit(kSession, kMine, 3).ok());
}

// What workers get from coordinators of now: pushes blocks of one epoch of one session, and does nothing
// else.
TEST_F(SessionTokenTest, AnEpochsTokenIsOfNoOtherUse) {
  const std::string session = "session-3";
  for (const uint32_t epoch : {1u, 2u}) ASSERT_TRUE(Open(session, kMine, epoch, true).ok());
  const std::string first = EpochToken(kMine, session, 1), second = EpochToken(kMine, session, 2),
                    third = EpochToken(kMine, session, 3);

  ExpectEnds(Push(session, first, 1, evil_), absl::StatusCode::kAborted, kStale);
  for (const uint32_t epoch : {2u, 3u}) ExpectEnds(Push(session, first, epoch, evil_), kDenied, kBadField);
  ExpectEnds(Push(session, second, 3, evil_), kDenied, kBadField);
  ExpectEnds(Push(session, third, 3, evil_), absl::StatusCode::kFailedPrecondition, kBadField);
  for (const std::string& token : {std::string(kMine), std::string(), EpochToken(kMine, kSession, 2),
                                   EpochToken(kTheirs, session, 2), second.substr(0, 63), second + "0"}) {
    ExpectEnds(Push(session, token, 2, evil_), kDenied, kBadField);
  }
  for (const uint32_t epoch : {2u, 3u}) ExpectEnds(Open(session, second, epoch, true), kDenied, kBadField);
  ExpectEnds(Commit(session, second, 2), kDenied, kBadField);
  ExpectEnds(Abort(session, second), kDenied, kBadField);
  EXPECT_EQ(BytesStored(), 0);

  EXPECT_TRUE(Push(session, second, 2, cache_).ok());
  EXPECT_TRUE(Commit(session, kMine, 2).ok());
}

// As when the node was replaced by one that knows tokens of epochs.
TEST_F(SessionTokenTest, ASessionOpenedWithoutThemTakesTokensOfEpochs) {
  ExpectEnds(Push(kSession, EpochToken(kMine, kSession, 1), 2, evil_), kDenied, kBadField);
  EXPECT_EQ(BytesStored(), 0);
  EXPECT_TRUE(Push(kSession, EpochToken(kMine, kSession, 2), 2, cache_).ok());
  EXPECT_TRUE(Commit(kSession, kMine, 2).ok());
}

// Two tenants with the same prompt: two sessions, whose bytes are kept, committed and freed apart.
TEST_F(SessionTokenTest, TheSamePromptOfTwoTenantsSharesNothing) {
  ASSERT_TRUE(Push(kSession, kMine, 2, cache_).ok());
  ASSERT_TRUE(Commit(kSession, kMine, 2).ok());
  // Not one block of theirs is there because mine are.
  v1::KvHello hello;
  hello.set_session_id(kOther);
  hello.set_session_token(kTheirs);
  hello.set_epoch(1);
  const auto state = receiver_.store()->Hello(hello, nullptr);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->stored_blocks(), "");
  ExpectEnds(Commit(kOther, kTheirs, 1), absl::StatusCode::kFailedPrecondition,
             v1::ERROR_REASON_SESSION_NOT_COMMITTED);
  ASSERT_TRUE(Push(kOther, kTheirs, 1, cache_).ok());
  ASSERT_TRUE(Commit(kOther, kTheirs, 1).ok());
  EXPECT_EQ(BytesStored(), 2.0 * static_cast<double>(geometry_.total_bytes())) << "sent and stored twice";
  EXPECT_EQ(receiver_.Blocks("duplicate"), 0);
  EXPECT_EQ(receiver_.store()->usage().bytes, 2 * geometry_.total_bytes());
  const auto mine = receiver_.store()->Acquire(kSession), theirs = receiver_.store()->Acquire(kOther);
  ASSERT_TRUE(mine.ok() && theirs.ok());
  EXPECT_NE((*mine)->Tensor(0, KvKind::kK), (*theirs)->Tensor(0, KvKind::kK));
  EXPECT_GT(receiver_.store()->Release(kSession), 0u);
  EXPECT_TRUE(cache_.Equals(**theirs)) << "mine is gone, theirs is not";
}

}  // namespace
}  // namespace headwater
