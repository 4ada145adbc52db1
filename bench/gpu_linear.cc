#include "bench/gpu_linear.h"

#include <algorithm>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/time/clock.h"

#include "base/status_macros.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/quantize.h"
#include "model/cuda/device_buffer.h"
#include "model/kernel_status.h"

namespace headwater {
namespace {

constexpr uint32_t kSeed = 20261122;

struct LinearShape {
  int64_t in, out;
  kernels::DType y;
  bool accumulate;
};

// Numbers of ordinary size: a device that multiplies zeros draws less power and is faster.
absl::Status FillWithNumbers(const DeviceBuffer& buffer) {
  std::mt19937 random(kSeed);
  std::vector<uint16_t> values(1 << 20);
  for (uint16_t& value : values) value = static_cast<uint16_t>(0x3c00 | (random() & 0x83ff));
  for (uint64_t at = 0; at < buffer.bytes(); at += values.size() * 2) {
    HW_RETURN_IF_ERROR(FromCuda(
        cudaMemcpy(buffer.data() + at, values.data(),
                   std::min<uint64_t>(values.size() * 2, buffer.bytes() - at), cudaMemcpyHostToDevice),
        "inputs"));
  }
  return absl::OkStatus();
}

// bf16 [rows, width] becomes e4m3 with a scale a row.
absl::Status Quantize(int64_t rows, int64_t width, DeviceBuffer* x, DeviceBuffer* scale) {
  HW_ASSIGN_OR_RETURN(DeviceBuffer out,
                      DeviceBuffer::Allocate(static_cast<uint64_t>(rows * width), "operands in fp8"));
  HW_ASSIGN_OR_RETURN(*scale, DeviceBuffer::Allocate(static_cast<uint64_t>(rows) * sizeof(float), "scales"));
  HW_RETURN_IF_ERROR(
      FromKernels(kernels::CudaQuantizeRows(
                      {x->data(), out.data(), reinterpret_cast<float*>(scale->data()), rows, width}, nullptr),
                  "operands in fp8"));
  *x = std::move(out);
  return absl::OkStatus();
}

// Seconds of one product of `rows` rows: the median of rounds.
absl::StatusOr<double> TimeLinear(kernels::CudaLinear* linear, LinearType type, const LinearShape& shape,
                                  int64_t rows) {
  const auto bytes = [](int64_t a, int64_t b, int64_t size) { return static_cast<uint64_t>(a * b * size); };
  HW_ASSIGN_OR_RETURN(DeviceBuffer x, DeviceBuffer::Allocate(bytes(rows, shape.in, 2), "x"));
  HW_ASSIGN_OR_RETURN(DeviceBuffer w, DeviceBuffer::Allocate(bytes(shape.out, shape.in, 2), "weight"));
  HW_ASSIGN_OR_RETURN(const DeviceBuffer y, DeviceBuffer::Allocate(bytes(rows, shape.out, 4), "y"));
  for (const DeviceBuffer* buffer : {&x, &w}) HW_RETURN_IF_ERROR(FillWithNumbers(*buffer));
  HW_RETURN_IF_ERROR(FromCuda(cudaMemset(y.data(), 0, y.bytes()), "outputs"));
  DeviceBuffer x_scale, w_scale;
  if (type == LinearType::kFP8) {
    HW_RETURN_IF_ERROR(Quantize(rows, shape.in, &x, &x_scale));
    HW_RETURN_IF_ERROR(Quantize(shape.out, shape.in, &w, &w_scale));
  }
  const auto run = [&](int times) -> absl::Status {
    for (int i = 0; i < times; ++i) {
      HW_RETURN_IF_ERROR(
          FromKernels(linear->Run({x.data(), w.data(), nullptr, y.data(), shape.y, shape.accumulate, rows,
                                   shape.in, shape.out, reinterpret_cast<const float*>(x_scale.data()),
                                   reinterpret_cast<const float*>(w_scale.data())},
                                  nullptr),
                      "linear"));
    }
    return FromCuda(cudaDeviceSynchronize(), "linear");
  };
  constexpr int kTimes = 5;
  HW_RETURN_IF_ERROR(run(3));
  std::vector<double> rounds(7);
  for (double& round : rounds) {
    const absl::Time start = absl::Now();
    HW_RETURN_IF_ERROR(run(kTimes));
    round = absl::ToDoubleSeconds(absl::Now() - start) / kTimes;
  }
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 2];
}

}  // namespace

absl::StatusOr<LinearRate> MeasureGpuLinear(const ModelConfig& c, LinearType type, int64_t rows) {
  const int64_t hidden = c.hidden_size, inner = c.intermediate_size;
  const int64_t q = int64_t{c.num_q_heads} * c.head_dim, kv = int64_t{c.num_kv_heads} * c.head_dim;
  std::unique_ptr<kernels::CudaLinear> linear;
  HW_RETURN_IF_ERROR(FromKernels(kernels::CudaLinear::Create({}, &linear), "cuBLASLt"));
  LinearRate rate;
  HW_ASSIGN_OR_RETURN(
      rate.projection_s,
      TimeLinear(linear.get(), type, {hidden, q + 2 * kv, kernels::DType::kBF16, false}, rows));
  for (const LinearShape& shape : {LinearShape{q, hidden, kernels::DType::kF32, true},
                                   LinearShape{hidden, 2 * inner, kernels::DType::kBF16, false},
                                   LinearShape{inner, hidden, kernels::DType::kF32, true}}) {
    HW_ASSIGN_OR_RETURN(const double seconds, TimeLinear(linear.get(), type, shape, rows));
    rate.rest_s += seconds;
  }
  rate.projection_s /= static_cast<double>(rows);
  rate.rest_s /= static_cast<double>(rows);
  return rate;
}

}  // namespace headwater
