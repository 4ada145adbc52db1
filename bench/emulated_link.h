// A link's time on a stream.
#ifndef HW_BENCH_EMULATED_LINK_H_
#define HW_BENCH_EMULATED_LINK_H_

#include <cstdint>

#include <cuda_runtime_api.h>

namespace headwater {

// Enqueues: *began, in device memory, becomes the GPU's clock, in ns.
cudaError_t MarkTime(uint64_t* began, cudaStream_t stream);
// Enqueues: the stream goes on when `ns` have passed since then. One thread of one multiprocessor waits.
cudaError_t WaitSince(const uint64_t* began, uint64_t ns, cudaStream_t stream);

}  // namespace headwater

#endif  // HW_BENCH_EMULATED_LINK_H_
