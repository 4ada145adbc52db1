#include "decode/engine.h"

#include <future>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "base/rpc/grpc_status.h"
#include "tests/decode/engine_fixture.h"
#include "tests/support/fake_clock.h"

namespace headwater::testing {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

uint64_t ReleaseAndWait(GenerationEngine* engine, const std::string& session_id) {
  std::promise<uint64_t> bytes;
  const absl::Status status =
      engine->Release(session_id, [&bytes](uint64_t reclaimed) { bytes.set_value(reclaimed); });
  EXPECT_TRUE(status.ok()) << status;
  auto future = bytes.get_future();
  EXPECT_EQ(future.wait_for(std::chrono::seconds(60)), std::future_status::ready);
  return future.get();
}

TEST(EngineTest, GivesTheAskedNumberOfTokens) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  RecordingSink sink;

  ASSERT_TRUE(engine->Start(MakeGenerate("a", 10), &sink).ok());

  ASSERT_TRUE(sink.Wait().ok());
  EXPECT_THAT(sink.ids(), ElementsAreArray(fixture.Expected(fixture.prompt_a, 10)));
  const auto tokens = sink.tokens();
  for (size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_EQ(tokens[i].position(), fixture.prompt_a.tokens.size() + i);
    EXPECT_EQ(tokens[i].finish_reason(), i == 9 ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_UNSPECIFIED);
  }
  EXPECT_EQ(fixture.metrics.Counter("headwater_decode_tokens_total", "Tokens given out.").Value(), 10);
}

TEST(EngineTest, ALaterCallGoesOnWhereTheLastOneEnded) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  const std::vector<int32_t> expected = fixture.Expected(fixture.prompt_a, 12);
  std::vector<int32_t> ids;

  for (const uint32_t count : {1u, 4u, 7u}) {
    RecordingSink sink;
    ASSERT_TRUE(engine->Start(MakeGenerate("a", count), &sink).ok());
    ASSERT_TRUE(sink.Wait().ok());
    const auto part = sink.ids();
    ASSERT_EQ(part.size(), count);
    ids.insert(ids.end(), part.begin(), part.end());
  }

  EXPECT_THAT(ids, ElementsAreArray(expected));
}

TEST(EngineTest, SessionsInTurnGiveWhatEachGivesAlone) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  RecordingSink a;
  RecordingSink b;

  ASSERT_TRUE(engine->Start(MakeGenerate("a", 9), &a).ok());
  ASSERT_TRUE(engine->Start(MakeGenerate("b", 9), &b).ok());

  ASSERT_TRUE(a.Wait().ok());
  ASSERT_TRUE(b.Wait().ok());
  EXPECT_THAT(a.ids(), ElementsAreArray(fixture.Expected(fixture.prompt_a, 9)));
  EXPECT_THAT(b.ids(), ElementsAreArray(fixture.Expected(fixture.prompt_b, 9)));
}

TEST(EngineTest, StopsAfterAStopTokenAndStreamsIt) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  const std::vector<int32_t> expected = fixture.Expected(fixture.prompt_a, 8);
  // The last of the eight that is not among those before it.
  size_t stop = 7;
  while (std::find(expected.begin(), expected.begin() + stop, expected[stop]) != expected.begin() + stop)
    --stop;
  RecordingSink sink;

  ASSERT_TRUE(engine->Start(MakeGenerate("a", 100, {static_cast<uint32_t>(expected[stop])}), &sink).ok());

  ASSERT_TRUE(sink.Wait().ok());
  EXPECT_THAT(sink.ids(), ElementsAreArray(expected.begin(), expected.begin() + stop + 1));
  EXPECT_EQ(sink.tokens().back().finish_reason(), v1::FINISH_REASON_STOP);
}

TEST(EngineTest, EndsAtTheContextAndRefusesToGoOn) {
  EngineFixture fixture(/*max_position=*/48);
  const auto engine = fixture.MakeEngine();
  RecordingSink sink;
  RecordingSink after;

  ASSERT_TRUE(engine->Start(MakeGenerate("a", 100), &sink).ok());
  ASSERT_TRUE(sink.Wait().ok());
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 1), &after).ok());

  EXPECT_EQ(sink.tokens().size(), 18u);
  EXPECT_EQ(sink.tokens().back().position(), 47u);
  EXPECT_EQ(sink.tokens().back().finish_reason(), v1::FINISH_REASON_CONTEXT);
  EXPECT_EQ(ReasonOf(after.Wait()), v1::ERROR_REASON_CONTEXT_FULL);
}

