#include "kernels/cuda/cuda_status.h"

#include <atomic>

namespace headwater::kernels {

Status CudaStatus(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  const StatusCode code =
      error == cudaErrorMemoryAllocation ? StatusCode::kResourceExhausted : StatusCode::kInternal;
  return {code, std::string(call) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error)};
}

Status RequireSm90(int* num_sms) {
  constexpr int kMaxDevices = 64;
  // 0: not asked yet; -1: another architecture.
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  int sms = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (sms == 0) {
    int major = 0, minor = 0;
    HW_KERNELS_RETURN_IF_CUDA_ERROR(
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    HW_KERNELS_RETURN_IF_CUDA_ERROR(
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    if (major != 9 || minor != 0) sms = -1;
    if (device < kMaxDevices) known[device].store(sms, std::memory_order_relaxed);
  }
  if (sms < 0) {
    return {StatusCode::kUnimplemented,
            "device " + std::to_string(device) + " is not compute capability 9.0"};
  }
  *num_sms = sms;
  return {};
}

}  // namespace headwater::kernels
