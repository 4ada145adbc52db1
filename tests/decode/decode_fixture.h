// What the tests of decode/ share: models, committed caches in a real store, reference tokens.
#ifndef HW_TESTS_DECODE_DECODE_FIXTURE_H_
#define HW_TESTS_DECODE_DECODE_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"

#include "base/clock.h"
#include "kvtransfer/store.h"
#include "model/model.h"
#include "tests/model/checkpoint_files.h"
#include "tests/support/tiny_model.h"

namespace headwater::testing {

std::unique_ptr<Model> LoadModel(const std::string& directory, kernels::DType compute = kernels::DType::kF32);

// A random model of a few KiB, written and loaded.
class TinyModelFiles {
 public:
  explicit TinyModelFiles(int64_t max_position = 2048, uint64_t seed = 1);
  const std::string& directory() const { return directory_.path(); }

 private:
  TempDir directory_;
};

// A prompt, its cache as one process computes it, and what greedy generation gives after it.
struct PrefilledPrompt {
  std::vector<int32_t> tokens;
  std::vector<std::vector<float>> k;  // per layer, [tokens, num_kv_heads, head_dim]
  std::vector<std::vector<float>> v;
  int32_t first_token = 0;
  float first_top2_gap = 0;  // of logits, which is that of log-probabilities too
};
PrefilledPrompt Prefill(const Model& model, absl::Span<const int32_t> tokens);
std::vector<int32_t> RandomPrompt(const Model& model, int count, uint32_t seed);

// Greedy continuation by recomputing the whole text for every token.
struct ReferenceToken {
  int32_t token = 0;
  float top2_logit_gap = 0;
};
std::vector<ReferenceToken> ContinueFromScratch(const Model& model, const std::vector<int32_t>& prompt,
                                                int count);

// A store in a folder of its own.
class StoreWithCaches {
 public:
  explicit StoreWithCaches(const Model& model, const Clock* clock = Clock::Real(),
                           uint64_t budget_bytes = 64 << 20);

  KvStore* store() { return store_.get(); }
  const std::string& directory() const { return directory_.path(); }

  // Opens a session with that cache, puts all blocks, and commits it.
  void Add(const std::string& session_id, const PrefilledPrompt& prompt, v1::KvDtype dtype);
  // As Add(), but without the commit.
  void AddUncommitted(const std::string& session_id, const PrefilledPrompt& prompt, v1::KvDtype dtype);

 private:
  v1::CommitSessionRequest Put(const std::string& session_id, const PrefilledPrompt& prompt,
                               v1::KvDtype dtype);

  const Model& model_;
  TempDir directory_;
  std::unique_ptr<KvStore> store_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_DECODE_DECODE_FIXTURE_H_
