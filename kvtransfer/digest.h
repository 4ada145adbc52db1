// Digest of a whole KV cache that ranks can compute apart and in any order.
#ifndef HW_KVTRANSFER_DIGEST_H_
#define HW_KVTRANSFER_DIGEST_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace headwater {

// Sum modulo 2^128 of the first 16 bytes of SHA-256(block index u64, payload bytes u64, CRC32C u32, little
// endian), over all blocks: a set hash in the manner of Bellare and Micciancio's AdHash. It proves that
// sender and receiver hold the same set of (block, checksum); it is no defence against a sender that lies.
class KvDigest {
 public:
  void Add(uint64_t block_index, uint64_t payload_bytes, uint32_t crc32c);
  void Merge(const KvDigest& other);

  // 16 bytes, little endian.
  std::string Bytes() const;
  // False: not 16 bytes.
  static bool FromBytes(absl::string_view bytes, KvDigest* digest);
  // Hex of Bytes().
  std::string Hex() const;

  friend bool operator==(const KvDigest& a, const KvDigest& b) {
    return a.low_ == b.low_ && a.high_ == b.high_;
  }

 private:
  uint64_t low_ = 0;
  uint64_t high_ = 0;
};

// CRC-32C (Castagnoli), as iSCSI and gRPC-based stores use it.
uint32_t Crc32c(const void* data, uint64_t bytes);
// The CRC of a text whose beginning has the CRC `crc` (0: nothing yet) and that goes on with `data`.
uint32_t ExtendCrc32c(uint32_t crc, const void* data, uint64_t bytes);

}  // namespace headwater

#endif  // HW_KVTRANSFER_DIGEST_H_
