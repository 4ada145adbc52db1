#include "kvtransfer/digest.h"

#include <algorithm>
#include <array>

#include "absl/strings/escaping.h"
#include <isa-l/crc.h>
#include <openssl/sha.h>

namespace headwater {
namespace {

void StoreLittle(uint64_t value, int bytes, unsigned char* out) {
  for (int i = 0; i < bytes; ++i) out[i] = static_cast<unsigned char>(value >> (8 * i));
}

uint64_t LoadLittle64(const unsigned char* in) {
  uint64_t value = 0;
  for (int i = 0; i < 8; ++i) value |= uint64_t{in[i]} << (8 * i);
  return value;
}

}  // namespace

void KvDigest::Add(uint64_t block_index, uint64_t payload_bytes, uint32_t crc32c) {
  std::array<unsigned char, 20> message;
  StoreLittle(block_index, 8, message.data());
  StoreLittle(payload_bytes, 8, message.data() + 8);
  StoreLittle(crc32c, 4, message.data() + 16);
  std::array<unsigned char, SHA256_DIGEST_LENGTH> hash;
  SHA256(message.data(), message.size(), hash.data());
  KvDigest term;
  term.low_ = LoadLittle64(hash.data());
  term.high_ = LoadLittle64(hash.data() + 8);
  Merge(term);
}

void KvDigest::Merge(const KvDigest& other) {
  low_ += other.low_;
  high_ += other.high_ + (low_ < other.low_ ? 1 : 0);
}

std::string KvDigest::Bytes() const {
  std::array<unsigned char, 16> out;
  StoreLittle(low_, 8, out.data());
  StoreLittle(high_, 8, out.data() + 8);
  return std::string(out.begin(), out.end());
}

bool KvDigest::FromBytes(absl::string_view bytes, KvDigest* digest) {
  if (bytes.size() != 16) return false;
  const auto* in = reinterpret_cast<const unsigned char*>(bytes.data());
  digest->low_ = LoadLittle64(in);
  digest->high_ = LoadLittle64(in + 8);
  return true;
}

std::string KvDigest::Hex() const { return absl::BytesToHexString(Bytes()); }

uint32_t ExtendCrc32c(uint32_t crc, const void* data, uint64_t bytes) {
  // isa-l takes an int length, a buffer that it does not change, and leaves both inversions to the caller.
  constexpr uint64_t kMostBytes = 1ull << 30;
  auto* at = const_cast<unsigned char*>(static_cast<const unsigned char*>(data));
  uint32_t state = ~crc;
  while (bytes > 0) {
    const uint64_t now = std::min(bytes, kMostBytes);
    state = crc32_iscsi(at, static_cast<int>(now), state);
    at += now;
    bytes -= now;
  }
  return ~state;
}

uint32_t Crc32c(const void* data, uint64_t bytes) { return ExtendCrc32c(0, data, bytes); }

}  // namespace headwater