TEST(EngineTest, RestsWhileTheSinkIsFullAndStopsWhenCancelled) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  RecordingSink slow(/*room=*/3);
  RecordingSink other;

  const auto id = engine->Start(MakeGenerate("a", 100), &slow);
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(slow.WaitForTokens(3));
  // A whole generation of another session passes by; the full one has not moved.
  ASSERT_TRUE(engine->Start(MakeGenerate("b", 20), &other).ok());
  ASSERT_TRUE(other.Wait().ok());
  EXPECT_EQ(slow.tokens().size(), 3u);
  slow.SetRoom(5);
  engine->Resume(*id);
  ASSERT_TRUE(slow.WaitForTokens(5));
  engine->Cancel(*id);

  EXPECT_EQ(slow.Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(slow.tokens().size(), 5u) << "a resting generation computes nothing";
  RecordingSink again;
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 3), &again).ok());
  ASSERT_TRUE(again.Wait().ok());
  const std::vector<int32_t> expected = fixture.Expected(fixture.prompt_a, 8);
  EXPECT_THAT(again.ids(), ElementsAreArray(expected.begin() + 5, expected.end()));
}

TEST(EngineTest, CancelStopsARunningGeneration) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  RecordingSink sink;

  const auto id = engine->Start(MakeGenerate("a", 2000), &sink);
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(sink.WaitForTokens(2));
  engine->Cancel(*id);
  const size_t given = sink.tokens().size();

  EXPECT_EQ(sink.Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_LE(sink.tokens().size(), given + 1);
  EXPECT_TRUE(engine->WaitIdle(absl::Seconds(10)));
}

TEST(EngineTest, RefusesASecondCallOfASession) {
  EngineFixture fixture;
  // Outlive the engine, which ends what still rests.
  RecordingSink resting(/*room=*/1);
  RecordingSink second;
  const auto engine = fixture.MakeEngine();
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 100), &resting).ok());

  const auto refused = engine->Start(MakeGenerate("a", 1), &second);

  EXPECT_EQ(refused.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(refused.status()), v1::ERROR_REASON_SESSION_BUSY);
  EXPECT_FALSE(second.done());
}

TEST(EngineTest, RefusesMoreGenerationsThanItsLimit) {
  EngineFixture fixture;
  fixture.options.max_generations = 1;
  // Outlive the engine, which ends what still rests.
  RecordingSink resting(/*room=*/1);
  RecordingSink second;
  const auto engine = fixture.MakeEngine();
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 100), &resting).ok());

  const auto refused = engine->Start(MakeGenerate("b", 1), &second);

  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(refused.status()), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("the limit is 1"));
}

TEST(EngineTest, ReleaseEndsTheGenerationThenFreesTheCache) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  RecordingSink sink;
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 2000), &sink).ok());
  ASSERT_TRUE(sink.WaitForTokens(3));
  const uint64_t stored = fixture.caches.store()->usage().committed_bytes;

  const uint64_t bytes = ReleaseAndWait(engine.get(), "a");

  EXPECT_TRUE(sink.done()) << "the generation ends before the release is answered";
  EXPECT_EQ(ReasonOf(sink.Wait()), v1::ERROR_REASON_UNKNOWN_SESSION);
  EXPECT_EQ(engine->generated_kv_bytes(), 0u);
  const uint64_t freed = stored - fixture.caches.store()->usage().bytes;
  EXPECT_GT(bytes, freed) << "generated tokens count too";
  EXPECT_GT(freed, 0u);
  EXPECT_EQ(ReleaseAndWait(engine.get(), "a"), 0u) << "an unknown session";
  RecordingSink after;
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 1), &after).ok());
  EXPECT_EQ(after.Wait().code(), absl::StatusCode::kNotFound);
}

