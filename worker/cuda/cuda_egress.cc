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
#include "worker/layer_kv.h"

namespace headwater {
namespace {

using kernels::CudaTokenRun;

// Copies that are under way while an earlier one is handed to the sender.
constexpr size_t kCopiesAhead = 2;
// A cancelled job is seen after this long at most.
constexpr absl::Duration kPoll = absl::Milliseconds(20);
constexpr uint64_t kRunBytes = 32;  // a CudaTokenRun, aligned as the kernel wants it
static_assert(sizeof(CudaTokenRun) <= kRunBytes);
constexpr uint64_t kProblemsOffset = CudaEgressMemory::kSlots * kRunBytes;

class Egress final : public CudaEgress {
 public:
  Egress(const PrefillJob& job, KvSender* sender, JobControl* control, const CudaEgressMemory* memory,
         absl::Duration stall_timeout)
      : job_(job),
        sender_(sender),
        control_(control),
        memory_(*memory),
        wire_(WireType(job.geometry->layout().dtype())),
        ring_(Slots(*memory), stall_timeout),
        hook_(control, [this] { own_control_.Cancel(absl::CancelledError("the prefill is cancelled")); }) {}

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
    const uint64_t block_bytes = job_.geometry->layout().block_tokens() * job_.geometry->token_bytes();
    if (block_bytes > CudaEgressMemory::kSlotBytes) {
      return absl::UnimplementedError(absl::StrCat("a KV block of ", block_bytes, " bytes; at most ",
                                                   CudaEgressMemory::kSlotBytes, " pass an egress buffer"));
    }
    piece_tokens_ = static_cast<int64_t>(CudaEgressMemory::kSlotBytes / block_bytes) *
                    static_cast<int64_t>(job_.geometry->layout().block_tokens());
    HW_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device_), "cudaGetDevice"));
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    for (cudaEvent_t& event : copied_events_) {
      HW_RETURN_IF_ERROR(FromCuda(
          cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "an event"));
    }
    *problems() = 0;
    thread_ = std::thread([this] { Work(); });
    return absl::OkStatus();
  }

  void Send(int32_t layer, const void* k, const void* v, cudaEvent_t ready) override {
    const absl::MutexLock lock(&mutex_);
    waiting_.push_back({layer, k, v, ready});
    ++sent_layers_;
    changed_.SignalAll();
  }

  absl::Status WaitCopied(int32_t layer, absl::Duration* stalled) override {
    const absl::Time start = clock_->Now();
    const absl::MutexLock lock(&mutex_);
    while (copied_layers_ <= layer && status_.ok()) {
      HW_RETURN_IF_ERROR(control_->Step());
      changed_.WaitWithTimeout(&mutex_, kPoll);
    }
    *stalled += clock_->Now() - start;
    return status_;
  }

  absl::Status Finish() override {
    const absl::MutexLock lock(&mutex_);
    while (handed_layers_ < sent_layers_ && status_.ok()) {
      HW_RETURN_IF_ERROR(control_->Step());
      changed_.WaitWithTimeout(&mutex_, kPoll);
    }
    return status_;
  }

 private:
  struct Layer {
    int32_t layer;
    const void* k;
    const void* v;
    cudaEvent_t ready;
  };
  // Tokens [begin, end) of K or V in the slot of ring use `use`.
  struct Piece {
    int32_t layer;
    KvKind kind;
    int64_t begin, end;
    int32_t use;
    char* slot;
    bool last;  // of its layer
  };

  static std::vector<char*> Slots(const CudaEgressMemory& memory) {
    std::vector<char*> slots;
    for (int i = 0; i < CudaEgressMemory::kSlots; ++i) slots.push_back(memory.slot(i));
    return slots;
  }

  volatile uint32_t* problems() const {
    return reinterpret_cast<volatile uint32_t*>(memory_.runs.data() + kProblemsOffset);
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
      if (status.ok()) ++handed_layers_;
      changed_.SignalAll();
    }
    const absl::MutexLock lock(&mutex_);
    status_.Update(status);
    changed_.SignalAll();
  }

  absl::Status SendLayer(const Layer& layer) {
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamWaitEvent(stream_, layer.ready, 0), "KV egress"));
    const auto num_tokens = static_cast<int64_t>(job_.tokens.size());
    std::deque<Piece> under_way;
    for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
      for (int64_t begin = 0; begin < num_tokens; begin += piece_tokens_) {
        Piece piece{layer.layer, kind,    begin, std::min(num_tokens, begin + piece_tokens_),
                    next_use_++, nullptr, false};
        piece.last = kind == KvKind::kV && piece.end == num_tokens;
        // What is under way must be handed on before its slots can come back.
        while (under_way.size() > kCopiesAhead) HW_RETURN_IF_ERROR(HandOn(&under_way));
        absl::Duration stalled;  // counted where compute waits
        HW_RETURN_IF_ERROR(ring_.Acquire(piece.use, &own_control_, &piece.slot, &stalled));
        HW_RETURN_IF_ERROR(Copy(piece, kind == KvKind::kK ? layer.k : layer.v));
        under_way.push_back(piece);
      }
    }
    while (!under_way.empty()) HW_RETURN_IF_ERROR(HandOn(&under_way));
    return absl::OkStatus();
  }

  absl::Status Copy(const Piece& piece, const void* from) {
    const auto& layout = job_.geometry->layout();
    const int64_t count = piece.end - piece.begin;
    const size_t slot = static_cast<size_t>(piece.use) % CudaEgressMemory::kSlots;
    if (wire_ == kernels::DType::kBF16) {
      const auto row = static_cast<int64_t>(job_.geometry->token_bytes());
      HW_RETURN_IF_ERROR(
          FromCuda(cudaMemcpyAsync(piece.slot, static_cast<const char*>(from) + piece.begin * row,
                                   static_cast<size_t>(count * row), cudaMemcpyDeviceToHost, stream_),
                   "KV egress"));
    } else {
      auto* const run = reinterpret_cast<CudaTokenRun*>(memory_.runs.data() + slot * kRunBytes);
      *run = {piece.begin, count, 0};
      kernels::CudaPackKvArgs pack;
      pack.k = from;
      pack.num_tokens = static_cast<int64_t>(job_.tokens.size());
      pack.num_kv_heads = static_cast<int32_t>(layout.num_kv_heads());
      pack.head_dim = static_cast<int32_t>(layout.head_dim());
      pack.k_destination = piece.slot;
      pack.destination_bytes = CudaEgressMemory::kSlotBytes;
      pack.wire_dtype = wire_;
      pack.runs = run;
      pack.num_runs = 1;
      pack.problems = const_cast<uint32_t*>(problems());
      HW_RETURN_IF_ERROR(FromKernels(kernels::CudaPackKv(pack, stream_), "KV egress"));
    }
    return FromCuda(cudaEventRecord(copied_events_[slot], stream_), "KV egress");
  }

  // Gives the sender the blocks of the oldest piece, once it is there.
  absl::Status HandOn(std::deque<Piece>* under_way) {
    const Piece piece = under_way->front();
    under_way->pop_front();
    const size_t slot = static_cast<size_t>(piece.use) % CudaEgressMemory::kSlots;
    HW_RETURN_IF_ERROR(FromCuda(cudaEventSynchronize(copied_events_[slot]), "KV egress"));
    if (wire_ == kernels::DType::kF16 && *problems() != 0) {
      return MakeError(
          absl::StatusCode::kInternal, v1::ERROR_REASON_NON_FINITE,
          absl::StrCat("layer ", piece.layer, ": a value of ", piece.kind == KvKind::kK ? "K" : "V",
                       " is not finite in f16; ask for bf16 or f32"),
          {{"layer", absl::StrCat(piece.layer)}});
    }
    if (piece.last) {
      const absl::MutexLock lock(&mutex_);
      copied_layers_ = piece.layer + 1;
      changed_.SignalAll();
    }
    const auto block_tokens = static_cast<int64_t>(job_.geometry->layout().block_tokens());
    const auto row = static_cast<int64_t>(job_.geometry->token_bytes());
    for (int64_t begin = piece.begin; begin < piece.end; begin += block_tokens) {
      const KvBlockId id{static_cast<uint32_t>(piece.layer), piece.kind, static_cast<uint64_t>(begin),
                         static_cast<uint64_t>(std::min(piece.end, begin + block_tokens))};
      HW_RETURN_IF_ERROR(sender_->Submit(id, piece.slot + (begin - piece.begin) * row, ring_.Use(piece.use)));
    }
    return absl::OkStatus();
  }

  const PrefillJob& job_;
  KvSender* const sender_;
  JobControl* const control_;
  const CudaEgressMemory& memory_;
  const kernels::DType wire_;
  const Clock* const clock_ = Clock::Real();
  EgressRing ring_;
  JobControl own_control_;  // of the thread: its waits are no heartbeats of the compute loop
  const JobControl::CancelHook hook_;
  int device_ = 0;
  int64_t piece_tokens_ = 0;
  int32_t next_use_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t copied_events_[CudaEgressMemory::kSlots] = {};
  std::thread thread_;
  absl::Mutex mutex_;
  absl::CondVar changed_;
  std::deque<Layer> waiting_ ABSL_GUARDED_BY(mutex_);
  int32_t sent_layers_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t copied_layers_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t handed_layers_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<CudaEgressMemory> CudaEgressMemory::Allocate() {
  CudaEgressMemory memory;
  HW_ASSIGN_OR_RETURN(memory.slots, DeviceBuffer::AllocatePinned(kSlots * kSlotBytes, "KV egress"));
  HW_ASSIGN_OR_RETURN(memory.runs,
                      DeviceBuffer::AllocatePinned(kProblemsOffset + sizeof(uint32_t), "KV egress"));
  return memory;
}

absl::StatusOr<std::unique_ptr<CudaEgress>> CudaEgress::Start(const PrefillJob& job, KvSender* sender,
                                                              JobControl* control,
                                                              const CudaEgressMemory* memory,
                                                              absl::Duration stall_timeout) {
  auto egress = std::make_unique<Egress>(job, sender, control, memory, stall_timeout);
  HW_RETURN_IF_ERROR(egress->Init());
  return std::unique_ptr<CudaEgress>(std::move(egress));
}

}  // namespace headwater
