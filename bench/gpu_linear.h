// A GPU's floor for linear layers.
#ifndef HW_BENCH_GPU_LINEAR_H_
#define HW_BENCH_GPU_LINEAR_H_

#include <cstdint>

#include "absl/status/statusor.h"

#include "bench/prefill_report.h"
#include "model/config.h"
#include "model/cuda/cuda_model.h"

namespace headwater {

// On the current device: the matrix products of one layer alone, `rows` tokens at a time.
absl::StatusOr<LinearRate> MeasureGpuLinear(const ModelConfig& config, LinearType type, int64_t rows);

}  // namespace headwater

#endif  // HW_BENCH_GPU_LINEAR_H_
