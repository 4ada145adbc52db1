// CudaCheckpoints: hands what goes into a layer to host memory, this rank's rows and its left neighbour's,
// while later layers are computed. The device keeps a copy of its own rows; a slice of it goes to the right
// neighbour and to the host with each of the next layers.
#ifndef HW_WORKER_CUDA_CUDA_CHECKPOINTS_H_
#define HW_WORKER_CUDA_CUDA_CHECKPOINTS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "worker/checkpoint.h"
#include "worker/cuda/cuda_group.h"
#include "worker/cuda/cuda_layer_log.h"
#include "worker/cuda/device_to_host_copier.h"
#include "worker/metrics.h"
#include "worker/partition.h"

namespace headwater {

// GPUs take none of shorter prompts, which are soon computed again.
inline constexpr int64_t kLeastCheckpointTokens = 32768;

// Layers over which a checkpoint leaves the device, where one is taken every `checkpoint_layers`: so many
// that the first one has left before the last layer.
int CheckpointSlices(int checkpoint_layers, int num_layers);
// Host memory that a store takes for them, on the rank that takes most.
uint64_t CheckpointHostBytes(const std::vector<RankTokens>& partition, int64_t hidden_size);
// Device memory for them; max_rank_tokens: of any rank.
uint64_t CheckpointDeviceBytes(int64_t local_tokens, int64_t max_rank_tokens, int64_t hidden_size,
                               int checkpoint_layers, int num_layers);

struct CudaCheckpointOptions {
  const std::vector<RankTokens>* partition = nullptr;
  int rank = 0;
  int64_t hidden_size = 0;
  int32_t first_layer = 0, num_layers = 0;
  int checkpoint_layers = 0;         // over 0, the same on all ranks
  CheckpointStore* store = nullptr;  // that has begun this epoch
  CudaKvExchange* exchange = nullptr;
  DeviceToHostCopier* copier = nullptr;
  WorkerMetrics* metrics = nullptr;    // may be null
  char* memory = nullptr;              // CheckpointDeviceBytes(), 256-byte aligned
  std::function<absl::Status()> step;  // the loop's heartbeat, called while it waits
};

// Ranks of a group call the same operations at the same places.
class CudaCheckpoints {
 public:
  explicit CudaCheckpoints(const CudaCheckpointOptions& options);
  absl::Status Init();

  // Before the layer changes `hidden`, [rows, hidden_size] f32 on the device.
  absl::Status StartLayer(int32_t layer, const float* hidden, cudaStream_t stream);
  // Between the Finish() of the layer's exchange and the next layer: the next slice.
  absl::Status SendSlice();
  // Layers whose checkpoints have arrived in the store, ascending.
  absl::StatusOr<std::vector<uint32_t>> Taken();

 private:
  int64_t RowsOf(int rank) const { return NumTokens((*options_.partition)[static_cast<size_t>(rank)]); }
  int Neighbour(int by) const {
    const int world = static_cast<int>(options_.partition->size());
    return (options_.rank + by + world) % world;
  }
  // Rows of a rank in the slice that is next.
  TokenRange SliceOf(int rank) const;
  // Until all that it was given has arrived.
  absl::Status WaitForCopier();

  const CudaCheckpointOptions options_;
  const int slices_;
  float *snapshot_ = nullptr, *arriving_ = nullptr;
  CudaEvent ready_;  // the snapshot is whole
  CheckpointStore::Rows rows_;
  int32_t layer_ = -1;  // of the checkpoint under way
  int slice_ = 0;
  uint64_t added_ = 0;     // bytes, to the copier
  absl::Duration waited_;  // for it, of the checkpoint under way
  std::vector<uint32_t> taken_;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_CHECKPOINTS_H_
