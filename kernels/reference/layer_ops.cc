#include "kernels/reference/layer_ops.h"

#include <cmath>
#include <cstddef>

namespace headwater::kernels::reference {
namespace {

// One row into `out`.
void Normalise(const float* x, const float* weight, double epsilon, int64_t width, double* out) {
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double scale = 1 / std::sqrt(sum / static_cast<double>(width) + epsilon);
  for (int64_t i = 0; i < width; ++i)
    out[i] = static_cast<double>(x[i]) * scale * static_cast<double>(weight[i]);
}

// Pairs (i, i + half), in place.
void Rotate(const float* cos, const float* sin, int64_t half, double* x) {
  for (int64_t i = 0; i < half; ++i) {
    const double c = cos[i], s = sin[i], a = x[i], b = x[i + half];
    x[i] = a * c - b * s;
    x[i + half] = b * c + a * s;
  }
}

}  // namespace

std::vector<double> RmsNorm(const float* x, const float* weight, double epsilon, int64_t num_tokens,
                            int64_t width) {
  std::vector<double> out(static_cast<size_t>(num_tokens * width));
  for (int64_t i = 0; i < num_tokens; ++i) {
    Normalise(x + i * width, weight, epsilon, width, out.data() + i * width);
  }
  return out;
}

RopeTables RopeTable(const std::vector<int64_t>& positions, const std::vector<double>& inverse,
                     double factor) {
  RopeTables tables;
  for (const int64_t position : positions) {
    for (const double frequency : inverse) {
      const long double angle = static_cast<long double>(position) * static_cast<long double>(frequency);
      tables.cos.push_back(static_cast<double>(std::cos(angle)) * factor);
      tables.sin.push_back(static_cast<double>(std::sin(angle)) * factor);
    }
  }
  return tables;
}

Qkv SplitQkv(const SplitQkvArgs& a) {
  const int64_t dim = a.head_dim, half = dim / 2;
  Qkv out;
  const float* head = a.qkv;
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    for (int32_t i = 0; i < a.num_q_heads + 2 * a.num_kv_heads; ++i, head += dim) {
      const bool is_q = i < a.num_q_heads, is_v = i >= a.num_q_heads + a.num_kv_heads;
      std::vector<double> row(head, head + dim);
      const float* const norm = is_v ? nullptr : is_q ? a.q_norm : a.k_norm;
      if (norm != nullptr) Normalise(head, norm, a.epsilon, dim, row.data());
      if (!is_v) Rotate(a.cos + token * half, a.sin + token * half, half, row.data());
      std::vector<double>& to = is_q ? out.q : is_v ? out.v : out.k;
      to.insert(to.end(), row.begin(), row.end());
    }
  }
  return out;
}

std::vector<double> SiluMul(const float* gate_up, int64_t num_tokens, int64_t width) {
  std::vector<double> out;
  out.reserve(static_cast<size_t>(num_tokens * width));
  for (int64_t i = 0; i < num_tokens; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const double gate = gate_up[2 * i * width + j], up = gate_up[(2 * i + 1) * width + j];
      out.push_back(gate / (1 + std::exp(-gate)) * up);
    }
  }
  return out;
}

std::vector<double> Linear(const float* x, const float* weight, const float* bias, const float* y,
                           int64_t num_tokens, int64_t in, int64_t out) {
  std::vector<double> result(static_cast<size_t>(num_tokens * out));
  for (int64_t i = 0; i < num_tokens; ++i) {
    for (int64_t j = 0; j < out; ++j) {
      double sum = bias == nullptr ? 0 : static_cast<double>(bias[j]);
      if (y != nullptr) sum += static_cast<double>(y[i * out + j]);
      for (int64_t k = 0; k < in; ++k) {
        sum += static_cast<double>(x[i * in + k]) * static_cast<double>(weight[j * in + k]);
      }
      result[static_cast<size_t>(i * out + j)] = sum;
    }
  }
  return result;
}

}  // namespace headwater::kernels::reference
