// A seeded problem for the tests of kernels/reference/policies/. Owns what PolicyProblem points to.
#ifndef HW_TESTS_KERNELS_POLICIES_RANDOM_PROBLEM_H_
#define HW_TESTS_KERNELS_POLICIES_RANDOM_PROBLEM_H_

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"

namespace headwater::kernels::reference {

struct RandomProblem {
  RandomProblem(int64_t num_tokens, int32_t num_q_heads, int32_t num_kv_heads, int32_t head_dim,
                uint32_t seed = 1)
      : q(num_tokens * num_q_heads * head_dim), k(num_tokens * num_kv_heads * head_dim), v(k.size()) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& value : q) value = normal(random);
    for (float& value : k) value = normal(random);
    for (float& value : v) value = normal(random);
    get.num_tokens = num_tokens;
    get.num_q_heads = num_q_heads;
    get.num_kv_heads = num_kv_heads;
    get.head_dim = head_dim;
    get.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
    Point();
  }
  RandomProblem(const RandomProblem& other) : q(other.q), k(other.k), v(other.v), get(other.get) { Point(); }

  void Point() {
    get.q = q.data();
    get.k = k.data();
    get.v = v.data();
  }
  float* Query(int64_t token, int32_t head = 0) {
    return q.data() + (token * get.num_q_heads + head) * get.head_dim;
  }
  float* Key(int64_t token, int32_t kv_head = 0) {
    return k.data() + (token * get.num_kv_heads + kv_head) * get.head_dim;
  }

  // The same with a copy of K and V for each query head; heads of a group are neighbours.
  RandomProblem WithoutGroups() const {
    RandomProblem wide = *this;
    const int32_t group = get.num_q_heads / get.num_kv_heads;
    wide.get.num_kv_heads = get.num_q_heads;
    wide.k.clear();
    wide.v.clear();
    for (size_t row = 0; row < k.size() / get.head_dim; ++row) {
      for (int32_t copy = 0; copy < group; ++copy) {
        for (int32_t i = 0; i < get.head_dim; ++i) {
          wide.k.push_back(k[row * get.head_dim + i]);
          wide.v.push_back(v[row * get.head_dim + i]);
        }
      }
    }
    wide.Point();
    return wide;
  }

  // Scaled scores of all queries and keys of a head, [num_tokens][num_tokens], nothing masked.
  std::vector<std::vector<double>> Scores(int32_t head) {
    std::vector<std::vector<double>> scores(get.num_tokens, std::vector<double>(get.num_tokens));
    const int32_t kv_head = head * get.num_kv_heads / get.num_q_heads;
    for (int64_t i = 0; i < get.num_tokens; ++i) {
      for (int64_t j = 0; j < get.num_tokens; ++j) {
        for (int32_t c = 0; c < get.head_dim; ++c) {
          scores[i][j] += get.softmax_scale * Query(i, head)[c] * Key(j, kv_head)[c];
        }
      }
    }
    return scores;
  }

  std::vector<float> q, k, v;
  PolicyProblem get;
};

inline std::vector<int32_t> BlocksOf(const BlockIndex& index, int32_t list, int64_t tile) {
  const int64_t row = index.Row(list, tile);
  return {index.blocks.begin() + index.offsets[row], index.blocks.begin() + index.offsets[row + 1]};
}

}  // namespace headwater::kernels::reference

#endif  // HW_TESTS_KERNELS_POLICIES_RANDOM_PROBLEM_H_
