// CudaPolicyGroup: what the ranks of a prompt tell each other of a policy's lists, so that all of them judge
// and report the same. A prompt on one GPU has a group of one, which sends nothing.
#ifndef HW_WORKER_CUDA_CUDA_POLICY_GROUP_H_
#define HW_WORKER_CUDA_CUDA_POLICY_GROUP_H_

#include <cstdint>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/types/span.h"

#include "kernels/cuda/attention.h"
#include "worker/collectives.h"
#include "worker/cuda/cuda_group.h"
#include "worker/job_control.h"
#include "worker/partition.h"

namespace headwater {

// Device memory with `bytes` for each sampled query.
struct SampledArray {
  void* data = nullptr;
  uint64_t bytes = 0;
};

class CudaPolicyGroup {
 public:
  explicit CudaPolicyGroup(int64_t num_tokens);
  // partition: of all ranks. What is pointed to must outlive this.
  CudaPolicyGroup(const std::vector<RankTokens>& partition, CudaKvExchange* exchange,
                  Collectives* collectives, JobControl* control);

  int rank() const { return rank_; }
  int world_size() const { return static_cast<int>(ranges_.size()); }
  bool alone() const { return world_size() == 1; }
  // Of this rank.
  const std::vector<kernels::CudaQueryRange>& ranges() const { return ranges_[static_cast<size_t>(rank_)]; }

  // Of one list of tiles of so many positions, over all ranks: blocks that are seen, and tiles that hold one
  // of the prompt's last `last` tokens.
  uint64_t PossibleBlocks(int32_t tile_positions) const;
  uint32_t TilesOfLast(int64_t last, int32_t tile_positions) const;

  // Which of the ascending positions a range holds.
  struct Run {
    int64_t first = 0, count = 0;
  };
  static Run RunOf(const kernels::CudaQueryRange& range, absl::Span<const int64_t> positions);

  // Enqueues: this rank's slot of `slots` [world_size][slot_bytes], and its queries' part of arrays
  // [positions], go to all ranks, whose own come to their places. The same sizes on all ranks. Errors as
  // DeviceGroup. `what` must be a literal.
  absl::Status Share(char* slots, uint64_t slot_bytes, absl::Span<const SampledArray> arrays,
                     absl::Span<const int64_t> positions, absl::string_view what, cudaStream_t stream) const;

  // The least of all ranks' values. Errors of CollectiveError().
  absl::Status Least(double* value) const;

 private:
  DeviceParts PartsOf(int rank, char* slots, uint64_t slot_bytes, absl::Span<const SampledArray> arrays,
                      absl::Span<const int64_t> positions) const;

  std::vector<std::vector<kernels::CudaQueryRange>> ranges_;  // by rank
  int64_t num_tokens_ = 0;
  int rank_ = 0;
  CudaKvExchange* exchange_ = nullptr;
  Collectives* collectives_ = nullptr;
  JobControl* control_ = nullptr;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_POLICY_GROUP_H_
