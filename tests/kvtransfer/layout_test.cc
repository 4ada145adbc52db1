#include "kvtransfer/layout.h"

#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/kvtransfer/kv_fixture.h"

namespace headwater {
namespace {

TEST(KvGeometry, CountsBytesAndBlocks) {
  struct Case {
    v1::KvLayout layout;
    uint64_t token_bytes, tensor_bytes, total_bytes, blocks_per_tensor, num_blocks;
  };
  const std::vector<Case> cases = {
      {MakeLayout(1, 1, 1, 1, 16), 2, 2, 4, 1, 2},
      {MakeLayout(2, 4, 8, 255, 256), 64, 16320, 65280, 1, 4},
      {MakeLayout(2, 4, 8, 256, 256), 64, 16384, 65536, 1, 4},
      {MakeLayout(2, 4, 8, 257, 256), 64, 16448, 65792, 2, 8},
      {MakeLayout(32, 8, 128, 1 << 20, 256), 2048, 2ull << 30, 128ull << 30, 4096, 262144},
      {MakeLayout(64, 8, 128, 1 << 22, 256), 2048, 8ull << 30, 1ull << 40, 16384, 2097152},
  };
  for (const Case& c : cases) {
    const auto geometry = KvGeometry::Create(c.layout);
    ASSERT_TRUE(geometry.ok()) << geometry.status();
    EXPECT_EQ(geometry->token_bytes(), c.token_bytes);
    EXPECT_EQ(geometry->tensor_bytes(), c.tensor_bytes);
    EXPECT_EQ(geometry->total_bytes(), c.total_bytes);
    EXPECT_EQ(geometry->blocks_per_tensor(), c.blocks_per_tensor);
    EXPECT_EQ(geometry->num_blocks(), c.num_blocks);
  }
}

TEST(KvGeometry, BlocksTileTheCacheInIndexOrder) {
  for (const uint64_t tokens : {1, 15, 16, 17, 31, 32, 33, 97}) {
    const KvGeometry geometry = MakeGeometry(MakeLayout(3, 2, 5, tokens, 16));
    uint64_t offset = 0;
    for (uint64_t i = 0; i < geometry.num_blocks(); ++i) {
      const KvBlockId id = geometry.BlockAt(i);
      EXPECT_TRUE(geometry.Contains(id)) << BlockName(id);
      EXPECT_EQ(geometry.IndexOf(id), i);
      EXPECT_EQ(geometry.OffsetOf(id), offset);
      offset += geometry.BytesOf(id);
    }
    EXPECT_EQ(offset, geometry.total_bytes());
  }
}

TEST(KvGeometry, ContainsOnlyItsOwnBlocks) {
  const KvGeometry geometry = MakeGeometry(MakeLayout(3, 2, 8, 100, 32));
  EXPECT_TRUE(geometry.Contains({2, KvKind::kV, 96, 100}));
  EXPECT_TRUE(geometry.Contains({0, KvKind::kK, 32, 64}));
  const uint64_t most = UINT64_MAX;
  for (const KvBlockId& id : std::vector<KvBlockId>{{3, KvKind::kK, 0, 32},
                                                    {0, static_cast<KvKind>(2), 0, 32},
                                                    {0, KvKind::kK, 0, 31},
                                                    {0, KvKind::kK, 0, 33},
                                                    {0, KvKind::kK, 0, 64},
                                                    {0, KvKind::kK, 1, 33},
                                                    {0, KvKind::kK, 96, 128},
                                                    {0, KvKind::kK, 128, 100},
                                                    {0, KvKind::kK, 32, 0},
                                                    {UINT32_MAX, KvKind::kV, 0, 32},
                                                    {0, KvKind::kK, most - 31, 0},
                                                    {0, KvKind::kK, most, most}}) {
    EXPECT_FALSE(geometry.Contains(id)) << BlockName(id);
  }
}

TEST(KvGeometry, RefusesHostileLayouts) {
  struct Case {
    std::string names;
    std::function<void(v1::KvLayout*)> change;
  };
  const std::vector<Case> cases = {
      {"num_layers is 0", [](v1::KvLayout* l) { l->set_num_layers(0); }},
      {"num_layers is 1025", [](v1::KvLayout* l) { l->set_num_layers(1025); }},
      {"num_layers is 4294967295", [](v1::KvLayout* l) { l->set_num_layers(UINT32_MAX); }},
      {"num_kv_heads is 0", [](v1::KvLayout* l) { l->set_num_kv_heads(0); }},
      {"num_kv_heads is 1025", [](v1::KvLayout* l) { l->set_num_kv_heads(1025); }},
      {"head_dim is 0", [](v1::KvLayout* l) { l->set_head_dim(0); }},
      {"head_dim is 1025", [](v1::KvLayout* l) { l->set_head_dim(1025); }},
      {"num_tokens is 0", [](v1::KvLayout* l) { l->set_num_tokens(0); }},
      {"num_tokens is 67108865", [](v1::KvLayout* l) { l->set_num_tokens((1 << 26) + 1); }},
      {"num_tokens is 18446744073709551615", [](v1::KvLayout* l) { l->set_num_tokens(UINT64_MAX); }},
      {"block_tokens is 0", [](v1::KvLayout* l) { l->set_block_tokens(0); }},
      {"block_tokens is 15", [](v1::KvLayout* l) { l->set_block_tokens(15); }},
      {"block_tokens is 4097", [](v1::KvLayout* l) { l->set_block_tokens(4097); }},
      {"dtype 0", [](v1::KvLayout* l) { l->set_dtype(v1::KV_DTYPE_UNSPECIFIED); }},
      {"dtype 99", [](v1::KvLayout* l) { l->set_dtype(static_cast<v1::KvDtype>(99)); }},
      {"bytes of one block is 1073741824",
       [](v1::KvLayout* l) {
         l->set_num_kv_heads(1024);
         l->set_head_dim(1024);
         l->set_block_tokens(512);
       }},
      {"bytes of the cache is",
       [](v1::KvLayout* l) {
         l->set_num_layers(1024);
         l->set_num_kv_heads(1024);
         l->set_head_dim(512);
         l->set_num_tokens(1 << 26);
         l->set_block_tokens(16);
       }},
      {"blocks of the cache is 8589934592",
       [](v1::KvLayout* l) {
         l->set_num_layers(1024);
         l->set_num_kv_heads(1);
         l->set_head_dim(1);
         l->set_num_tokens(1 << 26);
         l->set_block_tokens(16);
       }},
  };
  for (const Case& c : cases) {
    v1::KvLayout layout = MakeLayout(2, 8, 128, 1000, 256);
    c.change(&layout);
    const auto geometry = KvGeometry::Create(layout);
    ASSERT_FALSE(geometry.ok()) << c.names;
    EXPECT_EQ(geometry.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(geometry.status().message().find(c.names), absl::string_view::npos) << geometry.status();
    EXPECT_NE(ReasonOf(geometry.status()), v1::ERROR_REASON_UNSPECIFIED);
  }
}

TEST(ElementBytes, KnowsTheWireTypes) {
  EXPECT_EQ(ElementBytes(v1::KV_DTYPE_F32), 4u);
  EXPECT_EQ(ElementBytes(v1::KV_DTYPE_F16), 2u);
  EXPECT_EQ(ElementBytes(v1::KV_DTYPE_BF16), 2u);
  EXPECT_EQ(ElementBytes(v1::KV_DTYPE_UNSPECIFIED), 0u);
}

}  // namespace
}  // namespace headwater
