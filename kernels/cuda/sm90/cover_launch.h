// Of each row, the largest entries that hold a given share of its sum, by radix selection.
#ifndef HW_KERNELS_CUDA_SM90_COVER_LAUNCH_H_
#define HW_KERNELS_CUDA_SM90_COVER_LAUNCH_H_

#include <cstdint>

#include <cuda_runtime_api.h>

namespace headwater::kernels::sm90 {

inline constexpr int kCoverBins = 2048;

struct CoverBin {
  uint64_t mantissas;  // the sum of entries, in units of their last place
  uint64_t entries;
};

// What was selected: entries with a key (RadixKey() of radix.cuh) above `key`, and `take` of the `ties` that
// have that key. ties <= take: all of them.
struct CoverState {
  uint64_t rest;   // of the share; while selecting
  uint64_t count;  // of entries above `key`; in the end of all
  uint64_t take;
  uint64_t ties;
  uint32_t key;
  uint32_t done;
};

struct CoverParams {
  const float* x;  // [rows, length]
  int64_t length;
  int32_t rows;
  const int32_t* num_active;  // device memory: only rows with first_active + row < *num_active; null: all
  int32_t first_active;
  uint64_t share;  // times 2^fraction_bits
  int32_t fraction_bits;
  CoverBin* bins;      // [rows, kCoverBins]
  CoverState* states;  // [rows], written
  int64_t* counts;     // [rows], written: count + 1; or null
};

// share and fraction_bits for rows with a sum under twice most_sum.
CoverParams CoverOf(double share, double most_sum);

cudaError_t LaunchCover(const CoverParams& params, cudaStream_t stream);

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_COVER_LAUNCH_H_
