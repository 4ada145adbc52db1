#include "worker/exchange.h"

#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/strip.h"

#include "base/log.h"
#include "base/status_macros.h"
#include "worker/key_selection.h"

namespace headwater {
namespace {

// The chunk in hand goes to the right neighbour.
class RingExchange final : public KvExchange {
 public:
  using KvExchange::KvExchange;

 private:
  absl::StatusOr<Transfer> Plan(int step) override {
    const int world = world_size();
    Transfer transfer{(args_.rank + 1) % world, {}, (args_.rank - 1 + world) % world, {}};
    if (args_.schedule->Sends(args_.rank, step - 1)) {
      transfer.send = absl::MakeConstSpan(Chunk(step - 1), ChunkBytes(Owner(step - 1)));
    }
    if (args_.schedule->Receives(args_.rank, step - 1)) {
      transfer.receive = absl::MakeSpan(Buffer(step), ChunkBytes(Owner(step)));
    }
    return transfer;
  }
};

// In step s the own chunk goes to rank + s, and that of rank - s comes.
class AllGatherExchange : public KvExchange {
 public:
  using KvExchange::KvExchange;

 protected:
  absl::StatusOr<Transfer> Plan(int step) override {
    const int to = (args_.rank + step) % world_size(), from = Owner(step);
    Transfer transfer{to, {}, from, {}};
    if (args_.schedule->Needs(to, args_.rank)) {
      transfer.send = absl::MakeConstSpan(args_.own_kv, ChunkBytes(args_.rank));
    }
    if (args_.schedule->Needs(args_.rank, from)) {
      transfer.receive = absl::MakeSpan(Buffer(step), ChunkBytes(from));
    }
    return transfer;
  }
};

// Of each chunk, only what the receiver selects. All ranks know all selections, so both sides know the sizes;
// a chunk that is selected whole goes as it lies.
class SparseExchange final : public AllGatherExchange {
 public:
  explicit SparseExchange(const ExchangeArgs& args)
      : AllGatherExchange(args), selection_(args.shape, args.num_tokens, args.selection) {}

  absl::Status Prepare(const std::vector<const kernels::BlockIndex*>& indices) override {
    if (args_.collectives == nullptr) return absl::OkStatus();
    selection_.Clear(args_.rank);
    for (const kernels::BlockIndex* index : indices) {
      HW_RETURN_IF_ERROR(args_.control->Step());
      selection_.Add(args_.rank, *index);
    }
    const JobControl::Waiting waiting(args_.control);
    const auto bytes = static_cast<uint64_t>(selection_.rank_words()) * sizeof(uint64_t);
    return args_.collectives->AllGather(selection_.row(args_.rank), bytes, selection_.row(0));
  }

 private:
  absl::StatusOr<Transfer> Plan(int step) override {
    HW_ASSIGN_OR_RETURN(Transfer transfer, AllGatherExchange::Plan(step));
    if (!transfer.send.empty()) {
      const uint64_t bytes = SelectedBytes(transfer.to, args_.rank);
      if (bytes < transfer.send.size()) {
        HW_RETURN_IF_ERROR(Pack(transfer.to));
        transfer.send = absl::MakeConstSpan(args_.send_kv, bytes);
      }
    }
    // Packed rows wait at the chunk's end.
    const uint64_t whole = transfer.receive.size();
    if (whole > 0) transfer.receive.remove_prefix(whole - SelectedBytes(args_.rank, transfer.from));
    return transfer;
  }

  uint64_t SelectedBytes(int receiver, int owner) const {
    return selection_.SelectedBytes(receiver, Ranges(owner), head_bytes_);
  }

  // K and then V, in the order in which they lie.
  absl::Status Pack(int receiver) const {
    char* to = args_.send_kv;
    for (const char* half : {args_.own_kv, args_.own_kv + ChunkBytes(args_.rank) / 2}) {
      HW_RETURN_IF_ERROR(selection_.ForEachRun(receiver, Ranges(args_.rank), head_bytes_, args_.control,
                                               [&](uint64_t offset, uint64_t bytes) {
                                                 std::memcpy(to, half + offset, bytes);
                                                 to += bytes;
                                               }));
    }
    return absl::OkStatus();
  }

  // In place: from any row's place to the chunk's end there is room for all that is still packed, so a row
  // never moves back, and writes over none that has still to move.
  absl::Status Place(int step) override {
    const int owner = Owner(step);
    const uint64_t whole = ChunkBytes(owner);
    const uint64_t packed = SelectedBytes(args_.rank, owner);
    if (packed == whole || !args_.schedule->Needs(args_.rank, owner)) return absl::OkStatus();
    const char* from = Buffer(step) + (whole - packed);
    for (char* half : {Buffer(step), Buffer(step) + whole / 2}) {
      HW_RETURN_IF_ERROR(selection_.ForEachRun(args_.rank, Ranges(owner), head_bytes_, args_.control,
                                               [&](uint64_t offset, uint64_t bytes) {
                                                 std::memmove(half + offset, from, bytes);
                                                 from += bytes;
                                               }));
    }
    return absl::OkStatus();
  }

  const KeySelection selection_;
};

}  // namespace

std::string StrategyName(v1::Strategy strategy) {
  return absl::AsciiStrToLower(absl::StripPrefix(v1::Strategy_Name(strategy), "STRATEGY_"));
}

KvExchange::KvExchange(const ExchangeArgs& args)
    : args_(args), head_bytes_(static_cast<uint64_t>(args.shape.head_dim) * kernels::SizeOf(args.dtype)) {}

absl::Status KvExchange::Prepare(const std::vector<const kernels::BlockIndex*>& /*indices*/) {
  return absl::OkStatus();
}

absl::Status KvExchange::Start(int step) {
  HW_ASSIGN_OR_RETURN(const Transfer transfer, Plan(step));
  bytes_ += transfer.receive.size();
  pending_ = args_.collectives->StartExchange(transfer.to, transfer.send, transfer.from, transfer.receive);
  return absl::OkStatus();
}

absl::Status KvExchange::Finish(int step) {
  {
    const JobControl::Waiting waiting(args_.control);
    HW_RETURN_IF_ERROR(pending_->Wait());
  }
  pending_.reset();
  HW_RETURN_IF_ERROR(args_.control->Step());
  return Place(step);
}

absl::Status KvExchange::Place(int /*step*/) { return absl::OkStatus(); }

uint64_t KvExchange::ChunkBytes(int rank) const {
  return 2 * static_cast<uint64_t>(NumTokens(Ranges(rank))) *
         static_cast<uint64_t>(args_.shape.num_kv_heads) * head_bytes_;
}

uint64_t KvExchange::allgather_bytes() const {
  uint64_t bytes = 0;
  for (int step = 1; step < world_size(); ++step) {
    if (args_.schedule->Needs(args_.rank, Owner(step))) bytes += ChunkBytes(Owner(step));
  }
  return bytes;
}

std::unique_ptr<KvExchange> MakeExchange(const ExchangeArgs& args) {
  switch (args.strategy) {
    case v1::STRATEGY_ALLGATHER:
      return std::make_unique<AllGatherExchange>(args);
    case v1::STRATEGY_SPARSE:
      return std::make_unique<SparseExchange>(args);
    default:
      HW_CHECK(args.strategy == v1::STRATEGY_RING);
      return std::make_unique<RingExchange>(args);
  }
}

}  // namespace headwater
