// What the block statistics refuse before they touch a device, and shapes of the tables: no GPU.
#include "kernels/cuda/block_stats.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

CudaBlockStatsArgs ValidArgs() {
  CudaBlockStatsArgs args;
  args.k = args.v = kAligned;
  args.total_k = 1000;
  args.num_kv_heads = 8;
  args.head_dim = 128;
  args.stats.k_mean = args.stats.v_mean = static_cast<float*>(kAligned);
  return args;
}

CudaMeanTablesArgs ValidTables() {
  CudaMeanTablesArgs args;
  args.k_mean = static_cast<const float*>(kAligned);
  args.k_table = kAligned;
  args.total_k = 1000;
  args.num_kv_heads = 8;
  args.head_dim = 128;
  return args;
}

Refusal Stats(const char* name, void (*change)(CudaBlockStatsArgs*), const char* says,
              StatusCode code = StatusCode::kInvalidArgument) {
  return {name,
          [change] {
            CudaBlockStatsArgs args = ValidArgs();
            change(&args);
            return CudaBlockStatistics(args, nullptr);
          },
          code, says};
}

Refusal Tables(const char* name, void (*change)(CudaMeanTablesArgs*), const char* says,
               StatusCode code = StatusCode::kInvalidArgument) {
  return {name,
          [change] {
            CudaMeanTablesArgs args = ValidTables();
            change(&args);
            return CudaMeanTables(args, nullptr);
          },
          code, says};
}

INSTANTIATE_TEST_SUITE_P(
    BlockStats, RefusalTest,
    ::testing::Values(
        Stats(
            "null_k", [](auto* a) { a->k = nullptr; }, "k is null"),
        Stats(
            "null_v", [](auto* a) { a->v = nullptr; }, "v is null"),
        Stats(
            "misaligned_k", [](auto* a) { a->k = kMisaligned; }, "k is not 16-byte aligned"),
        Stats(
            "misaligned_mean", [](auto* a) { a->stats.v_mean = static_cast<float*>(kMisaligned); },
            "v_mean is not 16-byte"),
        Stats(
            "one_bound", [](auto* a) { a->stats.k_min = static_cast<float*>(kAligned); },
            "of k_min and k_max one is null"),
        Stats(
            "negative_tokens", [](auto* a) { a->total_k = -1; }, "total_k is -1"),
        Stats(
            "too_many_tokens", [](auto* a) { a->total_k = int64_t{1} << 31; }, "total_k is 2147483648"),
        Stats(
            "no_heads", [](auto* a) { a->num_kv_heads = 0; }, "num_kv_heads is 0"),
        Stats(
            "head_dim", [](auto* a) { a->head_dim = 96; }, "head_dim is 96", StatusCode::kUnimplemented),
        Stats(
            "first_token_inside_a_block", [](auto* a) { a->first_token = 100; }, "first_token is 100"),
        Stats(
            "first_token_past_the_end", [](auto* a) { a->first_token = 1024; }, "from 0 to 1000"),
        Stats(
            "negative_first_token", [](auto* a) { a->first_token = -128; }, "first_token is -128"),
        Stats(
            "too_many_blocks", [](auto* a) { a->total_k = INT32_MAX, a->num_kv_heads = 65536; },
            "blocks * heads is 2199023255552"),
        Tables(
            "mean_without_table", [](auto* a) { a->k_table = nullptr; }, "without its table"),
        Tables(
            "table_without_mean", [](auto* a) { a->v_table = kAligned; }, "without its mean"),
        Tables(
            "misaligned_table", [](auto* a) { a->k_table = kMisaligned; }, "k_table is not 16-byte"),
        Tables(
            "table_tokens", [](auto* a) { a->total_k = int64_t{1} << 31; }, "total_k is 2147483648"),
        Tables(
            "table_head_dim", [](auto* a) { a->head_dim = 80; }, "head_dim is 80",
            StatusCode::kUnimplemented)),
    [](const auto& test) { return test.param.name; });

TEST(CudaBlockStatisticsTest, NothingToDoIsFine) {
  CudaBlockStatsArgs args = ValidArgs();
  args.k = args.v = nullptr;
  args.total_k = 0;
  EXPECT_TRUE(CudaBlockStatistics(args, nullptr).ok());
  args.total_k = args.first_token = 1024;
  EXPECT_TRUE(CudaBlockStatistics(args, nullptr).ok());
  args.first_token = 0;
  args.stats = {};
  EXPECT_TRUE(CudaBlockStatistics(args, nullptr).ok());
  CudaMeanTablesArgs tables = ValidTables();
  tables.total_k = 0;
  EXPECT_TRUE(CudaMeanTables(tables, nullptr).ok());
}

TEST(CudaMeanTablesTest, RowsArePaddedToEight) {
  EXPECT_EQ(CudaMeanTableRows(0), 0);
  for (const int64_t tokens : {1, 128, 129, 1024}) {
    EXPECT_EQ(CudaMeanTableCoarseRow(tokens), 8) << tokens;
    EXPECT_EQ(CudaMeanTableRows(tokens), 16) << tokens;
  }
  EXPECT_EQ(CudaMeanTableCoarseRow(1025), 16);
  EXPECT_EQ(CudaMeanTableRows(1025), 24);
  EXPECT_EQ(CudaMeanTableRows(8 * 1024), 64 + 8);
  EXPECT_EQ(CudaMeanTableRows(8 * 1024 + 1), 72 + 16);
  EXPECT_EQ(CudaMeanTableCoarseRow(INT32_MAX), (int64_t{1} << 31) / 128);
}

}  // namespace
}  // namespace headwater::kernels
