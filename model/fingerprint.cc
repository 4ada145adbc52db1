#include "model/fingerprint.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include <isa-l/crc.h>
#include <openssl/sha.h>

namespace headwater {

std::string CanonicalText(const ModelConfig& config) {
  return absl::StrFormat(
      "architecture=%d layers=%d hidden=%d intermediate=%d q_heads=%d kv_heads=%d head_dim=%d vocab=%d "
      "epsilon=%.9g tied=%d qkv_bias=%d output_bias=%d mlp_bias=%d qk_norm=%d rope: %s\n",
      static_cast<int>(config.architecture), config.num_layers, config.hidden_size, config.intermediate_size,
      config.num_q_heads, config.num_kv_heads, config.head_dim, config.vocab_size, config.rms_norm_epsilon,
      config.tied_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm,
      config.rope_text);
}

void Fingerprint::Add(absl::string_view name, const Tensor& tensor) {
  Add(name, tensor, Crc32c(tensor.data, tensor.bytes));
}

void Fingerprint::Add(absl::string_view name, const Tensor& tensor, uint32_t crc) {
  lines_.push_back(absl::StrFormat("%s %s [%s] %08x\n", absl::CHexEscape(name),
                                   absl::CHexEscape(tensor.dtype), absl::StrJoin(tensor.shape, ","), crc));
}

std::string Fingerprint::Finish(const ModelConfig& config) {
  std::sort(lines_.begin(), lines_.end());
  const std::string text = absl::StrCat(CanonicalText(config), absl::StrJoin(lines_, ""));
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), 8));
}

uint32_t Crc32c(const uint8_t* data, uint64_t bytes) {
  // ISA-L counts in int and leaves both inversions to the caller.
  constexpr uint64_t kMostAtOnce = 1u << 30;
  uint32_t crc = ~0u;
  while (bytes > 0) {
    const uint64_t count = std::min(bytes, kMostAtOnce);
    crc = crc32_iscsi(const_cast<uint8_t*>(data), static_cast<int>(count), crc);
    data += count;
    bytes -= count;
  }
  return ~crc;
}

}  // namespace headwater
