// Identity of a checkpoint: what decides the values that it computes.
#ifndef HW_MODEL_FINGERPRINT_H_
#define HW_MODEL_FINGERPRINT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

#include "model/config.h"
#include "model/safetensors.h"

namespace headwater {

// The config fields that change results, as text. Limits and end tokens (max_position, eos_token_ids) are not
// among them: they do not change a KV cache.
std::string CanonicalText(const ModelConfig& config);

// Collects tensors; the order of Add() does not matter, so sharding does not either.
//
// Every tensor counts with its name, dtype, shape and whole content. The content enters as a CRC-32C (ISA-L,
// above 10 GB/s from memory), not as a cryptographic hash: the fingerprint tells checkpoints apart, it does
// not withstand a forger.
class Fingerprint {
 public:
  void Add(absl::string_view name, const Tensor& tensor);
  // With the content's CRC-32C where it is known already.
  void Add(absl::string_view name, const Tensor& tensor, uint32_t crc);
  // The first 16 hex digits of SHA-256 over CanonicalText(config) and the sorted lines of the tensors.
  std::string Finish(const ModelConfig& config);

 private:
  std::vector<std::string> lines_;
};

// CRC-32C of any number of bytes.
uint32_t Crc32c(const uint8_t* data, uint64_t bytes);

}  // namespace headwater

#endif  // HW_MODEL_FINGERPRINT_H_
