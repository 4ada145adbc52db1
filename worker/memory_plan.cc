#include "worker/memory_plan.h"

#include <algorithm>
#include <initializer_list>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "kernels/attention/block_index.h"
#include "worker/key_selection.h"
#include "worker/partition.h"

namespace headwater {
namespace {

using kernels::SizeOf;

constexpr uint64_t kLimit = uint64_t{1} << 63;
constexpr uint64_t kAttentionScratchPerThread = 1 << 20;
// bf16 attention packs the keys and values of so many tokens at a time, head_dim padded to 32.
constexpr uint64_t kPackedTokens = 4096;
constexpr uint64_t kSenderBytesPerChannel = 8 << 20;
// Token ids as the assignment's message, in its serialised form and as the loop takes them.
constexpr uint64_t kBytesPerPromptToken = 16;
// Each range may have one at either end.
constexpr uint64_t kPartialTiles = 2 * static_cast<uint64_t>(kMaxRanges);
// A block list grows by doubling.
constexpr uint64_t kIndexSlack = 2;

uint64_t Saturate(unsigned __int128 value) { return value > kLimit ? kLimit : static_cast<uint64_t>(value); }

uint64_t Product(std::initializer_list<uint64_t> factors) {
  unsigned __int128 product = 1;
  for (const uint64_t factor : factors) product = Saturate(product * factor);
  return Saturate(product);
}

uint64_t Sum(std::initializer_list<uint64_t> terms) {
  unsigned __int128 sum = 0;
  for (const uint64_t term : terms) sum += term;
  return Saturate(sum);
}

uint64_t Aligned(uint64_t bytes) {
  return Saturate((static_cast<unsigned __int128>(bytes) + MemoryPlan::kAlignment - 1) /
                  MemoryPlan::kAlignment * MemoryPlan::kAlignment);
}

uint64_t KvBytesPerToken(const MemoryShape& shape, kernels::DType dtype) {
  return Product(
      {2, static_cast<uint64_t>(shape.num_kv_heads), static_cast<uint64_t>(shape.head_dim), SizeOf(dtype)});
}

// One list of 4-byte block numbers for each query tile, and its offset, flag and slack.
uint64_t IndexBytesPerTile(int64_t num_tokens) {
  const uint64_t blocks = static_cast<uint64_t>(num_tokens) / kernels::kKeyBlockTokens + 1;
  return Product({kIndexSlack, blocks * sizeof(int32_t) + sizeof(int64_t) + 1});
}

uint64_t SelectionBytes(const MemoryShape& shape, int world_size, int64_t num_tokens) {
  return Product({static_cast<uint64_t>(world_size),
                  static_cast<uint64_t>(KeySelection::Words(shape.num_kv_heads, num_tokens)),
                  sizeof(uint64_t)});
}

}  // namespace

MemoryShape MakeMemoryShape(const Model& model, int num_threads, int egress_buffers, int kv_channels) {
  const ModelConfig& config = model.config();
  MemoryShape shape;
  shape.hidden_size = config.hidden_size;
  shape.num_q_heads = config.num_q_heads;
  shape.num_kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  shape.vocab_size = config.vocab_size;
  shape.max_position = config.max_position;
  shape.compute = model.compute();
  shape.egress_buffers = egress_buffers;
  const uint64_t packed =
      Product({2, kPackedTokens, static_cast<uint64_t>(config.num_kv_heads),
               static_cast<uint64_t>(config.head_dim) + 32, SizeOf(kernels::DType::kBF16)});
  shape.scratch_bytes = Sum({model.scratch_bytes(), packed,
                             Product({static_cast<uint64_t>(num_threads), kAttentionScratchPerThread}),
                             Product({static_cast<uint64_t>(kv_channels), kSenderBytesPerChannel})});
  return shape;
}

uint64_t MemoryPlan::arena_bytes() const {
  return Sum({Aligned(hidden), Aligned(attention), Aligned(lse), Aligned(q), Aligned(compute_kv),
              Product({Aligned(egress_kv), static_cast<uint64_t>(num_egress)}),
              Product({Aligned(receive_kv), static_cast<uint64_t>(num_receive)}), Aligned(send_kv),
              Aligned(selection), Aligned(logits)});
}

uint64_t MemoryPlan::total_bytes() const {
  return Sum({arena_bytes(), index, tokens, scratch, checkpoint, device});
}

MemoryPlan PlanMemory(const MemoryShape& shape, kernels::DType wire, int64_t local_tokens,
                      int64_t max_rank_tokens, int64_t num_tokens, int world_size, int64_t held_tokens,
                      v1::Strategy strategy) {
  const uint64_t local = static_cast<uint64_t>(local_tokens);
  const uint64_t heads = static_cast<uint64_t>(shape.num_q_heads);
  const uint64_t head_dim = static_cast<uint64_t>(shape.head_dim);
  const uint64_t tiles = local / kernels::kQueryTileTokens + kPartialTiles;
  MemoryPlan plan;
  plan.hidden = Product({local, static_cast<uint64_t>(shape.hidden_size), sizeof(float)});
  plan.attention = Product({local, heads, head_dim, sizeof(float)});
  plan.lse = Product({local, heads, sizeof(float)});
  plan.q = Product({local, heads, head_dim, SizeOf(shape.compute)});
  if (wire != shape.compute) plan.compute_kv = Product({local, KvBytesPerToken(shape, shape.compute)});
  plan.egress_kv = Product({local, KvBytesPerToken(shape, wire)});
  plan.num_egress = shape.egress_buffers;
  plan.receive_kv = Product({static_cast<uint64_t>(max_rank_tokens), KvBytesPerToken(shape, shape.compute)});
  plan.num_receive = std::min(world_size - 1, 2);
  if (strategy == v1::STRATEGY_SPARSE && world_size > 1) {
    plan.send_kv = Product({local, KvBytesPerToken(shape, shape.compute)});
    plan.selection = SelectionBytes(shape, world_size, num_tokens);
  }
  plan.index = Product({tiles, IndexBytesPerTile(num_tokens)});
  plan.tokens = Product({static_cast<uint64_t>(num_tokens), kBytesPerPromptToken});
  plan.logits = Product({static_cast<uint64_t>(shape.vocab_size), 2 * sizeof(float)});
  plan.scratch = shape.scratch_bytes;
  const uint64_t row = Product({static_cast<uint64_t>(shape.hidden_size), sizeof(float)});
  plan.checkpoint = Product({static_cast<uint64_t>(held_tokens), row});
  if (shape.checkpoints && world_size > 1) {
    const uint64_t two = Product({2, local + static_cast<uint64_t>(max_rank_tokens), row});
    plan.checkpoint = std::max(plan.checkpoint, two);
  }
  return plan;
}

v1::MemoryModel LinearMemoryModel(const MemoryShape& shape, uint64_t budget_bytes, uint64_t weight_bytes) {
  const uint64_t q_values =
      Product({static_cast<uint64_t>(shape.num_q_heads), static_cast<uint64_t>(shape.head_dim)});
  uint64_t own_kv = 0;
  for (const auto wire : {kernels::DType::kF32, kernels::DType::kF16, kernels::DType::kBF16}) {
    const uint64_t converted = wire == shape.compute ? 0 : KvBytesPerToken(shape, shape.compute);
    own_kv = std::max(own_kv, Sum({converted, Product({static_cast<uint64_t>(shape.egress_buffers),
                                                       KvBytesPerToken(shape, wire)})}));
  }
  const uint64_t tile_bytes = IndexBytesPerTile(shape.max_position);
  v1::MemoryModel model;
  model.set_budget_bytes(budget_bytes);
  model.set_weight_bytes(weight_bytes);
  model.set_bytes_per_token(
      Sum({Product({static_cast<uint64_t>(shape.hidden_size), sizeof(float)}),
           Product({q_values, sizeof(float) + SizeOf(shape.compute)}),
           Product({static_cast<uint64_t>(shape.num_q_heads), sizeof(float)}), own_kv,
           Product({2, KvBytesPerToken(shape, shape.compute)}), tile_bytes / kernels::kQueryTileTokens + 1}));
  const uint64_t checkpoints =
      shape.checkpoints ? Product({4, static_cast<uint64_t>(shape.hidden_size), sizeof(float)}) : 0;
  model.set_group_bytes_per_token(Sum({KvBytesPerToken(shape, shape.compute), checkpoints}));
  const uint64_t buffers = 10 + static_cast<uint64_t>(shape.egress_buffers);
  model.set_fixed_bytes(
      Sum({shape.scratch_bytes, Product({static_cast<uint64_t>(shape.vocab_size), 2 * sizeof(float)}),
           Product({static_cast<uint64_t>(shape.max_position), kBytesPerPromptToken}),
           SelectionBytes(shape, kMaxWorldSize, shape.max_position), Product({kPartialTiles, tile_bytes}),
           Product({buffers, MemoryPlan::kAlignment})}));
  return model;
}

absl::Status CheckMemoryPlan(const MemoryPlan& plan, uint64_t budget_bytes, uint64_t weight_bytes) {
  const uint64_t available = budget_bytes > weight_bytes ? budget_bytes - weight_bytes : 0;
  const uint64_t asked = plan.total_bytes();
  if (asked <= available) return absl::OkStatus();
  return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE,
                   absl::StrCat("this rank's part of the prompt needs ", asked, " bytes, the worker has ",
                                available, " (", budget_bytes, " less ", weight_bytes, " of weights)"),
                   {{"bytes_asked", absl::StrCat(asked)}, {"bytes_available", absl::StrCat(available)}});
}

}  // namespace headwater
