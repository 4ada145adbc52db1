#include "model/cuda/device_buffer.h"

#include "absl/strings/str_cat.h"

namespace headwater {

absl::Status FromCuda(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  const std::string text = absl::StrCat(what, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this == &other) return *this;
  Free();
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  pinned_ = other.pinned_;
  return *this;
}

absl::StatusOr<DeviceBuffer> DeviceBuffer::Allocate(uint64_t bytes, absl::string_view what) {
  DeviceBuffer buffer;
  if (bytes == 0) return buffer;
  if (const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&buffer.data_), bytes);
      error != cudaSuccess) {
    buffer.data_ = nullptr;
    size_t free = 0, total = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&free, &total);
    return FromCuda(error,
                    absl::StrCat(what, ": ", bytes, " bytes of device memory, of which ", free, " are free"));
  }
  buffer.bytes_ = bytes;
  return buffer;
}

absl::StatusOr<DeviceBuffer> DeviceBuffer::AllocatePinned(uint64_t bytes, absl::string_view what) {
  DeviceBuffer buffer;
  buffer.pinned_ = true;
  if (bytes == 0) return buffer;
  const cudaError_t error = cudaHostAlloc(reinterpret_cast<void**>(&buffer.data_), bytes,
                                          cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) {
    buffer.data_ = nullptr;
    return FromCuda(error, absl::StrCat(what, ": ", bytes, " bytes of pinned memory"));
  }
  buffer.bytes_ = bytes;
  return buffer;
}

void DeviceBuffer::Free() {
  if (data_ == nullptr) return;
  if (pinned_) {
    (void)cudaFreeHost(data_);
  } else {
    (void)cudaFree(data_);
  }
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace headwater
