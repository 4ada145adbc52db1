#include "worker/cuda/cuda_policy_group.h"

#include <algorithm>

#include "kernels/cuda/block_masks.h"
#include "worker/ring_attention.h"

namespace headwater {

CudaPolicyGroup::CudaPolicyGroup(int64_t num_tokens) : ranges_{{{0, num_tokens}}}, num_tokens_(num_tokens) {}

CudaPolicyGroup::CudaPolicyGroup(const std::vector<RankTokens>& partition, CudaKvExchange* exchange,
                                 Collectives* collectives, JobControl* control)
    : rank_(collectives->rank()), exchange_(exchange), collectives_(collectives), control_(control) {
  for (const RankTokens& tokens : partition) {
    std::vector<kernels::CudaQueryRange>& ranges = ranges_.emplace_back();
    for (const TokenRange& range : tokens) {
      ranges.push_back({range.begin, range.size()});
      num_tokens_ = std::max(num_tokens_, range.end);
    }
  }
}

uint64_t CudaPolicyGroup::PossibleBlocks(int32_t tile_positions) const {
  uint64_t blocks = 0;
  for (const auto& ranges : ranges_) {
    for (const kernels::CudaQueryRange& range : ranges) {
      blocks += kernels::CudaPossibleBlocks(range, tile_positions);
    }
  }
  return blocks;
}

uint32_t CudaPolicyGroup::TilesOfLast(int64_t last, int32_t tile_positions) const {
  int64_t tiles = 0;
  for (const auto& ranges : ranges_) {
    for (const kernels::CudaQueryRange& range : ranges) {
      const int64_t others = std::max<int64_t>(0, num_tokens_ - last - range.first);  // at its beginning
      if (others >= range.count) continue;
      tiles += (range.count + tile_positions - 1) / tile_positions - others / tile_positions;
    }
  }
  return static_cast<uint32_t>(tiles);
}

CudaPolicyGroup::Run CudaPolicyGroup::RunOf(const kernels::CudaQueryRange& range,
                                            absl::Span<const int64_t> positions) {
  const auto begin = std::lower_bound(positions.begin(), positions.end(), range.first);
  const auto end = std::lower_bound(begin, positions.end(), range.first + range.count);
  return {begin - positions.begin(), end - begin};
}

DeviceParts CudaPolicyGroup::PartsOf(int rank, char* slots, uint64_t slot_bytes,
                                     absl::Span<const SampledArray> arrays,
                                     absl::Span<const int64_t> positions) const {
  DeviceParts parts;
  if (slot_bytes > 0) parts.push_back({slots + static_cast<uint64_t>(rank) * slot_bytes, slot_bytes});
  for (const kernels::CudaQueryRange& range : ranges_[static_cast<size_t>(rank)]) {
    const Run run = RunOf(range, positions);
    if (run.count == 0) continue;
    for (const SampledArray& array : arrays) {
      parts.push_back({static_cast<char*>(array.data) + static_cast<uint64_t>(run.first) * array.bytes,
                       static_cast<uint64_t>(run.count) * array.bytes});
    }
  }
  return parts;
}

absl::Status CudaPolicyGroup::Share(char* slots, uint64_t slot_bytes, absl::Span<const SampledArray> arrays,
                                    absl::Span<const int64_t> positions, absl::string_view what,
                                    cudaStream_t stream) const {
  if (alone()) return absl::OkStatus();
  std::vector<DeviceParts> send(ranges_.size()), receive(ranges_.size());
  for (int other = 0; other < world_size(); ++other) {
    if (other == rank_) continue;
    send[static_cast<size_t>(other)] = PartsOf(rank_, slots, slot_bytes, arrays, positions);
    receive[static_cast<size_t>(other)] = PartsOf(other, slots, slot_bytes, arrays, positions);
  }
  return exchange_->Swap(send, receive, what, stream);
}

absl::Status CudaPolicyGroup::Least(double* value) const {
  if (alone()) return absl::OkStatus();
  std::vector<double> all(ranges_.size());
  const JobControl::Waiting waiting(control_);
  const absl::Status status = collectives_->AllGather(value, sizeof *value, all.data());
  if (!status.ok()) return CollectiveError(status, *control_);
  *value = *std::min_element(all.begin(), all.end());
  return absl::OkStatus();
}

}  // namespace headwater
