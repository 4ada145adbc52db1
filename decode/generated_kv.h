// KV of generated tokens: one growing buffer per layer and kind, within a budget that all sessions share.
#ifndef HW_DECODE_GENERATED_KV_H_
#define HW_DECODE_GENERATED_KV_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"

#include "kernels/dtype.h"

namespace headwater {

// Bytes that the generated tokens of all sessions may take together. Thread-safe.
class GeneratedKvBudget {
 public:
  explicit GeneratedKvBudget(uint64_t limit_bytes) : limit_(limit_bytes) {}

  // RESOURCE_EXHAUSTED, KV_MEMORY_FULL with bytes asked and available.
  absl::Status Take(uint64_t bytes);
  void Return(uint64_t bytes) { used_ -= bytes; }

  uint64_t limit_bytes() const { return limit_; }
  uint64_t used_bytes() const { return used_; }

 private:
  const uint64_t limit_;
  std::atomic<uint64_t> used_{0};
};

// Not thread-safe. The budget must outlive it.
class GeneratedKv {
 public:
  struct Shape {
    int32_t num_layers = 0;
    int32_t num_kv_heads = 0;
    int32_t head_dim = 0;
    kernels::DType dtype = kernels::DType::kF32;
    // Never more tokens than this.
    int64_t max_tokens = 0;
  };

  GeneratedKv(const Shape& shape, GeneratedKvBudget* budget);
  ~GeneratedKv();
  GeneratedKv(const GeneratedKv&) = delete;
  GeneratedKv& operator=(const GeneratedKv&) = delete;

  // Makes room for `num_tokens` tokens in all layers; what is there stays. Grows by doubling from 64 tokens
  // up to steps of 1024. RESOURCE_EXHAUSTED: the budget (nothing has changed then), or the system's memory;
  // OUT_OF_RANGE: over max_tokens.
  absl::Status Reserve(int64_t num_tokens);

  // One layer's K or V: [capacity_tokens, num_kv_heads, head_dim]. Reserve() moves it.
  void* K(int32_t layer) { return tensors_[2 * static_cast<size_t>(layer)].get(); }
  void* V(int32_t layer) { return tensors_[2 * static_cast<size_t>(layer) + 1].get(); }

  int64_t capacity_tokens() const { return capacity_tokens_; }
  uint64_t token_bytes() const { return token_bytes_; }  // of one layer's K (or V) of one token
  uint64_t bytes() const { return charged_bytes_; }

 private:
  const Shape shape_;
  GeneratedKvBudget* const budget_;
  const uint64_t token_bytes_;
  int64_t capacity_tokens_ = 0;
  uint64_t charged_bytes_ = 0;
  std::vector<std::unique_ptr<char[]>> tensors_;
};

}  // namespace headwater

#endif  // HW_DECODE_GENERATED_KV_H_
