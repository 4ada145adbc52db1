#include "kvtransfer/layout.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr uint64_t kMaxLayers = 1024;
constexpr uint64_t kMaxHeads = 1024;
constexpr uint64_t kMaxHeadDim = 1024;
constexpr uint64_t kMaxTokens = 1ull << 26;
constexpr uint64_t kMinBlockTokens = 16;
constexpr uint64_t kMaxBlockTokens = 4096;

absl::Status BadField(absl::string_view field, uint64_t value, uint64_t least, uint64_t most) {
  return MakeError(
      absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD,
      absl::StrCat("KV layout: ", field, " is ", value, ", not in [", least, ", ", most, "]"),
      {{"field", std::string(field)}, {"value", absl::StrCat(value)}, {"limit", absl::StrCat(most)}});
}

absl::Status CheckRange(absl::string_view field, uint64_t value, uint64_t least, uint64_t most) {
  if (value < least || value > most) return BadField(field, value, least, most);
  return absl::OkStatus();
}

}  // namespace

uint64_t ElementBytes(v1::KvDtype dtype) {
  switch (dtype) {
    case v1::KV_DTYPE_F32:
      return 4;
    case v1::KV_DTYPE_F16:
    case v1::KV_DTYPE_BF16:
      return 2;
    default:
      return 0;
  }
}

std::string BlockName(const KvBlockId& id) {
  return absl::StrCat("layer ", id.layer, id.kind == KvKind::kK ? " K" : " V", " tokens [", id.token_begin,
                      ", ", id.token_end, ")");
}

absl::StatusOr<KvGeometry> KvGeometry::Create(const v1::KvLayout& layout) {
  for (const absl::Status& status :
       {CheckRange("num_layers", layout.num_layers(), 1, kMaxLayers),
        CheckRange("num_kv_heads", layout.num_kv_heads(), 1, kMaxHeads),
        CheckRange("head_dim", layout.head_dim(), 1, kMaxHeadDim),
        CheckRange("num_tokens", layout.num_tokens(), 1, kMaxTokens),
        CheckRange("block_tokens", layout.block_tokens(), kMinBlockTokens, kMaxBlockTokens)}) {
    if (!status.ok()) return status;
  }
  KvGeometry geometry;
  geometry.layout_ = layout;
  geometry.element_bytes_ = ElementBytes(layout.dtype());
  if (geometry.element_bytes_ == 0) {
    return MakeError(
        absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_KV_DTYPE_UNSUPPORTED,
        absl::StrCat("KV layout: dtype ", static_cast<int>(layout.dtype()), " is not one of f32, f16, bf16"),
        {{"value", absl::StrCat(static_cast<int>(layout.dtype()))}});
  }
  // The limits above keep every product below 2^60.
  const uint64_t block_tokens = layout.block_tokens();
  geometry.token_bytes_ = uint64_t{layout.num_kv_heads()} * layout.head_dim() * geometry.element_bytes_;
  geometry.tensor_bytes_ = layout.num_tokens() * geometry.token_bytes_;
  geometry.blocks_per_tensor_ = (layout.num_tokens() + block_tokens - 1) / block_tokens;
  const uint64_t block_bytes = std::min(block_tokens, layout.num_tokens()) * geometry.token_bytes_;
  HW_RETURN_IF_ERROR(CheckRange("bytes of one block", block_bytes, 1, kMaxBlockBytes));
  HW_RETURN_IF_ERROR(CheckRange("bytes of the cache", geometry.total_bytes(), 1, kMaxCacheBytes));
  HW_RETURN_IF_ERROR(CheckRange("blocks of the cache", geometry.num_blocks(), 1, kMaxBlocks));
  return geometry;
}

uint64_t KvGeometry::IndexOf(const KvBlockId& id) const {
  return (uint64_t{id.layer} * 2 + static_cast<uint64_t>(id.kind)) * blocks_per_tensor_ +
         id.token_begin / layout_.block_tokens();
}

KvBlockId KvGeometry::BlockAt(uint64_t index) const {
  const uint64_t tensor = index / blocks_per_tensor_;
  KvBlockId id;
  id.layer = static_cast<uint32_t>(tensor / 2);
  id.kind = tensor % 2 == 0 ? KvKind::kK : KvKind::kV;
  id.token_begin = index % blocks_per_tensor_ * layout_.block_tokens();
  id.token_end = std::min(id.token_begin + layout_.block_tokens(), layout_.num_tokens());
  return id;
}

bool KvGeometry::Contains(const KvBlockId& id) const {
  if (id.layer >= layout_.num_layers() || id.kind > KvKind::kV) return false;
  if (id.token_begin >= layout_.num_tokens() || id.token_begin % layout_.block_tokens() != 0) return false;
  return id.token_end == std::min(id.token_begin + layout_.block_tokens(), layout_.num_tokens());
}

uint64_t KvGeometry::OffsetOf(const KvBlockId& id) const {
  return (uint64_t{id.layer} * 2 + static_cast<uint64_t>(id.kind)) * tensor_bytes_ +
         id.token_begin * token_bytes_;
}

}  // namespace headwater
