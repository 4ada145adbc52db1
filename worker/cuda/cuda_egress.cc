#include "worker/cuda/cuda_egress.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/cuda/layer_ops.h"
#include "model/kernel_status.h"
#include "worker/egress.h"
#include "worker/job_control.h"
#include "worker/layer_kv.h"

namespace headwater {
namespace {

using kernels::CudaTokenRun;

// Copies that are under way while an earlier one is handed to the sender.
constexpr size_t kCopiesAhead = 8;
static_assert(kCopiesAhead + 1 <
              CudaEgressMemory::kSlots);  // else a slot is waited for that is not handed on
// A cancelled job is seen after this long at most.
constexpr absl::Duration kPoll = absl::Milliseconds(20);
// What a slot's conversion is told and answers: a CudaTokenRun, then a word of problems.
constexpr uint64_t kRunBytes = 32;
constexpr uint64_t kProblemsOffset = 24;
static_assert(sizeof(CudaTokenRun) <= kProblemsOffset);

// Of the job's largest block.
uint64_t BlockBytes(const PrefillJob& job) {
  const v1::KvLayout& layout = job.geometry->layout();
  return std::min<uint64_t>(layout.block_tokens(), layout.num_tokens()) * job.geometry->token_bytes();
}

class Egress final : public CudaEgress {
 public:
  Egress(std::vector<CudaEgressItem> items, CudaEgressMemory* memory)
      : items_(std::move(items)), memory_(*memory), ended_(items_.size()) {}

  ~Egress() override {
    own_control_.Cancel(absl::CancelledError("the egress ends"));
    {
      const absl::MutexLock lock(&mutex_);
      stopping_ = true;
      changed_.SignalAll();
    }
    if (thread_.joinable()) thread_.join();
    if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
    for (const cudaEvent_t event : copied_events_) {
      if (event != nullptr) (void)cudaEventDestroy(event);
    }
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }

