// The C interface of attention masses.
#include "kernels/c_api_support.h"
#include "kernels/cuda/block_mass.h"
#include "kernels/headwater_kernels.h"

namespace {

using headwater::kernels::CudaMassProblem;
using headwater::kernels::CudaSampledRows;
using headwater::kernels::capi::WithArgs;

template <typename Args>
CudaMassProblem ProblemOf(const Args& c) {
  return {c.q, c.k, c.num_tokens, c.num_q_heads, c.num_kv_heads, c.head_dim, c.softmax_scale};
}

CudaSampledRows RowsOf(const int64_t* positions, int32_t num_rows) {
  CudaSampledRows rows;
  rows.positions = positions;
  rows.num_rows = num_rows;
  return rows;
}

}  // namespace

extern "C" {

hw_status hw_block_mass(const hw_block_mass_args* args, void* stream) {
  return WithArgs(args, [&](const hw_block_mass_args& c) {
    return headwater::kernels::CudaBlockMass(
        {ProblemOf(c), c.lse_ln, c.heads, c.num_heads, c.flags, c.average},
        static_cast<cudaStream_t>(stream));
  });
}

hw_status hw_row_mass(const hw_row_mass_args* args, void* stream) {
  return WithArgs(args, [&](const hw_row_mass_args& c) {
    return headwater::kernels::CudaRowMass({ProblemOf(c), RowsOf(c.positions, c.num_rows), c.mass},
                                           static_cast<cudaStream_t>(stream));
  });
}

hw_status hw_recall_of_rows(const hw_recall_of_rows_args* args, void* stream) {
  return WithArgs(args, [&](const hw_recall_of_rows_args& c) {
    headwater::kernels::CudaRecallArgs recall;
    recall.mass = c.mass;
    recall.rows = RowsOf(c.positions, c.num_rows);
    recall.num_tokens = c.num_tokens;
    recall.num_q_heads = c.num_q_heads;
    recall.lists = {c.lists.num_lists, c.lists.counts, c.lists.offsets, c.lists.blocks};
    recall.recall = c.recall;
    return headwater::kernels::CudaRecallOfRows(recall, static_cast<cudaStream_t>(stream));
  });
}

}  // extern "C"
