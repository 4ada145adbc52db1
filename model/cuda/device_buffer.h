// Memory of a GPU, and CUDA's errors as absl's.
#ifndef HW_MODEL_CUDA_DEVICE_BUFFER_H_
#define HW_MODEL_CUDA_DEVICE_BUFFER_H_

#include <cstdint>
#include <utility>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headwater {

// OK, RESOURCE_EXHAUSTED (out of memory) or INTERNAL with `what` and CUDA's own text; the error is cleared.
absl::Status FromCuda(cudaError_t error, absl::string_view what);

// Owns device memory, or pinned host memory that the device can read.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer() { Free(); }

  // On the current device, 256-byte aligned, not initialised. RESOURCE_EXHAUSTED with bytes asked and free,
  // and `what` they are for. 0 bytes: an empty buffer.
  static absl::StatusOr<DeviceBuffer> Allocate(uint64_t bytes, absl::string_view what);
  static absl::StatusOr<DeviceBuffer> AllocatePinned(uint64_t bytes, absl::string_view what);

  char* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  // Waits for the device, as cudaFree does.
  void Free();

 private:
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
  bool pinned_ = false;
};

}  // namespace headwater

#endif  // HW_MODEL_CUDA_DEVICE_BUFFER_H_
