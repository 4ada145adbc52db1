// Attention of a prompt whose rows each read some keys, on the GPU and in double precision.
#ifndef HW_TESTS_KERNELS_CUDA_RANGE_PROBLEM_H_
#define HW_TESTS_KERNELS_CUDA_RANGE_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/policy.h"
#include "kernels/cuda/range_attention.h"
#include "kernels/reference/policies/problem.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {

struct Shape {
  const char* name;
  int q_heads, kv_heads, head_dim, tokens;

  int Tiles() const { return static_cast<int>(CudaRangeTiles(tokens)); }
  CudaPolicyShape Policy() const {
    return {1, q_heads, kv_heads, head_dim, static_cast<float>(1 / std::sqrt(head_dim))};
  }
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << shape.name; }

// bf16 values, in float and on the device.
struct RangeProblem {
  Shape shape;
  std::vector<float> q, k, v;
  DeviceArray<uint16_t> dq, dk, dv, out;
  DeviceArray<float> lse;

  RangeProblem(const Shape& s, uint32_t seed)
      : RangeProblem(s, RandomBf16(size_t{1} * s.tokens * s.q_heads * s.head_dim, seed),
                     RandomBf16(size_t{1} * s.tokens * s.kv_heads * s.head_dim, seed + 1),
                     RandomBf16(size_t{1} * s.tokens * s.kv_heads * s.head_dim, seed + 2)) {}
  RangeProblem(const Shape& s, std::vector<float> queries, std::vector<float> keys, std::vector<float> values)
      : shape(s),
        q(std::move(queries)),
        k(std::move(keys)),
        v(std::move(values)),
        dq(ToBf16(q)),
        dk(ToBf16(k)),
        dv(ToBf16(v)),
        out(q.size()),
        lse(size_t{1} * s.tokens * s.q_heads) {}

  CudaPolicyLayer Layer() const { return {0, dq.data(), dk.data(), dv.data()}; }
  CudaRangeAttentionArgs Args(const CudaKeyRanges& ranges) const {
    return {dq.data(),    dk.data(),     dv.data(),      out.data(),     lse.data(),
            shape.tokens, shape.q_heads, shape.kv_heads, shape.head_dim, shape.Policy().softmax_scale,
            ranges};
  }
  reference::PolicyProblem Reference() const {
    return {
        q.data(),      k.data(),       v.data(),       shape.tokens,
        shape.q_heads, shape.kv_heads, shape.head_dim, 1 / std::sqrt(static_cast<double>(shape.head_dim))};
  }

  // out and lse in double over the keys of (head, row); rows without keys: 0 and -infinity.
  void Attend(const std::function<std::vector<int64_t>(int head, int row)>& keys_of,
              std::vector<double>* wanted, std::vector<double>* wanted_lse) const {
    const reference::PolicyProblem problem = Reference();
    const int dim = shape.head_dim, group = shape.q_heads / shape.kv_heads;
    wanted->assign(q.size(), 0);
    wanted_lse->assign(size_t{1} * shape.tokens * shape.q_heads, -std::numeric_limits<double>::infinity());
#pragma omp parallel for schedule(dynamic)
    for (int row = 0; row < shape.tokens; ++row) {
      for (int head = 0; head < shape.q_heads; ++head) {
        const std::vector<int64_t> keys = keys_of(head, row);
        if (keys.empty()) continue;
        std::vector<double> scores;
        for (const int64_t key : keys) {
          double dot = 0;
          for (int i = 0; i < dim; ++i) {
            dot += static_cast<double>(problem.Q(row, head)[i]) * problem.K(key, head)[i];
          }
          scores.push_back(dot * problem.softmax_scale);
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        const size_t at = static_cast<size_t>(row) * shape.q_heads + head;
        double* const to = wanted->data() + at * dim;
        double sum = 0;
        for (size_t n = 0; n < keys.size(); ++n) {
          const double weight = std::exp(scores[n] - top);
          sum += weight;
          const float* const value = &v[(keys[n] * shape.kv_heads + head / group) * dim];
          for (int i = 0; i < dim; ++i) to[i] += weight * value[i];
        }
        for (int i = 0; i < dim; ++i) to[i] /= sum;
        (*wanted_lse)[at] = top + std::log(sum);
      }
    }
  }

  // Runs the attention over `ranges` and compares.
  void ExpectAttention(const CudaKeyRanges& ranges,
                       const std::function<std::vector<int64_t>(int head, int row)>& keys_of) const {
    const Status status = CudaRangeAttention(Args(ranges), nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    std::vector<double> wanted, wanted_lse;
    Attend(keys_of, &wanted, &wanted_lse);
    const std::vector<float> got = ToFloat(out.Host()), got_lse = lse.Host();
    double error = 0, size = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      // Of one element: bf16 rounding of the weights and of the result.
      ASSERT_NEAR(got[i], wanted[i], 0.02) << "element " << i;
      error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
      size += wanted[i] * wanted[i];
    }
    EXPECT_LE(std::sqrt(error), 4e-3 * std::sqrt(size));
    for (size_t i = 0; i < got_lse.size(); ++i) {
      if (std::isinf(wanted_lse[i])) {
        ASSERT_EQ(got_lse[i], -std::numeric_limits<float>::infinity()) << "row " << i;
      } else {
        ASSERT_NEAR(got_lse[i], wanted_lse[i], 1e-4) << "row " << i;
      }
    }
    EXPECT_TRUE(out.Intact() && lse.Intact());
  }
};

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_RANGE_PROBLEM_H_
