#include "worker/cuda/cuda_group.h"

#include <algorithm>
#include <utility>

#include "base/status_macros.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

// Exchanges of a layer: all but the last are hidden behind projections; each one costs a launch on every GPU.
constexpr size_t kPieces = 4;

template <typename T>
T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}

DevicePart PartOf(const SharedArray& array, const TokenRange& tokens) {
  const auto first = static_cast<uint64_t>(tokens.begin / array.tokens);
  const auto count = static_cast<uint64_t>(CeilDiv(tokens.size(), array.tokens));
  return {array.data + first * array.bytes, count * array.bytes};
}

}  // namespace

std::vector<CudaChunk> ChunksOf(const RankTokens& tokens, int64_t chunk_tokens) {
  std::vector<CudaChunk> chunks;
  int64_t row = 0;
  for (const TokenRange& range : tokens) {
    for (int64_t begin = range.begin; begin < range.end; begin += chunk_tokens) {
      const TokenRange part{begin, std::min(range.end, begin + chunk_tokens)};
      chunks.push_back({row, part});
      row += part.size();
    }
  }
  return chunks;
}

CudaKvExchange::CudaKvExchange(const std::vector<RankTokens>& partition, int64_t chunk_tokens,
                               v1::Strategy strategy, DeviceGroup* group, const JobControl* control)
    : ring_(strategy == v1::STRATEGY_RING), group_(group), control_(control) {
  size_t most = 0;
  for (const RankTokens& tokens : partition) {
    chunks_.push_back(ChunksOf(tokens, chunk_tokens));
    most = std::max(most, chunks_.back().size());
  }
  chunks_per_piece_ = std::max<size_t>(1, CeilDiv(most, kPieces));
  num_pieces_ = CeilDiv(most, chunks_per_piece_);
}

CudaKvExchange::~CudaKvExchange() {
  if (stream_ == nullptr) return;
  (void)cudaStreamSynchronize(stream_);
  (void)cudaStreamDestroy(stream_);
}

absl::Status CudaKvExchange::Init() {
  HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
  HW_RETURN_IF_ERROR(ready_.Create(cudaEventDisableTiming));
  return done_.Create(cudaEventDisableTiming);
}

absl::Status CudaKvExchange::ChunkReady(size_t index, absl::Span<const SharedArray> arrays,
                                        cudaStream_t stream) {
  return StartPieces((index + 1) / chunks_per_piece_, arrays, stream);
}

absl::Status CudaKvExchange::Finish(absl::Span<const SharedArray> arrays, cudaStream_t stream) {
  HW_RETURN_IF_ERROR(StartPieces(num_pieces_, arrays, stream));
  started_ = 0;
  HW_RETURN_IF_ERROR(done_.Record(stream_));
  return FromCuda(cudaStreamWaitEvent(stream, done_.get(), 0), "the exchange of K and V");
}

absl::Status CudaKvExchange::Swap(absl::Span<const DeviceParts> send, absl::Span<const DeviceParts> receive,
                                  absl::string_view what, cudaStream_t stream) {
  HW_RETURN_IF_ERROR(ready_.Record(stream));
  HW_RETURN_IF_ERROR(SwapAside(send, receive, what, ready_.get()));
  HW_RETURN_IF_ERROR(done_.Record(stream_));
  return FromCuda(cudaStreamWaitEvent(stream, done_.get(), 0), what);
}

absl::Status CudaKvExchange::SwapAside(absl::Span<const DeviceParts> send,
                                       absl::Span<const DeviceParts> receive, absl::string_view what,
                                       cudaEvent_t ready) {
  HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream_, ready, 0), what));
  return Exchange(send, receive, what);
}

absl::Status CudaKvExchange::Exchange(absl::Span<const DeviceParts> send,
                                      absl::Span<const DeviceParts> receive, absl::string_view what) {
  const absl::Status status = group_->Exchange(send, receive, what, stream_);
  return status.ok() || control_ == nullptr ? status : CollectiveError(status, *control_);
}

int CudaKvExchange::Steps() const { return ring_ ? static_cast<int>(chunks_.size()) - 1 : 1; }

absl::Status CudaKvExchange::StartPieces(size_t end, absl::Span<const SharedArray> arrays,
                                         cudaStream_t stream) {
  for (; started_ < end; ++started_) {
    HW_RETURN_IF_ERROR(ready_.Record(stream));
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream_, ready_.get(), 0), "the exchange of K and V"));
    const auto own = static_cast<size_t>(group_->rank());
    for (int step = 0; step < Steps(); ++step) {
      std::vector<DeviceParts> send(chunks_.size()), receive(chunks_.size());
      for (size_t rank = 0; rank < chunks_.size(); ++rank) {
        if (rank == own) continue;
        send[rank] = PartsOf(own, rank, step, started_, arrays);
        receive[rank] = PartsOf(rank, own, step, started_, arrays);
      }
      HW_RETURN_IF_ERROR(Exchange(send, receive, "exchange of a layer's K and V"));
    }
  }
  return absl::OkStatus();
}

DeviceParts CudaKvExchange::PartsOf(size_t from, size_t to, int step, size_t piece,
                                    absl::Span<const SharedArray> arrays) const {
  const size_t world = chunks_.size();
  if (ring_ && to != (from + 1) % world) return {};
  // A ring's rank passes on in step s what came in the step before.
  const size_t owner = ring_ ? (from + world - static_cast<size_t>(step)) % world : from;
  int64_t seen = 0;
  for (size_t rank = to; rank != owner; rank = (rank + 1) % world) {
    if (!chunks_[rank].empty()) seen = std::max(seen, chunks_[rank].back().tokens.end);
    if (!ring_) break;
  }
  const std::vector<CudaChunk>& chunks = chunks_[owner];
  const size_t end = std::min(chunks.size(), (piece + 1) * chunks_per_piece_);
  RankTokens ranges;
  for (size_t i = piece * chunks_per_piece_; i < end; ++i) {
    const TokenRange& tokens = chunks[i].tokens;
    if (!ranges.empty() && ranges.back().end == tokens.begin) {
      ranges.back().end = tokens.end;
    } else {
      ranges.push_back(tokens);
    }
  }
  DeviceParts parts;
  for (const TokenRange& range : ranges) {
    for (const SharedArray& array : arrays) {
      const TokenRange wanted{range.begin, array.causal ? std::min(range.end, seen) : range.end};
      if (wanted.size() > 0) parts.push_back(PartOf(array, wanted));
    }
  }
  return parts;
}

uint64_t CudaKvExchange::ReceivedBytes(absl::Span<const SharedArray> arrays) const {
  const auto own = static_cast<size_t>(group_->rank());
  uint64_t bytes = 0;
  for (size_t rank = 0; rank < chunks_.size(); ++rank) {
    if (rank == own) continue;
    for (size_t piece = 0; piece < num_pieces_; ++piece) {
      for (int step = 0; step < Steps(); ++step) {
        for (const DevicePart& part : PartsOf(rank, own, step, piece, arrays)) bytes += part.bytes;
      }
    }
  }
  return bytes;
}

}  // namespace headwater
