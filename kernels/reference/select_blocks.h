// The pattern search of cuda/pattern.h in obvious loops and double precision.
#ifndef HW_KERNELS_REFERENCE_SELECT_BLOCKS_H_
#define HW_KERNELS_REFERENCE_SELECT_BLOCKS_H_

#include <cstdint>
#include <vector>

namespace headwater::kernels::reference {

// As CudaSearchArgs; query_position is the position of query 0 counted from key 0.
struct SelectBlocksArgs {
  const float* q = nullptr;  // [total_q, num_q_heads, head_dim]
  const float* k = nullptr;  // [total_k, num_kv_heads, head_dim]
  int64_t total_q = 0;
  int64_t total_k = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  double softmax_scale = 0;
  int64_t query_position = 0;
  double threshold = 0;
  // Over 0: ceil(forced_density * visible blocks) are listed, those of the highest scores; of equal scores
  // the one of the higher number.
  double forced_density = 0;
  int32_t sink_blocks = 0;
  int32_t window_blocks = 1;
  int32_t dense_last_tokens = 0;
};

struct SelectedBlocks {
  bool dense = false;
  std::vector<int32_t> blocks;  // ascending
  // Blocks whose log2 score lies within `near` of the threshold, or of the last one that a forced density
  // lists: arithmetic in f32 may decide them either way.
  std::vector<int32_t> undecided;
};

// One per segment, list-major as in CudaBlockLists. Means are rounded to bf16, as the GPU's are.
std::vector<SelectedBlocks> SelectBlocks(const SelectBlocksArgs& args, double near);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_SELECT_BLOCKS_H_
