// XAttention's block selection (Xu et al., arXiv:2503.16428) in obvious loops and double
// precision. With strides of S tokens, w of queries and u of keys, tokens past the prompt being zeros:
//
//   y[w, u] = softmax_scale / (S * norm) * sum_a q[wS + S - 1 - a] . k[uS + a]     one anti-diagonal of S x S
//   P[w, u] = softmax of y[w, u] over u <= w
//   E[I, J] = sum of P over the strides w of query block I and u of key block J
//
// Row I keeps block 0, its own block I, and then the largest others while the mass kept so far is under
// threshold * sum_J E[I, J].
#ifndef HW_KERNELS_REFERENCE_POLICIES_XATTENTION_H_
#define HW_KERNELS_REFERENCE_POLICIES_XATTENTION_H_

#include <cstdint>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

struct XAttentionParameters {
  int32_t stride = 16;  // tokens, a divisor of 128; published: 4, 8, 16
  // Of a row's mass, 0 to 1: one for all query heads or one for each. 0.9 is the paper's.
  std::vector<double> thresholds = {0.9};
  double norm = 1;  // over 0
  // The prompt is padded to a multiple of this, itself a multiple of 128 up to 2^28. 0: the published choice,
  // which depends on the prompt, XAttentionChunk(). Blocks depend on it under `compat` alone.
  int64_t chunk_tokens = 0;
  bool keep_sink = false;  // key block 0 for every row, which the rule keeps anyway
  // As the official code, which differs in two things. Rows of the first chunk do not count block 0 as kept;
  // and since their mass before the n-th candidate is taken as that before the one ahead of it, they keep the
  // largest other and then one more than needed. (Block 0 is kept whatever it holds.) keep_sink sets the
  // first row of queries in place of the first column of keys: all blocks, those in the future too, which
  // the index leaves out.
  bool compat = false;
};

// The stages of one query head.
struct XAttentionHead {
  std::vector<double> scores;              // E, [blocks, blocks] row by row, 0 above the diagonal
  std::vector<std::vector<int32_t>> kept;  // [blocks], each ascending
};

struct XAttentionTrace {
  int64_t chunk_tokens = 0;
  int64_t num_blocks = 0;             // of 128, that hold a token; padding beyond them is not scored
  std::vector<XAttentionHead> heads;  // [num_q_heads]
};

// max(2048, min(p, 2^28 / p)) for the power of two p >= num_tokens.
int64_t XAttentionChunk(int64_t num_tokens);

// Fills both; the index has one list per query head. Of equal scores the lower block is taken first (the
// official code leaves it to an unstable sort, and rounds y, P and E to the model's type). INVALID_ARGUMENT:
// a parameter or the problem is outside its range, or Q or K is not finite. Cost: num_tokens^2 *
// head_dim / (2 * stride) per head.
Status SelectXAttention(const PolicyProblem& problem, const XAttentionParameters& parameters,
                        XAttentionTrace* trace, BlockIndex* index);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_XATTENTION_H_