TEST(EngineTest, NamesUnknownAndUncommittedSessions) {
  EngineFixture fixture;
  fixture.caches.AddUncommitted("open", fixture.prompt_a, v1::KV_DTYPE_F32);
  const auto engine = fixture.MakeEngine();
  RecordingSink unknown;
  RecordingSink open;

  ASSERT_TRUE(engine->Start(MakeGenerate("nobody", 1), &unknown).ok());
  ASSERT_TRUE(engine->Start(MakeGenerate("open", 1), &open).ok());

  EXPECT_EQ(unknown.Wait().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(unknown.Wait()), v1::ERROR_REASON_UNKNOWN_SESSION);
  EXPECT_EQ(open.Wait().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(open.Wait()), v1::ERROR_REASON_SESSION_NOT_COMMITTED);
}

TEST(EngineTest, RefusesBadRequestsByName) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  const std::vector<std::pair<v1::GenerateRequest, std::string>> cases = {
      {MakeGenerate("a", 0), "max_new_tokens 0"},
      {MakeGenerate("a", 65537), "max_new_tokens 65537"},
      {MakeGenerate("", 1), "session_id is empty"},
      {MakeGenerate(std::string(257, 'x'), 1), "257"},
      {MakeGenerate("a", 1, std::vector<uint32_t>(257, 1)), "257"}};
  for (const auto& [request, words] : cases) {
    RecordingSink sink;
    const auto id = engine->Start(request, &sink);
    EXPECT_EQ(id.status().code(), absl::StatusCode::kInvalidArgument) << words;
    EXPECT_EQ(ReasonOf(id.status()), v1::ERROR_REASON_BAD_FIELD) << words;
    EXPECT_THAT(std::string(id.status().message()), HasSubstr(words));
  }
}

TEST(EngineTest, DrainingRefusesNewCallsAndLetsRunningOnesEnd) {
  EngineFixture fixture;
  const auto engine = fixture.MakeEngine();
  RecordingSink running(/*room=*/1);
  const auto id = engine->Start(MakeGenerate("a", 3), &running);
  ASSERT_TRUE(id.ok());
  ASSERT_TRUE(running.WaitForTokens(1));

  engine->Drain();
  RecordingSink late;
  const auto refused = engine->Start(MakeGenerate("b", 1), &late);

  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(refused.status()), v1::ERROR_REASON_DRAINING);
  EXPECT_FALSE(engine->WaitIdle(absl::Milliseconds(1)));
  running.SetRoom(100);
  engine->Resume(*id);
  EXPECT_TRUE(running.Wait().ok());
  EXPECT_TRUE(engine->WaitIdle(absl::Seconds(10)));
}

TEST(EngineTest, ItsEndEndsWhatIsLeft) {
  EngineFixture fixture;
  RecordingSink resting(/*room=*/1);
  RecordingSink running;
  auto engine = fixture.MakeEngine();
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 100), &resting).ok());
  ASSERT_TRUE(engine->Start(MakeGenerate("b", 2000), &running).ok());
  ASSERT_TRUE(resting.WaitForTokens(1));

  engine = nullptr;

  EXPECT_TRUE(resting.done());
  EXPECT_EQ(ReasonOf(resting.Wait()), v1::ERROR_REASON_DRAINING);
  EXPECT_EQ(ReasonOf(running.Wait()), v1::ERROR_REASON_DRAINING);
}

TEST(EngineTest, FreesGeneratedTokensOfSessionsThatNobodyUses) {
  FakeClock clock;
  EngineFixture fixture(/*max_position=*/2048, &clock);
  fixture.options.lease = absl::Seconds(10);
  const auto engine = fixture.MakeEngine();
  RecordingSink sink;
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 5), &sink).ok());
  ASSERT_TRUE(sink.Wait().ok());
  ASSERT_GT(engine->generated_kv_bytes(), 0u);

  clock.Advance(absl::Seconds(11));

  // The engine looks about once a second.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (engine->generated_kv_bytes() > 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::yield();
  }
  EXPECT_EQ(engine->generated_kv_bytes(), 0u);
}

TEST(EngineTest, AGenerationDoesNotKeepItsCacheAfterItEnded) {
  FakeClock clock;
  EngineFixture fixture(/*max_position=*/2048, &clock);
  const auto engine = fixture.MakeEngine();
  RecordingSink sink;
  ASSERT_TRUE(engine->Start(MakeGenerate("a", 5), &sink).ok());
  ASSERT_TRUE(sink.Wait().ok());

  clock.Advance(absl::Minutes(6));

  EXPECT_EQ(fixture.caches.store()->ExpireLeases(), 2);
}

}  // namespace
}  // namespace headwater::testing
