// The steps of vertical-slash after the profile of the last rows (policies/tail_profile.h): choice of columns
// and distances, and what each tile of 64 rows reads because of them. Rules are those of
// reference/policies/vertical_slash.h.
#ifndef HW_KERNELS_CUDA_POLICIES_VERTICAL_SLASH_STAGES_H_
#define HW_KERNELS_CUDA_POLICIES_VERTICAL_SLASH_STAGES_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/range_attention.h"
#include "kernels/pattern/parameters.h"
#include "kernels/status.h"

namespace headwater::kernels {

// Chosen distances of a head, 32 a word: bit i of word w is distance 32 w + i.
struct CudaDistanceWord {
  uint32_t bits;
  int32_t before;  // largest chosen distance of earlier words, or -1
};

// Words of a head: to one past the last tile's end.
inline int64_t CudaDistanceWords(int64_t num_tokens) { return 2 * CudaRangeTiles(num_tokens) + 1; }

// Of a head's columns and distances, forced and least ones included, at most num_tokens.
int32_t VerticalSlashColumns(const reference::VerticalSlashParameters& parameters, int32_t head,
                             int64_t num_tokens);
int32_t VerticalSlashDistances(const reference::VerticalSlashParameters& parameters, int32_t head,
                               int64_t num_tokens);

// Device memory, 16-byte aligned.
struct CudaChosen {
  int32_t* columns = nullptr;             // [num_heads, column_stride], ascending
  int32_t* column_totals = nullptr;       // [num_heads]
  CudaDistanceWord* distances = nullptr;  // [num_heads, CudaDistanceWords(num_tokens)]
  int64_t column_stride = 0;              // at least each head's VerticalSlashColumns()
};

struct CudaChooseArgs {
  const float* vertical = nullptr;  // [num_heads, num_tokens]
  const float* slash = nullptr;     // likewise: of distance num_tokens - 1 - c at c
  int64_t num_tokens = 0;           // 1 to 2^31 - 257
  int32_t num_heads = 0;
  CudaChosen chosen;  // written
};

// The numbers under the forced one and then those of the largest sums, of equal ones the lower; sums are not
// negative, and NaN counts as the largest. Parameters as MakeCudaVerticalSlash() accepts them. Enqueues on
// `stream`. INVALID_ARGUMENT: null or misaligned arrays, sizes out of range. Cost: four reads of the sums by
// one CTA for each head and kind.
Status CudaChooseVerticalSlash(const reference::VerticalSlashParameters& parameters,
                               const CudaChooseArgs& args, cudaStream_t stream);

struct CudaMergeVerticalSlashArgs {
  CudaChosen chosen;
  int64_t num_tokens = 0;  // 1 to 2^31 - 257
  int32_t num_heads = 0;
  // Device memory, written: the lists of CudaKeyRanges, [num_heads * CudaRangeTiles(num_tokens)] where not
  // said otherwise. A tile whose lists find no room reads every causal key.
  int32_t* range_counts = nullptr;
  int64_t* range_offsets = nullptr;
  CudaKeyRange* ranges = nullptr;  // [range_capacity]
  int32_t* column_counts = nullptr;
  int64_t* column_offsets = nullptr;
  int32_t* columns = nullptr;  // [column_capacity]
  int64_t range_capacity = 0;
  int64_t column_capacity = 0;
  uint64_t* visited = nullptr;    // steps of 64 keys that the lists take
  uint32_t* overflows = nullptr;  // tiles without room
};

// MergeVerticalSlash() for every tile. Enqueues on `stream`; equal calls give equal lists. INVALID_ARGUMENT:
// null arrays, sizes out of range. Cost: two walks per tile, each by one thread, over the steps of 64 keys
// that its ranges take and the head's columns.
Status CudaMergeVerticalSlash(const CudaMergeVerticalSlashArgs& args, cudaStream_t stream);

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_POLICIES_VERTICAL_SLASH_STAGES_H_
