// How the GPUs of a group share a layer's K and V: every rank computes those of its own tokens into arrays of
// the whole prompt and gets the others' in their places, while it still projects.
#ifndef HW_WORKER_CUDA_CUDA_GROUP_H_
#define HW_WORKER_CUDA_CUDA_GROUP_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/types/span.h"

#include "worker/cuda/cuda_layer_log.h"
#include "worker/cuda/device_group.h"
#include "worker/job_control.h"
#include "worker/partition.h"

namespace headwater {

// Consecutive tokens of a rank, in rows [row, row + tokens.size()) of its own arrays.
struct CudaChunk {
  int64_t row = 0;
  TokenRange tokens;
};

// A rank's tokens, at most chunk_tokens at a time; no chunk crosses two ranges.
std::vector<CudaChunk> ChunksOf(const RankTokens& tokens, int64_t chunk_tokens);

// Device memory with so many bytes for every `tokens` tokens of the prompt, where ranges of ranks start on
// multiples of `tokens`.
struct SharedArray {
  char* data = nullptr;
  uint64_t bytes = 0;
  int64_t tokens = 1;
  bool causal = true;  // only what some query of a rank may see goes there
};

class CudaKvExchange {
 public:
  // partition: of all ranks, which hand over chunks of ChunksOf(..., chunk_tokens), the same on all.
  // strategy: ring or allgather. group and control, which may be null, must outlive this; the group's errors
  // become the job's (CollectiveError()).
  CudaKvExchange(const std::vector<RankTokens>& partition, int64_t chunk_tokens, v1::Strategy strategy,
                 DeviceGroup* group, const JobControl* control);
  // The group must have been aborted, or what was started have ended.
  ~CudaKvExchange();
  absl::Status Init();

  // This rank's chunk `index`, in order, has been enqueued on `stream`. Starts what is due; returns at once.
  // Other ranks' parts of `arrays`, the same ones for all chunks of a layer, are written from the layer's
  // first chunk on: whoever reads an earlier content on `stream` must have been enqueued.
  absl::Status ChunkReady(size_t index, absl::Span<const SharedArray> arrays, cudaStream_t stream);
  // All of this rank's chunks have been: starts the rest, and lets `stream` wait until the arrays are whole.
  absl::Status Finish(absl::Span<const SharedArray> arrays, cudaStream_t stream);

  // Exchanges other parts, as DeviceGroup::Exchange() has them: `send` as `stream` leaves it, and `stream`
  // goes on when `receive` is there. All ranks at the same place between a layer's Finish() and the next
  // one's first ChunkReady().
  absl::Status Swap(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                    absl::string_view what, cudaStream_t stream);

  // Likewise, of what is there once `ready`, which has been recorded, has happened; nothing waits for it but
  // what is enqueued on stream().
  absl::Status SwapAside(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                         absl::string_view what, cudaEvent_t ready);
  cudaStream_t stream() const { return stream_; }

  // Of one layer's arrays, from other ranks.
  uint64_t ReceivedBytes(absl::Span<const SharedArray> arrays) const;

 private:
  // What rank `from` sends rank `to` in an exchange of the piece: of all owners, up to the last token that a
  // query of `to`, or of a rank that it goes on to, may see.
  DeviceParts PartsOf(size_t from, size_t to, int step, size_t piece,
                      absl::Span<const SharedArray> arrays) const;
  int Steps() const;  // exchanges of a piece
  absl::Status Exchange(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                        absl::string_view what);
  absl::Status StartPieces(size_t end, absl::Span<const SharedArray> arrays, cudaStream_t stream);

  std::vector<std::vector<CudaChunk>> chunks_;  // by rank
  const bool ring_;
  size_t chunks_per_piece_ = 1;
  size_t num_pieces_ = 0;
  size_t started_ = 0;  // pieces of the layer
  DeviceGroup* const group_;
  const JobControl* const control_;
  cudaStream_t stream_ = nullptr;
  CudaEvent ready_, done_;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_GROUP_H_
