// Prompts of several layers whose heads are alike or not, for tests of SharePrefill.
#ifndef HW_TESTS_KERNELS_CUDA_SHARE_CASES_H_
#define HW_TESTS_KERNELS_CUDA_SHARE_CASES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/policy.h"
#include "kernels/pattern/parameters.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/reference/policies/share.h"
#include "tests/kernels/cuda/gpu.h"

namespace headwater::kernels {

struct ShareShape {
  int tokens, q_heads, kv_heads, head_dim;
  double scale = 0;  // 0: 1 / sqrt(head_dim)

  double Scale() const { return scale > 0 ? scale : 1 / std::sqrt(static_cast<double>(head_dim)); }
};

// One layer in bf16: K is noise, and so is Q until its heads are told what to look for.
struct ShareInput {
  ShareInput(const ShareShape& s, uint32_t seed)
      : shape(s),
        q(RandomBf16(static_cast<size_t>(s.tokens) * s.q_heads * s.head_dim, seed)),
        k(RandomBf16(static_cast<size_t>(s.tokens) * s.kv_heads * s.head_dim, seed + 1)) {
    for (float& x : q) x *= 0.1f;
  }

  // The query of a token gets about this logit for a key.
  void Look(int64_t token, int head, int64_t key, float logit) {
    const int kv_head = head / (shape.q_heads / shape.kv_heads), dim = shape.head_dim;
    const float strength = logit / std::sqrt(static_cast<float>(dim));
    for (int i = 0; i < dim; ++i) {
      q[(token * shape.q_heads + head) * dim + i] +=
          strength * k.at((key * shape.kv_heads + kv_head) * dim + i);
    }
  }
  void Round() { q = ToFloat(ToBf16(q)); }
  reference::PolicyProblem Problem() const {
    return {q.data(),      k.data(),       nullptr,        shape.tokens,
            shape.q_heads, shape.kv_heads, shape.head_dim, shape.Scale()};
  }

  ShareShape shape;
  std::vector<float> q, k;
};

using ShareLook = std::function<void(ShareInput*, int head)>;

inline ShareLook Noise() {
  return [](ShareInput*, int) {};
}
// Queries from `first` on look for the key `distance` before them.
inline ShareLook Back(int64_t distance, float logit, int64_t first = 0) {
  return [=](ShareInput* input, int head) {
    for (int64_t i = std::max(first, distance); i < input->shape.tokens; ++i) {
      input->Look(i, head, i - distance, logit);
    }
  };
}
// All look for one key.
inline ShareLook At(int64_t key, float logit) {
  return [=](ShareInput* input, int head) {
    for (int64_t i = 0; i < input->shape.tokens; ++i) input->Look(i, head, key, logit);
  };
}
// Queries of blocks 4 and 5 look back 360 tokens, the last ones do not: only attention itself shows it.
inline ShareLook Hidden() {
  return [](ShareInput* input, int head) {
    for (int64_t i = 512; i < std::min(768, input->shape.tokens); ++i) input->Look(i, head, i - 360, 17);
    Back(0, 7, 768)(input, head);
  };
}

struct ShareCase {
  const char* name;
  ShareShape shape;
  reference::ShareParameters parameters;
  std::vector<std::vector<ShareLook>> looks;   // by layer and head
  std::vector<std::vector<int32_t>> clusters;  // likewise; -1: none
  std::set<int32_t> shareable;
  // By layer: Q query aware, P pivot, S shared, O own.
  std::vector<std::string> roles;

