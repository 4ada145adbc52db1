// A prompt for the tests of FlexPrefill's stages, on the host and on the device.
#ifndef HW_TESTS_KERNELS_CUDA_FLEX_PROBLEM_H_
#define HW_TESTS_KERNELS_CUDA_FLEX_PROBLEM_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/reference/policies/problem.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {

struct FlexProblem {
  // Noise around topics that change every 200 tokens, so that some columns and diagonals stand out.
  FlexProblem(int64_t tokens, int q_heads, int kv_heads, int dim, float strength = 1)
      : q(Topics(tokens, q_heads, dim, strength, 1)),
        k(Topics(tokens, kv_heads, dim, strength / 2, 2)),
        dq(ToBf16(q)),
        dk(ToBf16(k)),
        problem{q.data(), k.data(), nullptr, tokens, q_heads, kv_heads, dim, 1 / std::sqrt(double(dim))} {}

  static std::vector<float> Topics(int64_t tokens, int heads, int dim, float strength, uint32_t seed) {
    std::vector<float> x = RandomBf16(static_cast<size_t>(tokens) * heads * dim, seed);
    const std::vector<float> topics = RandomBf16(size_t{7} * dim, 99);
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t topic = token / 200 * 5 % 7;
      for (int64_t i = 0; i < int64_t{heads} * dim; ++i) {
        x[token * heads * dim + i] += strength * topics[topic * dim + i % dim];
      }
    }
    return ToFloat(ToBf16(x));
  }

  // Sizes, q and scale of a stage's arguments.
  template <class Args>
  Args Of() const {
    Args args;
    args.q = dq.data();
    args.num_tokens = problem.num_tokens;
    args.num_q_heads = problem.num_q_heads;
    args.num_kv_heads = problem.num_kv_heads;
    args.head_dim = problem.head_dim;
    args.softmax_scale = static_cast<float>(problem.softmax_scale);
    return args;
  }

  // What f32 sums leave uncertain of a scaled score, and so relatively of a probability: every product
  // counts, whatever the sum comes to.
  double ScoreError() const {
    const auto norm = [&](const std::vector<float>& x) {
      double most = 0;
      for (size_t row = 0; row < x.size(); row += problem.head_dim) {
        double square = 0;
        for (int i = 0; i < problem.head_dim; ++i) square += double{x[row + i]} * x[row + i];
        most = std::fmax(most, std::sqrt(square));
      }
      return most;
    };
    return 0x1p-21 * (1 + problem.softmax_scale * norm(q) * norm(k));
  }

  int64_t Blocks() const { return (problem.num_tokens + 127) / 128; }

  std::vector<float> q, k;
  DeviceArray<uint16_t> dq, dk;
  reference::PolicyProblem problem;
};

template <typename T>
std::vector<double> Doubles(const std::vector<T>& x, size_t row, size_t length) {
  return {x.begin() + row * length, x.begin() + (row + 1) * length};
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_FLEX_PROBLEM_H_
