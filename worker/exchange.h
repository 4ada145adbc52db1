// How the K/V chunks of the other ranks come to a rank, in one layer.
#ifndef HW_WORKER_EXCHANGE_H_
#define HW_WORKER_EXCHANGE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "headwater/v1/types.pb.h"
#include "kernels/attention/attention.h"
#include "worker/collectives.h"
#include "worker/job_control.h"
#include "worker/partition.h"
#include "worker/ring.h"

namespace headwater {

// "ring", "allgather" or "sparse".
std::string StrategyName(v1::Strategy strategy);

// A chunk is its rank's K and then V, both [tokens, num_kv_heads, head_dim], the rank's ranges one behind the
// other.
struct ExchangeArgs {
  v1::Strategy strategy = v1::STRATEGY_RING;  // never unspecified
  kernels::AttentionShape shape;
  kernels::DType dtype = kernels::DType::kF32;  // of K and V
  int rank = 0;
  int64_t num_tokens = 0;                         // of the prompt
  const std::vector<RankTokens>* keys = nullptr;  // of all ranks
  const RingSchedule* schedule = nullptr;
  const char* own_kv = nullptr;
  char* receive_kv[2] = {nullptr, nullptr};  // each as large as the largest chunk
  // Sparse alone: as large as the own chunk; world_size * KeySelection::Words() words.
  char* send_kv = nullptr;
  uint64_t* selection = nullptr;
  Collectives* collectives = nullptr;  // null: world size 1
  JobControl* control = nullptr;
};

// One layer's exchange, from one thread: Prepare(), and then for each step from 1 to world_size - 1 Start()
// and Finish(), after which Chunk(step) is that of schedule->Owner(rank, step). The chunk of the step before
// stays readable between the two. Where the rank needs no part of a chunk, Chunk() is of no use. All ranks
// must make the same calls. Errors are the collectives' and the job control's.
class KvExchange {
 public:
  explicit KvExchange(const ExchangeArgs& args);  // which must outlive this
  virtual ~KvExchange() = default;

  // What ranks must know of each other before the first step. indices: of all of this rank's queries.
  virtual absl::Status Prepare(const std::vector<const kernels::BlockIndex*>& indices);
  // Starts the transfers of the step and returns.
  absl::Status Start(int step);
  absl::Status Finish(int step);
  // Step 0: the own one.
  const char* Chunk(int step) const { return step == 0 ? args_.own_kv : Buffer(step); }

  // K/V bytes received so far, and what strategy allgather brings this rank in all steps.
  uint64_t bytes() const { return bytes_; }
  uint64_t allgather_bytes() const;

 protected:
  struct Transfer {
    int to = 0;
    absl::Span<const char> send;
    int from = 0;
    absl::Span<char> receive;
  };
  virtual absl::StatusOr<Transfer> Plan(int step) = 0;
  // Puts what Finish() has waited for in its place.
  virtual absl::Status Place(int step);

  int world_size() const { return args_.schedule->world_size(); }
  int Owner(int step) const { return args_.schedule->Owner(args_.rank, step); }
  const RankTokens& Ranges(int rank) const { return (*args_.keys)[static_cast<size_t>(rank)]; }
  uint64_t ChunkBytes(int rank) const;
  char* Buffer(int step) const { return args_.receive_kv[(step - 1) % 2]; }

  const ExchangeArgs& args_;
  const uint64_t head_bytes_;  // of one token's K and one head

 private:
  std::unique_ptr<PendingExchange> pending_;
  uint64_t bytes_ = 0;
};

// By args.strategy.
std::unique_ptr<KvExchange> MakeExchange(const ExchangeArgs& args);

}  // namespace headwater

#endif  // HW_WORKER_EXCHANGE_H_
