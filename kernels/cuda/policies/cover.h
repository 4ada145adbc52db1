// How many of the largest entries hold a given share, without sorting.
#ifndef HW_KERNELS_CUDA_POLICIES_COVER_H_
#define HW_KERNELS_CUDA_POLICIES_COVER_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/status.h"

namespace headwater::kernels {

struct CudaCoverArgs {
  // Device memory, 16-byte aligned. Entries that are not positive numbers count as 0, those over 128 as 128.
  const float* x = nullptr;   // [num_rows, length]
  int64_t length = 0;         // 1 to 2^38
  int32_t num_rows = 0;       // 1 to 65535
  double share = 0;           // 0 to most_sum
  double most_sum = 1;        // 2^-30 to 2^40: a row's sum is less than twice that
  int64_t* counts = nullptr;  // [num_rows]
};

// 256-byte aligned device memory that CudaCover() needs: 32 KiB a row.
size_t CudaCoverWorkspaceBytes(const CudaCoverArgs& args);

// counts[r] = how many entries of row r, largest first, have a running sum of at most `share`, plus one. Sums
// are exact to 2^-60 of most_sum; equal calls give equal bits.
//
// Enqueues on `stream`; arrays and workspace must live until it has passed. INVALID_ARGUMENT: null or
// misaligned arrays, a value out of range, a workspace too small. UNIMPLEMENTED: a device that is not sm_90.
// INTERNAL: a CUDA call failed. Cost: three reads of x, the first with three atomic operations on shared
// memory an entry.
Status CudaCover(const CudaCoverArgs& args, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_COVER_H_
