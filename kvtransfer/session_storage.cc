#include "kvtransfer/session_storage.h"

#include <atomic>

namespace headwater {
namespace {

constexpr uint32_t kBlockStored = 0x53544f52;

}  // namespace

bool SessionStorage::BlockCrc(uint64_t block_index, uint32_t* crc) const {
  const uint64_t entry = std::atomic_ref(*Entry(block_index)).load(std::memory_order_acquire);
  if (crc != nullptr) *crc = static_cast<uint32_t>(entry >> 32);
  return static_cast<uint32_t>(entry) == kBlockStored;
}

void SessionStorage::MarkStored(uint64_t block_index, uint32_t crc) {
  const uint64_t entry = uint64_t{crc} << 32 | kBlockStored;
  std::atomic_ref(*Entry(block_index)).store(entry, std::memory_order_release);
}

uint64_t SessionStorage::CountStored() const {
  uint64_t count = 0;
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) count += IsStored(i) ? 1 : 0;
  return count;
}

KvDigest SessionStorage::Digest() const {
  KvDigest digest;
  for (uint64_t i = 0; i < geometry_.num_blocks(); ++i) {
    uint32_t crc = 0;
    if (BlockCrc(i, &crc)) digest.Add(i, geometry_.BytesOf(geometry_.BlockAt(i)), crc);
  }
  return digest;
}

void SessionStorage::ClearFrom(uint32_t resume_layer) {
  for (uint64_t i = 2 * uint64_t{resume_layer} * geometry_.blocks_per_tensor(); i < geometry_.num_blocks();
       ++i) {
    std::atomic_ref(*Entry(i)).store(0, std::memory_order_release);
  }
}

}  // namespace headwater
