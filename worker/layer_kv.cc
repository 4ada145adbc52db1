#include "worker/layer_kv.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "worker/prefill.h"

namespace headwater {
namespace {

bool AllFiniteF16(const char* values, int64_t count) {
  uint16_t worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, values + 2 * i, sizeof(bits));
    worst = std::max<uint16_t>(worst, bits & 0x7c00u);
  }
  return worst != 0x7c00u;
}

}  // namespace

kernels::DType WireType(v1::KvDtype dtype) {
  switch (dtype) {
    case v1::KV_DTYPE_F16:
      return kernels::DType::kF16;
    case v1::KV_DTYPE_BF16:
      return kernels::DType::kBF16;
    default:
      return kernels::DType::kF32;
  }
}

LayerKv::LayerKv(kernels::DType compute, const PrefillJob& job, KvSender* sender)
    : job_(job),
      sender_(sender),
      compute_(compute),
      wire_(WireType(job.geometry->layout().dtype())),
      local_tokens_(NumTokens(job.local())),
      row_elements_(static_cast<int64_t>(job.geometry->layout().num_kv_heads()) *
                    job.geometry->layout().head_dim()),
      compute_row_bytes_(row_elements_ * static_cast<int64_t>(SizeOf(compute_))),
      wire_row_bytes_(row_elements_ * static_cast<int64_t>(SizeOf(wire_))) {}

absl::Status LayerKv::ConvertRows(const Buffers& buffers, int64_t row, int64_t count) const {
  for (const int64_t first : {row, local_tokens_ + row}) {
    char* const to = buffers.egress + first * wire_row_bytes_;
    kernels::Convert(buffers.own + first * compute_row_bytes_, compute_, to, wire_,
                     static_cast<size_t>(count * row_elements_));
    if (wire_ == kernels::DType::kF16 && !AllFiniteF16(to, count * row_elements_)) {
      return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE,
                       absl::StrCat("layer ", layer_, ": a value of ", first == row ? "K" : "V",
                                    " is not finite in f16; ask for bf16 or f32"),
                       {{"layer", absl::StrCat(layer_)}});
    }
  }
  return absl::OkStatus();
}

absl::Status LayerKv::Submit(const Buffers& buffers, int64_t position, int64_t row, int64_t count,
                             EgressRing* ring) {
  if (buffers.own != buffers.egress) HW_RETURN_IF_ERROR(ConvertRows(buffers, row, count));
  const int64_t block_tokens = job_.geometry->layout().block_tokens();
  const int64_t num_tokens = static_cast<int64_t>(job_.tokens.size());
  const int64_t done = position + count;
  // The first block of a range follows blocks of other ranks.
  next_block_ = std::max(next_block_, position / block_tokens);
  while (next_block_ * block_tokens < done) {
    const int64_t begin = next_block_ * block_tokens;
    const int64_t end = std::min(begin + block_tokens, num_tokens);
    if (end > done) break;
    // A block may have begun in rows computed before.
    const int64_t first = row - (position - begin);
    for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
      const KvBlockId id{static_cast<uint32_t>(layer_), kind, static_cast<uint64_t>(begin),
                         static_cast<uint64_t>(end)};
      const int64_t at = kind == KvKind::kK ? first : local_tokens_ + first;
      HW_RETURN_IF_ERROR(sender_->Submit(id, buffers.egress + at * wire_row_bytes_, ring->Use(layer_)));
    }
    ++next_block_;
  }
  return absl::OkStatus();
}

}  // namespace headwater
