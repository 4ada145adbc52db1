// Reader of safetensors files, single or sharded, over mmap. Nothing in a file is believed before it is
// checked.
//
// A file is: u64 little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the
// tensors' bytes. As the format demands, the tensors must cover the data part without holes or overlaps.
//
// The maps are private and read-only. A file that shrinks while it is mapped raises SIGBUS in whoever reads
// the missing pages; that is out of scope here: model directories must not be truncated in place (replacing a
// file by rename is safe).
#ifndef HW_MODEL_SAFETENSORS_H_
#define HW_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

#include "kernels/dtype.h"

namespace headwater {

inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 32u << 20;
inline constexpr size_t kMaxSafetensorsTensors = 65'536;
inline constexpr size_t kMaxTensorNameBytes = 512;
inline constexpr size_t kMaxTensorRank = 8;
inline constexpr size_t kMaxSafetensorsShards = 4096;

// One tensor; row-major. `data` points into a map and has no alignment.
struct Tensor {
  std::string dtype;                      // as the file spells it
  std::optional<kernels::DType> element;  // set for F32, F16 and BF16
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  uint64_t bytes = 0;
};

// Tensors by name.
using TensorMap = std::map<std::string, Tensor, std::less<>>;

// Reads a whole file that lies at `file`; the tensors point into it. INVALID_ARGUMENT names the first rule
// broken. A dtype that is not of the format is let through, its byte count unchecked, so that it is refused
// only where it is used.
absl::StatusOr<TensorMap> ParseSafetensors(const uint8_t* file, uint64_t size);

// A file mapped read-only; unmapped by the destructor.
class MappedFile {
 public:
  // NOT_FOUND, PERMISSION_DENIED and so on: the system's error. INVALID_ARGUMENT: not a regular file, or
  // empty.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  MappedFile(const uint8_t* data, uint64_t size) : data_(data), size_(size) {}

  const uint8_t* const data_;
  const uint64_t size_;
};

// All tensors of a checkpoint directory. Immutable; thread-safe. Tensors live as long as this.
class Checkpoint {
 public:
  // Opens model.safetensors or, where that is absent, the shards that model.safetensors.index.json lists.
  // NOT_FOUND: neither exists, or a shard does not. INVALID_ARGUMENT: as ParseSafetensors(), or an index that
  // is malformed, names a shard by a path, or places a tensor in a shard that lacks it; the message names the
  // file.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& directory);

  // Null: no such tensor.
  const Tensor* Find(absl::string_view name) const;
  const TensorMap& tensors() const { return tensors_; }

 private:
  Checkpoint() = default;
  absl::Status AddShards(const std::string& directory, absl::string_view index_text);

  std::vector<std::unique_ptr<MappedFile>> files_;
  TensorMap tensors_;
};

// Tells the system that the pages of [data, data + bytes) will be read soon, or not again. Only a hint.
void PrefetchPages(const uint8_t* data, uint64_t bytes);
void ReleasePages(const uint8_t* data, uint64_t bytes);

}  // namespace headwater

#endif  // HW_MODEL_SAFETENSORS_H_
