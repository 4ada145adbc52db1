// DeviceToHostCopier: copies that may take long and that nothing waits for.
#ifndef HW_WORKER_CUDA_DEVICE_TO_HOST_COPIER_H_
#define HW_WORKER_CUDA_DEVICE_TO_HOST_COPIER_H_

#include <cstdint>
#include <memory>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headwater {

// Copies from device memory to ordinary host memory, in order, on a thread of its own.
class DeviceToHostCopier {
 public:
  // On the current device. RESOURCE_EXHAUSTED: no pinned memory.
  static absl::StatusOr<std::unique_ptr<DeviceToHostCopier>> Start();
  // Ends after the piece under way; what was not copied is not.
  virtual ~DeviceToHostCopier() = default;
  // Copies once `after` has come to where it is now. Both memories must stay until copied() says so, or the
  // end of this.
  virtual absl::Status Add(cudaStream_t after, const void* from, void* to, uint64_t bytes) = 0;
  // Bytes that have arrived, of all calls; an error of the device. Any thread.
  virtual absl::StatusOr<uint64_t> copied() const = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_DEVICE_TO_HOST_COPIER_H_
