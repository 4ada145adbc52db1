// Block arithmetic of a KV cache: pure, shared by sender, receiver and decode.
#ifndef HW_KVTRANSFER_LAYOUT_H_
#define HW_KVTRANSFER_LAYOUT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

#include "headwater/v1/kv.pb.h"
#include "headwater/v1/types.pb.h"

namespace headwater {

inline constexpr uint64_t kMaxBlockBytes = 32ull << 20;
inline constexpr uint64_t kMaxBlocks = 1ull << 26;
inline constexpr uint64_t kMaxCacheBytes = 1ull << 46;

enum class KvKind : uint8_t { kK = 0, kV = 1 };

// One block: tokens [token_begin, token_end) of one layer's K or V, all KV heads.
struct KvBlockId {
  uint32_t layer = 0;
  KvKind kind = KvKind::kK;
  uint64_t token_begin = 0;
  uint64_t token_end = 0;
};

// The cache lies as [layer][K, V][tokens, kv_heads, head_dim]: a layer's K is one contiguous tensor, and so
// is each block.
class KvGeometry {
 public:
  // INVALID_ARGUMENT: a field is zero, out of range (layers <= 1024, heads <= 1024, head_dim <= 1024, tokens
  // <= 2^26, 16 <= block_tokens <= 4096), a block would pass kMaxBlockBytes (it travels in one message), or
  // the cache would pass kMaxCacheBytes or kMaxBlocks blocks (their bitmap travels in one message).
  static absl::StatusOr<KvGeometry> Create(const v1::KvLayout& layout);

  const v1::KvLayout& layout() const { return layout_; }
  uint64_t element_bytes() const { return element_bytes_; }
  uint64_t token_bytes() const { return token_bytes_; }    // of one layer's K (or V) of one token
  uint64_t tensor_bytes() const { return tensor_bytes_; }  // of one layer's K (or V)
  uint64_t total_bytes() const { return uint64_t{2} * layout_.num_layers() * tensor_bytes_; }
  uint64_t blocks_per_tensor() const { return blocks_per_tensor_; }
  uint64_t num_blocks() const { return uint64_t{2} * layout_.num_layers() * blocks_per_tensor_; }

  // (layer * 2 + kind) * blocks_per_tensor + token_begin / block_tokens. `id` must be one of this cache's
  // blocks.
  uint64_t IndexOf(const KvBlockId& id) const;
  // The block with that index; index < num_blocks().
  KvBlockId BlockAt(uint64_t index) const;
  // True if `id` is one of this cache's blocks: its token range is one step of block_tokens, the last one cut
  // short at num_tokens.
  bool Contains(const KvBlockId& id) const;
  // Of the block's first byte from the start of the cache.
  uint64_t OffsetOf(const KvBlockId& id) const;
  uint64_t BytesOf(const KvBlockId& id) const { return (id.token_end - id.token_begin) * token_bytes_; }

 private:
  KvGeometry() = default;
  v1::KvLayout layout_;
  uint64_t element_bytes_ = 0;
  uint64_t token_bytes_ = 0;
  uint64_t tensor_bytes_ = 0;
  uint64_t blocks_per_tensor_ = 0;
};

// Bytes of one element; 0: unspecified or unknown.
uint64_t ElementBytes(v1::KvDtype dtype);

// "layer 3 K tokens [256, 512)"; for messages.
std::string BlockName(const KvBlockId& id);

}  // namespace headwater

#endif  // HW_KVTRANSFER_LAYOUT_H_