  ShareWithClusters Parameters() const {
    ShareWithClusters p{parameters, {{}, shareable}};
    for (size_t layer = 0; layer < clusters.size(); ++layer) {
      for (size_t head = 0; head < clusters[layer].size(); ++head) {
        if (clusters[layer][head] < 0) continue;
        p.clusters.cluster_of[{static_cast<int32_t>(layer), static_cast<int32_t>(head)}] =
            clusters[layer][head];
      }
    }
    return p;
  }
  CudaPolicyShape Policy() const {
    return {static_cast<int32_t>(looks.size()), shape.q_heads, shape.kv_heads, shape.head_dim,
            static_cast<float>(shape.Scale())};
  }
  std::vector<ShareInput> Inputs(uint32_t seed = 1) const {
    std::vector<ShareInput> inputs;
    for (size_t layer = 0; layer < looks.size(); ++layer) {
      inputs.emplace_back(shape, seed + 10 * static_cast<uint32_t>(layer));
      for (int head = 0; head < shape.q_heads; ++head) {
        looks[layer][static_cast<size_t>(head) % looks[layer].size()](&inputs.back(), head);
      }
      inputs.back().Round();
    }
    return inputs;
  }
};

inline std::ostream& operator<<(std::ostream& out, const ShareCase& c) { return out << c.name; }

inline char RoleName(int role) { return role < 0 || role > 3 ? '?' : "QPSO"[role]; }

// Budgets so small that noise does not take all blocks.
inline reference::ShareParameters SmallBudgets(double similarity, double fallback, double query_aware = 0) {
  reference::ShareParameters p;
  p.similarity = similarity;
  p.fallback = fallback;
  p.query_aware = query_aware;
  p.min_budget_tokens = 1;
  p.max_budget_tokens = 256;
  return p;
}

inline ShareLook Diagonal() { return Back(0, 7.5f); }
inline ShareLook Column() { return At(850, 17); }

// Three kinds of heads, which move on by one from layer to layer.
inline std::vector<std::vector<ShareLook>> ThreeKinds() {
  return {
      {Diagonal(), Hidden(), Column()}, {Hidden(), Column(), Diagonal()}, {Column(), Diagonal(), Hidden()}};
}
// Their clusters; not shifted: clusters of heads that are not alike.
inline std::vector<std::vector<int32_t>> ClustersOfKinds(int heads, bool shift) {
  std::vector<std::vector<int32_t>> clusters(3);
  for (int layer = 0; layer < 3; ++layer) {
    for (int head = 0; head < heads; ++head) clusters[layer].push_back((head + (shift ? layer : 0)) % 3);
  }
  return clusters;
}

// Each gate in turn. The sharp diagonal is covered by its own offsets; of the sharper one most is 0 in f32.
inline ShareCase GatesCase() {
  return {"gates",
          {1300, 10, 2, 64},
          SmallBudgets(0.35, 0.97, 0.2),
          {{Diagonal(), Diagonal(), Column(), Diagonal(), Back(0, 25), Hidden(), Noise(), Back(0, 600),
            Diagonal(), Column()},
           {Diagonal(), At(500, 17), Back(404, 17), Diagonal(), Back(0, 25), Hidden(), Column(), Back(0, 600),
            Noise(), Column()},
           {At(500, 17), Diagonal(), Column(), Diagonal(), Diagonal(), Hidden(), Column(), Diagonal(),
            Diagonal(), Hidden()}},
          {{10, 10, 11, 12, 14, 15, 16, 17, -1, 18},
           {10, 10, 11, 12, 14, 15, 16, 17, 10, 10},
           {10, 10, 11, 12, -1, 15, 16, 17, 19, 19}},
          {10, 11, 14, 15, 16, 17, 19},
          {"POPOPPQPOO", "SOOOOSPOQO", "OSSOOSSOPO"}};
}

inline std::vector<ShareCase> CasesByCluster() {
  const auto p = SmallBudgets(0.5, 0.999);
  const auto kinds = ThreeKinds();
  return {{"gqa3_d64",
           {1409, 6, 2, 64},
           p,
           kinds,
           ClustersOfKinds(6, true),
           {0, 1, 2},
           {"PPPOOO", "SSSSSS", "SSSSSS"}},
          {"gqa8",
           {1280, 8, 1, 128, 0.1},
           p,
           kinds,
           ClustersOfKinds(8, true),
           {0, 2},
           {"POPOOOOO", "OSSOSSOS", "SSOSSOSS"}},
          {"unlike",
           {1300, 3, 3, 64},
           SmallBudgets(0.3, 0.999),
           kinds,
           ClustersOfKinds(3, false),
           {0, 1, 2},
           {"PPP", "SOO", "OSO"}},
          {"gqa4",
           {1700, 4, 1, 128},
           SmallBudgets(0.5, 0.999, 0.05),
           kinds,
           ClustersOfKinds(4, true),
           {0, 1, 2},
           {"PPPO", "SSSS", "SSSS"}},
          {"two_words",
           {4300, 2, 1, 64},
           p,
           {{Diagonal(), Column()}, {Diagonal(), Hidden()}},
           {{0, 0}, {0, 0}},
           {0},
           {"PO", "SS"}}};
}

inline std::vector<ShareCase> CasesByLayer() {
  reference::ShareParameters three = SmallBudgets(0.5, 0.999, 0.2), one = SmallBudgets(0.5, 0.999), all = one;
  three.pivots_per_layer = 3;
  one.pivots_per_layer = 1;
  all.pivots_per_layer = 60000;
  return {{"pivots_per_layer",
           {1300, 8, 2, 128},
           three,
           {{Diagonal(), Hidden(), Column(), Diagonal(), Column(), Hidden(), At(300, 17), Noise()},
            {Noise(), Column(), At(300, 17), Diagonal(), Column(), Diagonal(), Back(700, 17), Hidden()},
            {Noise(), Noise(), Noise(), Noise(), Noise(), Noise(), Diagonal(), Diagonal()}},
           {},
           {},
           {"PPPSSSOQ", "QPPPSSOS", "QQQQQQPP"}},
          {"one_pivot_d64", {1281, 4, 4, 64}, one, ThreeKinds(), {}, {}, {"PSOS", "POSS", "POOS"}},
          {"all_pivots", {900, 3, 1, 64}, all, ThreeKinds(), {}, {}, {"PPP", "PPP", "PPP"}},
          {"two_words_by_layer", {4200, 2, 1, 64}, one, {{Diagonal(), Hidden()}}, {}, {}, {"PS"}}};
}

// Not dense; columns and offsets hold all of them.
inline std::vector<ShareCase> ShortCases() {
  reference::ShareParameters p;
  p.query_aware = 0;
  std::vector<ShareCase> cases;
  for (const auto& [name, tokens] :
       {std::pair("one_token", 1), std::pair("t127", 127), std::pair("t128", 128), std::pair("t129", 129),
        std::pair("t1000", 1000)}) {
    cases.push_back(
        {name, {tokens, 2, 1, 128}, p, {{Noise()}, {Noise()}}, {{0, 0}, {0, 1}}, {0}, {"PO", "OO"}});
  }
  return cases;
}

inline std::vector<ShareCase> ShareCases() {
  std::vector<ShareCase> cases = {GatesCase()};
  for (const auto& more : {CasesByCluster(), CasesByLayer(), ShortCases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  return cases;
}

}  // namespace headwater::kernels

#endif  // HW_TESTS_KERNELS_CUDA_SHARE_CASES_H_
