// Inputs of attention tests: random chunks in guarded memory.
#ifndef HW_TESTS_KERNELS_ATTENTION_CASES_H_
#define HW_TESTS_KERNELS_ATTENTION_CASES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/dtype.h"

namespace headwater::kernels {

inline std::vector<cpu::CpuPath> SupportedPaths() {
  std::vector<cpu::CpuPath> paths;
  for (const auto path : {cpu::CpuPath::kPortable, cpu::CpuPath::kAvx2, cpu::CpuPath::kAvx512,
                          cpu::CpuPath::kAvx512Bf16, cpu::CpuPath::kAmx}) {
    if (cpu::IsSupported(path)) paths.push_back(path);
  }
  return paths;
}

// Elements of one type, with NaN before and after them: reading outside spoils a result.
class GuardedTensor {
 public:
  GuardedTensor() = default;
  GuardedTensor(DType dtype, const std::vector<float>& values) : dtype_(dtype), count_(values.size()) {
    const std::vector<float> nan(kGuard, std::numeric_limits<float>::quiet_NaN());
    bytes_.resize((values.size() + 2 * kGuard) * SizeOf(dtype));
    Convert(nan.data(), DType::kF32, bytes_.data(), dtype, kGuard);
    Convert(values.data(), DType::kF32, At(0), dtype, values.size());
    Convert(nan.data(), DType::kF32, At(values.size()), dtype, kGuard);
  }
  const void* data() const { return bytes_.data() + kGuard * SizeOf(dtype_); }
  DType dtype() const { return dtype_; }

 private:
  static constexpr size_t kGuard = 4096;
  char* At(size_t element) { return bytes_.data() + (kGuard + element) * SizeOf(dtype_); }

  DType dtype_ = DType::kF32;
  size_t count_ = 0;
  std::vector<char> bytes_;
};

// An attention state with canaries around both arrays.
class GuardedState {
 public:
  GuardedState(const AttentionShape& shape, int64_t num_tokens)
      : rows_(static_cast<size_t>(num_tokens * shape.num_q_heads)),
        head_dim_(static_cast<size_t>(shape.head_dim)),
        out_(rows_ * head_dim_ + 2 * kGuard, kCanary),
        lse_(rows_ + 2 * kGuard, kCanary) {
    ResetAttentionState(shape, num_tokens, view());
  }
  AttentionState view() { return {out_.data() + kGuard, lse_.data() + kGuard}; }
  std::vector<float> out() const { return {out_.begin() + kGuard, out_.end() - kGuard}; }
  std::vector<float> lse() const { return {lse_.begin() + kGuard, lse_.end() - kGuard}; }
  bool Intact() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (out_[i] != kCanary || out_[out_.size() - 1 - i] != kCanary || lse_[i] != kCanary ||
          lse_[lse_.size() - 1 - i] != kCanary) {
        return false;
      }
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr float kCanary = 12345.5f;
  size_t rows_;
  size_t head_dim_;
  std::vector<float> out_;
  std::vector<float> lse_;
};

struct AttentionCase {
  std::string name;
  int32_t num_q_heads = 1;
  int32_t num_kv_heads = 1;
  int32_t head_dim = 64;
  int64_t q_begin = 0;
  int64_t num_queries = 1;
  int64_t k_begin = 0;
  int64_t num_keys = 1;
  float spread = 1;  // standard deviation of Q
};

struct AttentionInputs {
  AttentionInputs(const AttentionCase& c, DType q_dtype, DType kv_dtype, uint32_t seed = 7) {
    shape = {c.num_q_heads, c.num_kv_heads, c.head_dim, 1.0f / std::sqrt(static_cast<float>(c.head_dim))};
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](int64_t tokens, int32_t heads, float spread) {
      std::vector<float> values(static_cast<size_t>(tokens * heads * c.head_dim));
      for (float& value : values) value = spread * normal(random);
      return values;
    };
    q = GuardedTensor(q_dtype, draw(c.num_queries, c.num_q_heads, c.spread));
    k = GuardedTensor(kv_dtype, draw(c.num_keys, c.num_kv_heads, 1));
    v = GuardedTensor(kv_dtype, draw(c.num_keys, c.num_kv_heads, 1));
    queries = {q.data(), q_dtype, c.q_begin, c.num_queries};
    keys = {k.data(), v.data(), kv_dtype, c.k_begin, c.num_keys};
    const int64_t first = c.q_begin / kQueryTileTokens;
    const int64_t last = (c.q_begin + c.num_queries - 1) / kQueryTileTokens;
    first_tile = first;
    num_tiles = last - first + 1;
  }
  AttentionInputs(const AttentionInputs&) = delete;

  // Keys [begin, end) of the chunk, counted from its first.
  KeyChunk KeySlice(int64_t begin, int64_t end) const {
    const int64_t bytes =
        begin * shape.num_kv_heads * shape.head_dim * static_cast<int64_t>(SizeOf(keys.dtype));
    return {static_cast<const char*>(keys.k) + bytes, static_cast<const char*>(keys.v) + bytes, keys.dtype,
            keys.begin + begin, end - begin};
  }

  AttentionShape shape;
  GuardedTensor q, k, v;
  QueryChunk queries;
  KeyChunk keys;
  int64_t first_tile = 0;
  int64_t num_tiles = 0;
};

// Largest difference of outputs relative to the largest value, and of lse relative to lse where that is
// above 1.
struct AttentionError {
  double out = 0;
  double lse = 0;
};
inline AttentionError Compare(const GuardedState& got, const GuardedState& want) {
  AttentionError error;
  double largest = 1e-30;
  const auto got_out = got.out();
  const auto want_out = want.out();
  for (const float value : want_out) largest = std::max(largest, std::fabs(static_cast<double>(value)));
  for (size_t i = 0; i < got_out.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(got_out[i]) - static_cast<double>(want_out[i]));
    // Also true for NaN.
    if (!(difference / largest <= error.out)) error.out = difference / largest;
  }
  const auto got_lse = got.lse();
  const auto want_lse = want.lse();
  for (size_t i = 0; i < got_lse.size(); ++i) {
    if (got_lse[i] == want_lse[i]) continue;
    const double difference = std::fabs(static_cast<double>(got_lse[i]) - static_cast<double>(want_lse[i])) /
                              std::max(1.0, std::fabs(static_cast<double>(want_lse[i])));
    if (!(difference <= error.lse)) error.lse = difference;
  }
  return error;
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_ATTENTION_CASES_H_
