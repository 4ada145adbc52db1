// A sink that records what a generation gives, for the tests of the engine.
#ifndef HW_TESTS_DECODE_ENGINE_FIXTURE_H_
#define HW_TESTS_DECODE_ENGINE_FIXTURE_H_

#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "base/metrics.h"
#include "decode/engine.h"
#include "tests/decode/decode_fixture.h"

namespace headwater::testing {

// Thread-safe. Takes `room` tokens before it says that it is full.
class RecordingSink final : public GenerationSink {
 public:
  explicit RecordingSink(size_t room = std::numeric_limits<size_t>::max()) : room_(room) {}

  bool OnToken(const v1::GenerateResponse& token) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_FALSE(done_) << "a token after the end";
    tokens_.push_back(token);
    changed_.notify_all();
    return tokens_.size() < room_;
  }
  void OnDone(const absl::Status& status) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    EXPECT_FALSE(done_) << "a second end";
    done_ = true;
    status_ = status;
    changed_.notify_all();
  }

  // The final status; DEADLINE_EXCEEDED: it did not come.
  absl::Status Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool ended = changed_.wait_for(lock, kLimit, [this] { return done_; });
    return ended ? status_ : absl::DeadlineExceededError("the generation did not end");
  }
  bool WaitForTokens(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kLimit, [&] { return tokens_.size() >= count; });
  }
  void SetRoom(size_t room) {
    const std::lock_guard<std::mutex> lock(mutex_);
    room_ = room;
  }
  std::vector<v1::GenerateResponse> tokens() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tokens_;
  }
  std::vector<int32_t> ids() {
    std::vector<int32_t> ids;
    for (const auto& token : tokens()) ids.push_back(static_cast<int32_t>(token.token_id()));
    return ids;
  }
  bool done() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }

 private:
  static constexpr std::chrono::seconds kLimit{60};
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t room_;
  std::vector<v1::GenerateResponse> tokens_;
  bool done_ = false;
  absl::Status status_;
};

inline v1::GenerateRequest MakeGenerate(const std::string& session_id, uint32_t max_new_tokens,
                                        const std::vector<uint32_t>& stops = {}) {
  v1::GenerateRequest request;
  request.set_session_id(session_id);
  request.set_max_new_tokens(max_new_tokens);
  request.mutable_stop_token_ids()->Assign(stops.begin(), stops.end());
  return request;
}

// A tiny model, a store with sessions "a" and "b" of different prompts, and an engine over them.
class EngineFixture {
 public:
  explicit EngineFixture(int64_t max_position = 2048, const Clock* clock = Clock::Real())
      : files(max_position),
        model(LoadModel(files.directory())),
        caches(*model, clock),
        prompt_a(Prefill(*model, RandomPrompt(*model, 30, 1))),
        prompt_b(Prefill(*model, RandomPrompt(*model, 45, 2))) {
    caches.Add("a", prompt_a, v1::KV_DTYPE_F32);
    caches.Add("b", prompt_b, v1::KV_DTYPE_F32);
    options.model = model.get();
    options.store = caches.store();
    options.metrics = &metrics;
    options.clock = clock;
    options.generated_kv_bytes = 16 << 20;
    options.num_threads = 1;
  }

  std::unique_ptr<GenerationEngine> MakeEngine() { return *GenerationEngine::Create(options); }
  std::vector<int32_t> Expected(const PrefilledPrompt& prompt, int count) {
    std::vector<int32_t> ids;
    for (const auto& token : ContinueFromScratch(*model, prompt.tokens, count)) ids.push_back(token.token);
    return ids;
  }

  const TinyModelFiles files;
  const std::unique_ptr<Model> model;
  StoreWithCaches caches;
  const PrefilledPrompt prompt_a;
  const PrefilledPrompt prompt_b;
  Metrics metrics{"test"};
  GenerationEngine::Options options;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_DECODE_ENGINE_FIXTURE_H_
