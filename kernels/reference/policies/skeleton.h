// SparseSkeleton: the logarithm of attention as a sum of a vector over distances, one over keys and one over
// queries (the paper's equations 2 to 14 and Algorithm 1, with four corrections, named below).
//
//   ln A[i, j] ~ s[i - j] + v[j] + h[i]    for interior keys j of query i: S <= j <= i - T
//   s[D] = (r_-D - rbar) . alpha           r_x = (cos x theta_m, then sin x theta_m), theta_m the rotation's
//   v[j] = (khat_j - khatbar) . kappa      khat_j = k_j rotated back; means over the last query's interior
//
// alpha and kappa are ridge regression over sampled interior pairs, centred row by row:
//
//   (r_(j-i) - rbar_i) . alpha + (khat_j - khatbar_i) . kappa ~ x_ij - mu_i,    x_ij = softmax_scale q_i .
//   k_j
//
//   delta_i = interior mean over row i of s + v
//   nu_i = ln(sum over sinks and local keys of exp(x_ij - mu_i) + n_i exp(sigma_i^2 / 2 - zeta))
//   zeta = mu_N + sigma_N^2 / 2 + ln n_N - ln(sum over the last row's interior of exp(x_Nj))
//   h_i = -delta_i - nu_i                  n_i = i - S - T + 1 interior keys; mu, sigma of x over them
//
// Corrections: (units) ln n_N in zeta, which makes the last row exact; (shift) delta is of s + v, the paper's
// of s alone; (statistics) mu and sigma are over the interior, which the fit and n_i exp(...) are about, the
// paper's over all keys; (blocks) a pair of blocks I and J holds distances of the ranges I - J - 1 and I - J,
// the paper's indices, read as distances, say I - J and I - J + 1.
#ifndef HW_KERNELS_REFERENCE_POLICIES_SKELETON_H_
#define HW_KERNELS_REFERENCE_POLICIES_SKELETON_H_

#include <cstdint>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

// Published: 80 samples, epsilon 0.8, blocks of 64. Ours, since the paper says nothing: sinks, local, ridge.
struct SkeletonParameters {
  int32_t sink_tokens = 128;     // S: 0 to 2^20
  int32_t local_tokens = 128;    // T: 1 to 2^20
  int32_t samples_per_dim = 80;  // 1 to 2^16: times head_dim, pairs of a head
  uint64_t seed = 1;
  double ridge = 1e-5;   // 1e-9 to 1: lambda = ridge * ||design||_F / 2
  double epsilon = 0.8;  // over 0, to 1e6: a pair of blocks is kept from ln(epsilon * 64 / num_tokens) on
  // Over 0: instead, the threshold by which equation 14 keeps that many pairs of a row of blocks, on average
  // over the rows. 0 to 2^40.
  double budget_blocks = 0;
  double rope_base = 500000;  // 1 to 1e12: theta_m = base^(-2m / head_dim); token t is at position t
  // Not empty: theta_m themselves, head_dim / 2 of them (models that scale them). They rotate pairs (m, m +
  // head_dim / 2) as CudaSplitQkv() does. A factor on cos and sin (yarn's) stays in khat, and kappa is fitted
  // to it.
  std::vector<double> frequencies;
};

// INVALID_ARGUMENT names the value and its range.
Status CheckSkeletonParameters(const SkeletonParameters& parameters);

// Of one query head. Rows and keys are counted from 0. Rows i < S + T have no interior: mu, sigma, delta and
// nu are 0 and h is -infinity there.
struct SkeletonHead {
  std::vector<double> mu, sigma;           // [num_tokens]
  std::vector<double> alpha, kappa;        // [head_dim]
  std::vector<double> s, v, delta, nu, h;  // [num_tokens]; s by distance
  std::vector<double> lambda;              // [num_tokens]: the sums over sinks and local keys in nu
  double zeta = 0;
  double tau = 0;                        // threshold of a pair of blocks
  std::vector<double> s_block;           // [blocks of 64], by distance of blocks, 0: the diagonal
  std::vector<double> v_block, h_block;  // [blocks of 64]
  // Per tile of 128: blocks kept, and those that no pair nearer than 0.02 to tau lets decide.
  std::vector<std::vector<int32_t>> kept, undecided;
};

struct SkeletonTrace {
  bool dense = false;               // no query has an interior: nothing was fitted
  std::vector<SkeletonHead> heads;  // [num_q_heads], empty where dense
};

// Pair n of head's sample: queries and keys of the interior, from counters alone, so that any order of
// evaluation gives the same: z = SplitMix64(seed + 2^40 * head + 2n, and + 1), taken to [0, N - S - T) by the
// high half of z * (N - S - T).
struct SkeletonPair {
  int64_t query, key;
};
SkeletonPair SampleSkeletonPair(const SkeletonParameters& parameters, int64_t num_tokens, int32_t head,
                                int64_t n);

// index: one list per query head, tiles and blocks of 128. Pairs of 64 are decided as published: s_block +
// v_block
// + h_block >= tau, or the key block holds a sink, or the pair a distance below T; a pair of 128 is kept if
// any of the up to four causal pairs of 64 in it is. Either output may be null. INVALID_ARGUMENT: parameters
// or problem out of range, head_dim odd, frequencies that are not head_dim / 2 finite values. Cost per query
// head: num_tokens * head_dim * (head_dim + S + T) products, num_tokens^2 sums for tau by budget; memory
// num_tokens
// * head_dim doubles.
Status SkeletonSelect(const PolicyProblem& problem, const SkeletonParameters& parameters,
                      SkeletonTrace* trace, BlockIndex* index);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_SKELETON_H_
