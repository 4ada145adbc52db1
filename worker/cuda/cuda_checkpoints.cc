#include "worker/cuda/cuda_checkpoints.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "worker/cuda/cuda_plan.h"

namespace headwater {
namespace {

constexpr absl::Duration kLongestWait = absl::Minutes(2), kPoll = absl::Microseconds(200);

uint64_t RowBytes(int64_t hidden_size) { return static_cast<uint64_t>(hidden_size) * sizeof(float); }

}  // namespace

// Nor must the next one be due before it has left.
int CheckpointSlices(int checkpoint_layers, int num_layers) {
  return std::clamp(std::min(checkpoint_layers - 2, num_layers - 1 - checkpoint_layers), 1, 8);
}

uint64_t CheckpointHostBytes(const std::vector<RankTokens>& partition, int64_t hidden_size) {
  return 2 * static_cast<uint64_t>(MostCheckpointTokens(partition)) * RowBytes(hidden_size);
}

uint64_t CheckpointDeviceBytes(int64_t local_tokens, int64_t max_rank_tokens, int64_t hidden_size,
                               int checkpoint_layers, int num_layers) {
  const int64_t slices = CheckpointSlices(checkpoint_layers, num_layers);
  const auto slice = static_cast<uint64_t>((max_rank_tokens + slices - 1) / slices);
  return AlignedCudaPart(static_cast<uint64_t>(local_tokens) * RowBytes(hidden_size)) +
         AlignedCudaPart(slice * RowBytes(hidden_size));
}

CudaCheckpoints::CudaCheckpoints(const CudaCheckpointOptions& options)
    : options_(options),
      slices_(CheckpointSlices(options.checkpoint_layers, options.num_layers)),
      snapshot_(reinterpret_cast<float*>(options.memory)),
      arriving_(reinterpret_cast<float*>(
          options.memory +
          AlignedCudaPart(static_cast<uint64_t>(RowsOf(options.rank)) * RowBytes(options.hidden_size)))) {}

absl::Status CudaCheckpoints::Init() { return ready_.Create(cudaEventDisableTiming); }

absl::Status CudaCheckpoints::WaitForCopier() {
  const absl::Time start = SteadyNow();
  while (true) {
    HW_ASSIGN_OR_RETURN(const uint64_t copied, options_.copier->copied());
    if (copied >= added_) break;
    HW_RETURN_IF_ERROR(options_.step());
    if (SteadyNow() - start > kLongestWait) {
      return absl::InternalError(absl::StrCat("the checkpoint of layer ", layer_, ": ", added_ - copied,
                                              " bytes have not left the device within ",
                                              absl::FormatDuration(kLongestWait)));
    }
    absl::SleepFor(kPoll);
  }
  waited_ += SteadyNow() - start;
  return absl::OkStatus();
}

absl::Status CudaCheckpoints::StartLayer(int32_t layer, const float* hidden, cudaStream_t stream) {
  // Layer 0's input is the embedding, which costs little to make again.
  const bool due = layer % options_.checkpoint_layers == 0 || layer == options_.first_layer;
  if (layer == 0 || !due || layer + slices_ >= options_.num_layers) return absl::OkStatus();
  if (layer_ >= 0 && slice_ < slices_) return absl::OkStatus();  // the last one is still leaving
  if (layer_ >= 0) {
    HW_RETURN_IF_ERROR(WaitForCopier());
    HW_RETURN_IF_ERROR(Taken().status());
  }
  HW_ASSIGN_OR_RETURN(rows_, options_.store->Start(layer));
  layer_ = layer;
  slice_ = 0;
  HW_RETURN_IF_ERROR(FromCuda(
      cudaMemcpyAsync(snapshot_, hidden, rows_.own.size() * sizeof(float), cudaMemcpyDeviceToDevice, stream),
      "a checkpoint"));
  return ready_.Record(stream);
}

TokenRange CudaCheckpoints::SliceOf(int rank) const {
  const int64_t rows = RowsOf(rank);
  return {rows * slice_ / slices_, rows * (slice_ + 1) / slices_};
}

absl::Status CudaCheckpoints::SendSlice() {
  if (layer_ < 0 || slice_ >= slices_) return absl::OkStatus();
  HW_RETURN_IF_ERROR(WaitForCopier());  // for what arrived before
  const uint64_t row = RowBytes(options_.hidden_size);
  const TokenRange own = SliceOf(options_.rank), left = SliceOf(Neighbour(-1));
  const auto bytes = [row](const TokenRange& rows) { return static_cast<uint64_t>(rows.size()) * row; };
  float* const from = snapshot_ + own.begin * options_.hidden_size;
  const size_t world = options_.partition->size();
  std::vector<DeviceParts> send(world), receive(world);
  if (own.size() > 0) {
    send[static_cast<size_t>(Neighbour(1))].push_back({reinterpret_cast<char*>(from), bytes(own)});
  }
  if (left.size() > 0) {
    receive[static_cast<size_t>(Neighbour(-1))].push_back({reinterpret_cast<char*>(arriving_), bytes(left)});
  }
  HW_RETURN_IF_ERROR(options_.exchange->SwapAside(send, receive, "exchange of a checkpoint", ready_.get()));
  const cudaStream_t stream = options_.exchange->stream();
  HW_RETURN_IF_ERROR(
      options_.copier->Add(stream, from, rows_.own.data() + own.begin * options_.hidden_size, bytes(own)));
  HW_RETURN_IF_ERROR(options_.copier->Add(
      stream, arriving_, rows_.left.data() + left.begin * options_.hidden_size, bytes(left)));
  added_ += bytes(own) + bytes(left);
  ++slice_;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint32_t>> CudaCheckpoints::Taken() {
  if (layer_ < 0 || slice_ < slices_) return taken_;
  HW_ASSIGN_OR_RETURN(const uint64_t copied, options_.copier->copied());
  if (copied < added_) return taken_;
  options_.store->Finish();
  taken_.push_back(static_cast<uint32_t>(std::exchange(layer_, -1)));
  const absl::Duration waited = std::exchange(waited_, absl::ZeroDuration());
  if (options_.metrics != nullptr) {
    options_.metrics->checkpoint_exchange.Observe(absl::ToDoubleSeconds(waited));
    options_.metrics->checkpoint_bytes.Set(static_cast<double>(options_.store->bytes()));
  }
  return taken_;
}

}  // namespace headwater
