// CudaPolicyLog: what the layers of a policy leave for the host, and the report that it becomes.
#ifndef HW_WORKER_CUDA_CUDA_POLICY_LOG_H_
#define HW_WORKER_CUDA_CUDA_POLICY_LOG_H_

#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/types/span.h"

#include "headwater/v1/types.pb.h"
#include "kernels/cuda/policy.h"
#include "model/config.h"
#include "model/cuda/device_buffer.h"
#include "worker/group_report.h"
#include "worker/recall_contract.h"

namespace headwater {

// Where the device counts, in memory of Bytes(): a slot for each rank, and what all have in common.
struct CudaPolicyCounters {
  struct Slot {
    uint64_t* visited;      // [query heads], of each list
    uint32_t* dense_tiles;  // likewise
    uint32_t* overflows;    // tiles
  };

  char* slots = nullptr;
  int64_t num_q_heads = 0;
  float* enough = nullptr;  // [query heads]: of each KV head, GroupMeasure::enough
  float* recall = nullptr;  // [sampled rows, query heads]

  CudaPolicyCounters(char* memory, int64_t q_heads, int world_size)
      : slots(memory),
        num_q_heads(q_heads),
        enough(reinterpret_cast<float*>(memory + static_cast<int64_t>(SlotBytes(q_heads)) * world_size)),
        recall(enough + q_heads) {}

  static constexpr uint64_t SlotBytes(int64_t q_heads) {
    return (static_cast<uint64_t>(q_heads) * (sizeof(uint64_t) + sizeof(uint32_t)) + sizeof(uint32_t) + 7) /
           8 * 8;
  }
  static constexpr uint64_t Bytes(int64_t q_heads, int world_size, int64_t rows) {
    return SlotBytes(q_heads) * static_cast<uint64_t>(world_size) +
           static_cast<uint64_t>((1 + rows) * q_heads) * sizeof(float);
  }

  Slot slot(int rank) const {
    auto* const visited =
        reinterpret_cast<uint64_t*>(slots + static_cast<int64_t>(SlotBytes(num_q_heads)) * rank);
    auto* const dense_tiles = reinterpret_cast<uint32_t*>(visited + num_q_heads);
    return {visited, dense_tiles, dense_tiles + num_q_heads};
  }
};

class CudaPolicyLog {
 public:
  // One layer, as far as the host knows it when it enqueues it.
  struct Layer {
    enum class Kind { kNone, kDense, kLists, kRanges } kind = Kind::kNone;
    int32_t num_lists = 0;
    int32_t rows = 0;       // whose recall was measured
    uint64_t possible = 0;  // blocks of one list over all ranks, or steps of the ranges
    // Dense tiles of a list that is not dense: the prompt's end. Of policies that do not say: all there are.
    uint32_t usual_dense_tiles = GroupTiles::kUnknown;
    std::vector<GroupOutcome> outcomes;  // by KV head; empty: the policy has no settings
    bool by_loop = false;                // the loop attends to it, densely, and counts its pairs
  };
  // What a layer that has run read.
  struct Read {
    bool by_policy = false;  // else the loop's own, and dense
    double density = 1;      // over all ranks
    uint32_t overflows = 0;  // of this rank
  };

  absl::Status Init(const ModelConfig& config, std::string policy, int rank, int world_size);

  Layer& layer(int32_t layer) { return layers_[static_cast<size_t>(layer)]; }
  const Layer& layer(int32_t layer) const { return layers_[static_cast<size_t>(layer)]; }
  // Pinned [CudaPolicyPlan::kMostSampledRows].
  int64_t* positions(int32_t layer) const { return Pinned<int64_t>(layer, 0); }

  // Enqueues the copy of what the device has counted for the layer, of kRanges by the policy.
  absl::Status Copy(int32_t layer, const CudaPolicyCounters& counters, const kernels::CudaSelection& ranges,
                    cudaStream_t stream);

  // The rest: of a layer whose copies have arrived.

  // By KV head.
  std::vector<GroupMeasure> Groups(int32_t layer) const;
  // Adds the layer to the report.
  Read Take(int32_t layer);

  double recall_sum() const { return recall_sum_; }
  uint64_t num_recalls() const { return recalls_.size(); }
  // Of the layers taken so far.
  v1::AttentionReport Report() const;

 private:
  // Behind the positions: {visited, overflows} of key ranges, then CudaPolicyCounters.
  struct Own {
    uint64_t visited;
    uint32_t overflows;
    uint32_t reserved;
  };
  template <typename T>
  T* Pinned(int32_t layer, int64_t offset) const {
    return reinterpret_cast<T*>(pinned_.data() + layer * stride_ + offset);
  }
  Own* OwnOf(int32_t layer) const;
  CudaPolicyCounters CountersOf(int32_t layer) const;
  // Over all ranks.
  uint64_t Visited(int32_t layer, int32_t list) const;
  void TakeGroups(int32_t layer);

  int32_t num_q_heads_ = 0, num_kv_heads_ = 0;
  int rank_ = 0, world_size_ = 1;
  int64_t stride_ = 0;
  std::vector<Layer> layers_;
  DeviceBuffer pinned_;
  v1::AttentionReport report_;
  std::vector<float> recalls_;
  double recall_sum_ = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_POLICY_LOG_H_
