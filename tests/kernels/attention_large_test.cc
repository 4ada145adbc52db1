#include <cstdint>
#include <memory>

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "kernels/pattern/policy.h"
#include "tests/kernels/attention_cases.h"

namespace headwater::kernels {
namespace {

// Zeros that take memory only where they are written.
class LazyMemory {
 public:
  explicit LazyMemory(size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                   0)) {}
  ~LazyMemory() {
    if (ok()) munmap(data_, bytes_);
  }
  LazyMemory(const LazyMemory&) = delete;
  bool ok() const { return data_ != MAP_FAILED; }
  char* data() const { return static_cast<char*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// The keys that are attended to lie more than 2^31 elements into the chunk.
void CheckFarKeys(DType dtype, int64_t num_queries) {
  constexpr int64_t kKeys = (int64_t{1} << 20) + 300;
  constexpr int64_t kLast = 700;
  AttentionCase c{"tail", 8, 8, 256, kKeys - num_queries, num_queries, kKeys - kLast, kLast};
  const AttentionInputs tail(c, dtype, dtype);
  const auto row_bytes = static_cast<int64_t>(SizeOf(dtype)) * 8 * 256;
  ASSERT_GT(kKeys * 8 * 256, int64_t{1} << 31);
  const LazyMemory k(static_cast<size_t>(kKeys * row_bytes));
  const LazyMemory v(static_cast<size_t>(kKeys * row_bytes));
  ASSERT_TRUE(k.ok() && v.ok());
  std::memcpy(k.data() + (kKeys - kLast) * row_bytes, tail.keys.k, static_cast<size_t>(kLast * row_bytes));
  std::memcpy(v.data() + (kKeys - kLast) * row_bytes, tail.keys.v, static_cast<size_t>(kLast * row_bytes));
  const KeyChunk whole{k.data(), v.data(), dtype, 0, kKeys};

  std::unique_ptr<PatternPolicy> policy;
  ASSERT_TRUE(MakePolicy("a_shape", {{"sink_tokens", 0}, {"window_tokens", 400}}, &policy).ok());
  BlockIndex index;
  ASSERT_TRUE(policy->Select({0, 8, 8, kKeys, tail.first_tile, tail.num_tiles}, &index).ok());
  GuardedState want(tail.shape, num_queries);
  ASSERT_TRUE(reference::SparseAttention(tail.shape, tail.queries, tail.keys, index, want.view()).ok());
  for (const auto path : SupportedPaths()) {
    const cpu::ScopedCpuPath forced(path);
    GuardedState got(tail.shape, num_queries);
    ASSERT_TRUE(SparseAttention(tail.shape, tail.queries, whole, index, got.view()).ok());
    EXPECT_LE(Compare(got, want).out, dtype == DType::kF32 ? 1e-5 : 6e-3) << NameOf(path);
  }
}

TEST(AttentionLarge, ReadsKeysPastTwoToThe31Elements) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    CheckFarKeys(dtype, 20);
    CheckFarKeys(dtype, 1);
  }
}

}  // namespace
}  // namespace headwater::kernels