  absl::Status Init() {
    for (const CudaEgressItem& item : items_) HW_RETURN_IF_ERROR(CheckBlocks(*item.job));
    HW_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device_), "cudaGetDevice"));
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    for (cudaEvent_t& event : copied_events_) {
      HW_RETURN_IF_ERROR(FromCuda(
          cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "an event"));
    }
    thread_ = std::thread([this] { Work(); });
    return absl::OkStatus();
  }

  void Send(int32_t layer, const void* k, const void* v, cudaEvent_t ready) override {
    const absl::MutexLock lock(&mutex_);
    waiting_.push_back({layer, k, v, ready});
    sent_below_ = layer + 1;
    changed_.SignalAll();
  }

  absl::Status WaitCopied(int32_t layer, const Step& step, absl::Duration* stalled) override {
    const absl::Time start = clock_->Now();
    const absl::Status status =
        WaitUntil(step, [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return copied_layers_ > layer; });
    *stalled += clock_->Now() - start;
    return status;
  }

  absl::Status Finish(const Step& step) override {
    return WaitUntil(step,
                     [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return handed_below_ >= sent_below_; });
  }

  int32_t handed_below() const override {
    const absl::MutexLock lock(&mutex_);
    return handed_below_;
  }

  void Drop(size_t i) override { End(i, absl::CancelledError("dropped")); }

  absl::Status item_status(size_t i) const override {
    const absl::MutexLock lock(&mutex_);
    return ended_[i];
  }

 private:
  struct Layer {
    int32_t layer;
    const void* k;
    const void* v;
    cudaEvent_t ready;
  };
  // Tokens [begin, end) of an item's K or V in the slot of ring use `use`.
  struct Piece {
    size_t item;
    int32_t layer;
    KvKind kind;
    int64_t begin, end;
    int64_t use;
    char* slot;
  };

  static size_t SlotOf(const Piece& piece) {
    return static_cast<size_t>(piece.use) % CudaEgressMemory::kSlots;
  }
  char* RunOf(const Piece& piece) const { return memory_.runs.data() + SlotOf(piece) * kRunBytes; }

  template <typename Done>
  absl::Status WaitUntil(const Step& step, const Done& done) {
    while (true) {
      HW_RETURN_IF_ERROR(step());
      const absl::MutexLock lock(&mutex_);
      if (done() || !status_.ok()) return status_;
      changed_.WaitWithTimeout(&mutex_, kPoll);
    }
  }

  void End(size_t i, const absl::Status& why) {
    const absl::MutexLock lock(&mutex_);
    ended_[i].Update(why);
    changed_.SignalAll();
  }

  void Work() {
    absl::Status status = FromCuda(cudaSetDevice(device_), "cudaSetDevice");
    while (status.ok()) {
      Layer layer;
      {
        const absl::MutexLock lock(&mutex_);
        while (waiting_.empty() && !stopping_) changed_.WaitWithTimeout(&mutex_, kPoll);
        if (stopping_) return;
        layer = waiting_.front();
        waiting_.pop_front();
      }
      status = SendLayer(layer);
      const absl::MutexLock lock(&mutex_);
      if (status.ok()) handed_below_ = layer.layer + 1;
      changed_.SignalAll();
    }
    const absl::MutexLock lock(&mutex_);
    status_.Update(status);
    changed_.SignalAll();
  }

  absl::Status SendLayer(const Layer& layer) {
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream_, layer.ready, 0), "KV egress"));
    std::deque<Piece> under_way;
    for (size_t i = 0; i < items_.size(); ++i) {
      for (const KvKind kind : {KvKind::kK, KvKind::kV})
        HW_RETURN_IF_ERROR(SendTensor(layer, i, kind, &under_way));
    }
    // What is under way has left the device once its copies have ended.
    for (const Piece& piece : under_way) {
      HW_RETURN_IF_ERROR(FromCuda(cudaEventSynchronize(copied_events_[SlotOf(piece)]), "KV egress"));
    }
    {
      const absl::MutexLock lock(&mutex_);
      copied_layers_ = layer.layer + 1;
      changed_.SignalAll();
    }
    while (!under_way.empty()) HW_RETURN_IF_ERROR(HandOn(&under_way));
    return absl::OkStatus();
  }

  absl::Status SendTensor(const Layer& layer, size_t i, KvKind kind, std::deque<Piece>* under_way) {
    const PrefillJob& job = *items_[i].job;
    const auto piece_tokens = static_cast<int64_t>(CudaEgressMemory::kSlotBytes / BlockBytes(job) *
                                                   job.geometry->layout().block_tokens());
    for (const TokenRange& range : job.local()) {
      for (int64_t begin = range.begin; begin < range.end && item_status(i).ok(); begin += piece_tokens) {
        // What is under way must be handed on before its slots can come back.
        while (under_way->size() > kCopiesAhead) HW_RETURN_IF_ERROR(HandOn(under_way));
        const int64_t end = std::min(range.end, begin + piece_tokens);
        Piece piece{i, layer.layer, kind, begin, end, memory_.next_use++, nullptr};
        absl::Duration stalled;  // counted where compute waits
        HW_RETURN_IF_ERROR(memory_.ring->Acquire(piece.use, &own_control_, &piece.slot, &stalled));
        HW_RETURN_IF_ERROR(Copy(piece, kind == KvKind::kK ? layer.k : layer.v));
        under_way->push_back(piece);
      }
    }
    return absl::OkStatus();
  }

  // `from`: the pass's K or V.
  absl::Status Copy(const Piece& piece, const void* from) {
    const CudaEgressItem& item = items_[piece.item];
    const auto& layout = item.job->geometry->layout();
    const kernels::DType wire = WireType(layout.dtype());
    const int64_t count = piece.end - piece.begin,
                  row = int64_t{layout.num_kv_heads()} * layout.head_dim() * 2;
    const char* const first = static_cast<const char*>(from) + item.first_row * row;
    if (wire == kernels::DType::kBF16) {
      HW_RETURN_IF_ERROR(
          FromCuda(cudaMemcpyAsync(piece.slot, first + piece.begin * row, static_cast<size_t>(count * row),
                                   cudaMemcpyDeviceToHost, stream_),
                   "KV egress"));
    } else {
      auto* const run = reinterpret_cast<CudaTokenRun*>(RunOf(piece));
      *run = {piece.begin, count, 0};
      *Problems(piece) = 0;
      kernels::CudaPackKvArgs pack;
      pack.k = first;
      pack.num_tokens = static_cast<int64_t>(item.job->tokens.size());
      pack.num_kv_heads = static_cast<int32_t>(layout.num_kv_heads());
      pack.head_dim = static_cast<int32_t>(layout.head_dim());
      pack.k_destination = piece.slot;
      pack.destination_bytes = CudaEgressMemory::kSlotBytes;
      pack.wire_dtype = wire;
      pack.runs = run;
      pack.num_runs = 1;
      pack.problems = const_cast<uint32_t*>(Problems(piece));
      HW_RETURN_IF_ERROR(FromKernels(kernels::CudaPackKv(pack, stream_), "KV egress"));
    }
    return FromCuda(cudaEventRecord(copied_events_[SlotOf(piece)], stream_), "KV egress");
  }

  volatile uint32_t* Problems(const Piece& piece) const {
    return reinterpret_cast<volatile uint32_t*>(RunOf(piece) + kProblemsOffset);
  }

  // Gives the sender the blocks of the oldest piece, once it is there. An item's failure is its own.
  absl::Status HandOn(std::deque<Piece>* under_way) {
    const Piece piece = under_way->front();
    under_way->pop_front();
    HW_RETURN_IF_ERROR(FromCuda(cudaEventSynchronize(copied_events_[SlotOf(piece)]), "KV egress"));
    const CudaEgressItem& item = items_[piece.item];
    const KvGeometry& geometry = *item.job->geometry;
    if (!item_status(piece.item).ok()) return absl::OkStatus();
    if (WireType(geometry.layout().dtype()) == kernels::DType::kF16 && *Problems(piece) != 0) {
      End(piece.item,
          MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE,
                    absl::StrCat("layer ", piece.layer, ": a value of ", piece.kind == KvKind::kK ? "K" : "V",
                                 " is not finite in f16; ask for bf16 or f32"),
                    {{"layer", absl::StrCat(piece.layer)}}));
      return absl::OkStatus();
    }
    const auto block_tokens = static_cast<int64_t>(geometry.layout().block_tokens());
    const auto row = static_cast<int64_t>(geometry.token_bytes());
    for (int64_t begin = piece.begin; begin < piece.end; begin += block_tokens) {
      const KvBlockId id{static_cast<uint32_t>(piece.layer), piece.kind, static_cast<uint64_t>(begin),
                         static_cast<uint64_t>(std::min(piece.end, begin + block_tokens))};
      const absl::Status status =
          item.sender->Submit(id, piece.slot + (begin - piece.begin) * row, memory_.ring->Use(piece.use));
      if (!status.ok()) {
        End(piece.item, status);
        break;
      }
    }
    return absl::OkStatus();
  }

  const std::vector<CudaEgressItem> items_;
  CudaEgressMemory& memory_;
  const Clock* const clock_ = Clock::Real();
  JobControl own_control_;  // of the thread: its waits are no heartbeats of the compute loop
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t copied_events_[CudaEgressMemory::kSlots] = {};
  std::thread thread_;
  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  std::deque<Layer> waiting_ ABSL_GUARDED_BY(mutex_);
  int32_t sent_below_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t copied_layers_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t handed_below_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<absl::Status> ended_ ABSL_GUARDED_BY(mutex_);  // of each item
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaEgressMemory>> CudaEgressMemory::Allocate(absl::Duration stall_timeout) {
  auto memory = std::make_unique<CudaEgressMemory>();
  HW_ASSIGN_OR_RETURN(memory->slots, DeviceBuffer::AllocatePinned(kSlots * kSlotBytes, "KV egress"));
  HW_ASSIGN_OR_RETURN(memory->runs, DeviceBuffer::AllocatePinned(kSlots * kRunBytes, "KV egress"));
  std::vector<char*> slots;
  for (uint64_t i = 0; i < kSlots; ++i) slots.push_back(memory->slots.data() + i * kSlotBytes);
  memory->ring = std::make_unique<EgressRing>(std::move(slots), stall_timeout);
  return memory;
}

absl::Status CudaEgress::CheckBlocks(const PrefillJob& job) {
  const uint64_t bytes = BlockBytes(job);
  if (bytes <= CudaEgressMemory::kSlotBytes) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("a KV block of ", bytes, " bytes; at most ",
                                               CudaEgressMemory::kSlotBytes, " pass an egress buffer"));
}

absl::StatusOr<std::unique_ptr<CudaEgress>> CudaEgress::Start(std::vector<CudaEgressItem> items,
                                                              CudaEgressMemory* memory) {
  auto egress = std::make_unique<Egress>(std::move(items), memory);
  HW_RETURN_IF_ERROR(egress->Init());
  return std::unique_ptr<CudaEgress>(std::move(egress));
}

}  // namespace headwater
