#include "kernels/ops/layer_ops.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kernels/cpu/row_kernels.h"

namespace headwater::kernels {
namespace {

// A parallel region costs about as much as this many elements.
constexpr int64_t kParallelElements = 1 << 14;
// Rows of other types pass through f32 buffers of this size on the stack.
constexpr int64_t kPiece = 512;
static_assert(kPiece >= kMaxRotaryHeadDim);

const char* At(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * static_cast<int64_t>(SizeOf(dtype));
}
char* At(void* base, DType dtype, int64_t element) {
  return static_cast<char*>(base) + element * static_cast<int64_t>(SizeOf(dtype));
}

// Where f32 results for `out` go: `out` itself if it is f32, else `buffer`, which Store() then converts.
float* Target(void* out, DType dtype, float* buffer) {
  return dtype == DType::kF32 ? static_cast<float*>(out) : buffer;
}
void Store(const float* values, int64_t count, void* out, DType dtype) {
  if (dtype != DType::kF32) Convert(values, DType::kF32, out, dtype, static_cast<size_t>(count));
}

const float* Load(const void* from, DType dtype, int64_t count, float* buffer) {
  if (dtype == DType::kF32) return static_cast<const float*>(from);
  Convert(from, dtype, buffer, DType::kF32, static_cast<size_t>(count));
  return buffer;
}

float InverseRms(const cpu::RowKernels& rows, const float* x, int64_t width, float epsilon) {
  const float mean = rows.sum_of_squares(x, width) / static_cast<float>(width);
  return 1.0f / std::sqrt(mean + epsilon);
}

void NormaliseAndRotate(const cpu::RowKernels& rows, const SplitQkvArgs& args, int64_t token, const float* x,
                        const float* norm, void* out) {
  float normalised[kMaxRotaryHeadDim];
  float rotated[kMaxRotaryHeadDim];
  if (norm != nullptr) {
    rows.scale_by_weight(x, InverseRms(rows, x, args.head_dim, args.epsilon), norm, normalised,
                         args.head_dim);
    x = normalised;
  }
  const int64_t half = args.head_dim / 2;
  float* target = Target(out, args.out_dtype, rotated);
  rows.rotate(x, args.cos + token * half, args.sin + token * half, target, half);
  Store(target, args.head_dim, out, args.out_dtype);
}

void SplitRow(const cpu::RowKernels& rows, const SplitQkvArgs& args, int64_t token) {
  const int64_t head_dim = args.head_dim;
  const float* row = args.qkv + token * (args.num_q_heads + 2 * int64_t{args.num_kv_heads}) * head_dim;
  for (int64_t head = 0; head < args.num_q_heads; ++head) {
    void* out = At(args.q, args.out_dtype, (token * args.num_q_heads + head) * head_dim);
    NormaliseAndRotate(rows, args, token, row + head * head_dim, args.q_norm, out);
  }
  row += args.num_q_heads * head_dim;
  const int64_t kv_width = args.num_kv_heads * head_dim;
  for (int64_t head = 0; head < args.num_kv_heads; ++head) {
    void* out = At(args.k, args.out_dtype, token * kv_width + head * head_dim);
    NormaliseAndRotate(rows, args, token, row + head * head_dim, args.k_norm, out);
  }
  Convert(row + kv_width, DType::kF32, At(args.v, args.out_dtype, token * kv_width), args.out_dtype,
          static_cast<size_t>(kv_width));
}

// cos and sin of position * inverse. The product of the two doubles is kept whole: its rounding error alone
// would be felt from positions of about 2^26 on.
void CosSin(double position, double inverse, double factor, float* cos, float* sin) {
  const double angle = position * inverse;
  const double rest = std::fma(position, inverse, -angle);
  const double c = std::cos(angle);
  const double s = std::sin(angle);
  const double rest_cos = std::fabs(rest) < 1e-9 ? 1.0 : std::cos(rest);
  const double rest_sin = std::fabs(rest) < 1e-9 ? rest : std::sin(rest);
  *cos = static_cast<float>((c * rest_cos - s * rest_sin) * factor);
  *sin = static_cast<float>((s * rest_cos + c * rest_sin) * factor);
}

}  // namespace

void EmbedTokens(const void* table, DType dtype, int64_t width, const int32_t* ids, int64_t num_tokens,
                 float* out) {
#pragma omp parallel for schedule(static) if (num_tokens * width > kParallelElements)
  for (int64_t i = 0; i < num_tokens; ++i) {
    Convert(At(table, dtype, ids[i] * width), dtype, out + i * width, DType::kF32,
            static_cast<size_t>(width));
  }
}

void RmsNorm(const float* x, const float* weight, float epsilon, int64_t num_tokens, int64_t width, void* out,
             DType out_dtype) {
  const cpu::RowKernels& rows = cpu::ActiveRowKernels();
#pragma omp parallel for schedule(static) if (num_tokens * width > kParallelElements)
  for (int64_t i = 0; i < num_tokens; ++i) {
    const float* row = x + i * width;
    const float scale = InverseRms(rows, row, width, epsilon);
    float buffer[kPiece];
    for (int64_t j = 0; j < width; j += kPiece) {
      const int64_t count = std::min(kPiece, width - j);
      void* piece = At(out, out_dtype, i * width + j);
      float* target = Target(piece, out_dtype, buffer);
      rows.scale_by_weight(row + j, scale, weight + j, target, count);
      Store(target, count, piece, out_dtype);
    }
  }
}

void RopeTable(const RopeFrequencies& frequencies, int64_t begin, int64_t num_tokens, float* cos,
               float* sin) {
  const auto half = static_cast<int64_t>(frequencies.inverse.size());
#pragma omp parallel for schedule(static) if (num_tokens * half > 512)
  for (int64_t i = 0; i < num_tokens; ++i) {
    for (int64_t j = 0; j < half; ++j) {
      CosSin(static_cast<double>(begin + i), frequencies.inverse[static_cast<size_t>(j)],
             frequencies.attention_factor, cos + i * half + j, sin + i * half + j);
    }
  }
}

void SplitQkv(const SplitQkvArgs& args) {
  const cpu::RowKernels& rows = cpu::ActiveRowKernels();
  const int64_t width = (args.num_q_heads + 2 * int64_t{args.num_kv_heads}) * args.head_dim;
#pragma omp parallel for schedule(static) if (args.num_tokens * width > kParallelElements)
  for (int64_t token = 0; token < args.num_tokens; ++token) SplitRow(rows, args, token);
}

void SiluMul(const void* gate_up, DType gate_up_dtype, int64_t num_tokens, int64_t width, void* out,
             DType out_dtype) {
  const cpu::RowKernels& rows = cpu::ActiveRowKernels();
#pragma omp parallel for schedule(static) if (num_tokens * width > kParallelElements / 4)
  for (int64_t i = 0; i < num_tokens; ++i) {
    float gate_buffer[kPiece];
    float up_buffer[kPiece];
    float out_buffer[kPiece];
    for (int64_t j = 0; j < width; j += kPiece) {
      const int64_t count = std::min(kPiece, width - j);
      const float* gate =
          Load(At(gate_up, gate_up_dtype, 2 * i * width + j), gate_up_dtype, count, gate_buffer);
      const float* up =
          Load(At(gate_up, gate_up_dtype, (2 * i + 1) * width + j), gate_up_dtype, count, up_buffer);
      void* piece = At(out, out_dtype, i * width + j);
      float* target = Target(piece, out_dtype, out_buffer);
      rows.silu_mul(gate, up, target, count);
      Store(target, count, piece, out_dtype);
    }
  }
}

int64_t FirstNonFiniteRow(const float* x, int64_t num_tokens, int64_t width) {
  const cpu::RowKernels& rows = cpu::ActiveRowKernels();
  int64_t first = num_tokens;
#pragma omp parallel for schedule(static) reduction(min : first) if (num_tokens * width > kParallelElements)
  for (int64_t i = 0; i < num_tokens; ++i) {
    if (!rows.all_finite(x + i * width, width)) first = std::min(first, i);
  }
  return first == num_tokens ? -1 : first;
}

}  // namespace headwater::kernels
