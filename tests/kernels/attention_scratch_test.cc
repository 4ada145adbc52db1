#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

#include <gtest/gtest.h>
#include <omp.h>

#include "tests/kernels/attention_cases.h"

namespace {
std::atomic<uint64_t> allocated_bytes{0};
}  // namespace

// Attention takes its scratch from here.
extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  allocated_bytes += size;
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, size) == 0 ? memory : nullptr;
}

namespace headwater::kernels {
namespace {

const AttentionCase kCases[] = {
    {"prefill", 9, 3, 64, 0, 300, 0, 300},
    {"wide", 4, 2, 240, 100, 200, 17, 283},
    {"packed_in_pieces", 2, 1, 32, 9000, 40, 17, 9023},
    {"decode", 9, 3, 64, 5000, 1, 0, 5001},
    {"long_decode", 1, 1, 16, 70000, 1, 0, 70001},
    {"many_heads", 64, 64, 16, 50, 4, 0, 54},
};

TEST(AttentionScratch, NoCallTakesMoreThanTheStatedBytes) {
  const int threads_before = omp_get_max_threads();
  for (const int threads : {1, 4}) {
    omp_set_num_threads(threads);
    for (const AttentionCase& c : kCases) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        const AttentionInputs in(c, dtype, dtype);
        for (const auto path : SupportedPaths()) {
          const cpu::ScopedCpuPath forced(path);
          GuardedState state(in.shape, c.num_queries);
          const BlockIndex index = DenseBlockIndex(in.first_tile, in.num_tiles);
          allocated_bytes = 0;
          ASSERT_TRUE(SparseAttention(in.shape, in.queries, in.keys, index, state.view()).ok());
          EXPECT_GT(allocated_bytes, 0u);
          EXPECT_LE(allocated_bytes, AttentionScratchBytes(in.shape, c.num_keys))
              << c.name << " on " << NameOf(path) << " with " << threads << " threads";
        }
      }
    }
  }
  omp_set_num_threads(threads_before);
}

TEST(AttentionScratch, DoesNotGrowWithThePrompt) {
  const AttentionShape shape{32, 8, 128, 0.1f};
  EXPECT_EQ(AttentionScratchBytes(shape, 1 << 20), AttentionScratchBytes(shape, 1 << 14));
  EXPECT_LE(AttentionScratchBytes(shape, 1 << 20),
            static_cast<uint64_t>(omp_get_max_threads()) * (1 << 20) + 4 * 4096 * 8 * 128 + (1 << 20));
}

}  // namespace
}  // namespace headwater::kernels
