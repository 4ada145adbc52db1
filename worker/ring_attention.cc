#include "worker/ring_attention.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"

#include "base/clock.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "model/kernel_status.h"

namespace headwater {
namespace {

using kernels::KeyChunk;
using kernels::QueryChunk;

// Calls smaller than this leave threads idle and merge too often.
constexpr int64_t kMinCallQueries = 4 * kernels::kQueryTileTokens;
constexpr int64_t kMinCallKeys = 8 * kernels::kKeyBlockTokens;

// Cuts [begin, end) into pieces of about `most` tokens that end on multiples of `unit`, counted from the
// prompt's start.
std::vector<TokenRange> Cut(int64_t begin, int64_t end, int64_t most, int64_t unit) {
  std::vector<TokenRange> pieces;
  while (begin < end) {
    const int64_t stop = std::min(end, std::max((begin + most) / unit, begin / unit + 1) * unit);
    pieces.push_back({begin, stop});
    begin = stop;
  }
  return pieces;
}

class Attender {
 public:
  explicit Attender(const RingAttentionArgs& args)
      : args_(args),
        shape_(args.exchange.shape),
        element_bytes_(kernels::SizeOf(args.exchange.dtype)),
        q_row_(static_cast<int64_t>(shape_.num_q_heads) * shape_.head_dim),
        kv_row_bytes_(static_cast<uint64_t>(shape_.num_kv_heads) * shape_.head_dim * element_bytes_) {
    const double pairs = args.flop_per_step / (4.0 * static_cast<double>(q_row_));
    pairs_per_call_ = std::max<int64_t>(1, static_cast<int64_t>(pairs));
  }

  // All segments against the chunk of `owner`.
  absl::Status Attend(int owner, const char* kv) const {
    const RankTokens& ranges = (*args_.exchange.keys)[owner];
    const char* const v = kv + static_cast<uint64_t>(NumTokens(ranges)) * kv_row_bytes_;
    uint64_t offset = 0;
    for (const TokenRange& range : ranges) {
      KeyChunk keys;
      keys.k = kv + offset;
      keys.v = v + offset;
      keys.dtype = args_.exchange.dtype;
      keys.begin = range.begin;
      keys.num_tokens = range.size();
      for (const QuerySegment& segment : args_.queries) HW_RETURN_IF_ERROR(AttendPair(segment, keys));
      offset += static_cast<uint64_t>(range.size()) * kv_row_bytes_;
    }
    return absl::OkStatus();
  }

 private:
  absl::Status AttendPair(const QuerySegment& segment, const KeyChunk& keys) const {
    const int64_t q_end = segment.chunk.begin + segment.chunk.num_tokens;
    if (keys.begin >= q_end) return absl::OkStatus();
    const int64_t most_queries =
        std::max(kMinCallQueries, pairs_per_call_ / std::max<int64_t>(1, keys.num_tokens));
    for (const TokenRange& rows : Cut(segment.chunk.begin, q_end, most_queries, kernels::kQueryTileTokens)) {
      const int64_t visible_end = std::min(keys.begin + keys.num_tokens, rows.end);
      const int64_t most_keys = std::max(kMinCallKeys, pairs_per_call_ / rows.size());
      for (const TokenRange& columns : Cut(keys.begin, visible_end, most_keys, kernels::kKeyBlockTokens)) {
        HW_RETURN_IF_ERROR(args_.exchange.control->Step());
        HW_RETURN_IF_ERROR(Call(segment, rows, keys, columns));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Call(const QuerySegment& segment, const TokenRange& rows, const KeyChunk& keys,
                    const TokenRange& columns) const {
    const int64_t row = rows.begin - segment.chunk.begin;
    QueryChunk queries = segment.chunk;
    queries.q =
        static_cast<const char*>(segment.chunk.q) + static_cast<uint64_t>(row * q_row_) * element_bytes_;
    queries.begin = rows.begin;
    queries.num_tokens = rows.size();
    KeyChunk part = keys;
    const uint64_t skipped = static_cast<uint64_t>(columns.begin - keys.begin) * kv_row_bytes_;
    part.k = static_cast<const char*>(keys.k) + skipped;
    part.v = static_cast<const char*>(keys.v) + skipped;
    part.begin = columns.begin;
    part.num_tokens = columns.size();
    kernels::AttentionState state;
    state.out = segment.state.out + row * q_row_;
    state.lse_ln = segment.state.lse_ln + row * shape_.num_q_heads;
    return FromKernels(kernels::SparseAttention(shape_, queries, part, *segment.index, state), "attention");
  }

  const RingAttentionArgs& args_;
  const kernels::AttentionShape& shape_;
  const uint64_t element_bytes_;
  const int64_t q_row_;
  const uint64_t kv_row_bytes_;
  int64_t pairs_per_call_ = 1;
};

}  // namespace

absl::Status CollectiveError(const absl::Status& status, const JobControl& control) {
  HW_RETURN_IF_ERROR(control.status());
  if (!absl::IsDeadlineExceeded(status) && !absl::IsUnavailable(status)) return status;
  return MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_WORKER_LOST, status.message());
}

absl::Status RingAttention(const RingAttentionArgs& args, RingTimes* times) {
  const Attender attender(args);
  const Clock* const clock = Clock::Real();
  const ExchangeArgs& ranks = args.exchange;
  const int world = ranks.schedule->world_size();
  std::vector<const kernels::BlockIndex*> indices;
  for (const QuerySegment& segment : args.queries) {
    kernels::ResetAttentionState(ranks.shape, segment.chunk.num_tokens, segment.state);
    indices.push_back(segment.index);
  }
  const std::unique_ptr<KvExchange> exchange = MakeExchange(ranks);
  const auto timed = [&](absl::Duration* sum, const auto& work) -> absl::Status {
    const absl::Time start = clock->Now();
    const absl::Status status = work();
    *sum += clock->Now() - start;
    return status;
  };
  const auto exchanged = [&](const auto& work) -> absl::Status {
    const absl::Status status = timed(&times->exchange, work);
    return status.ok() ? status : CollectiveError(status, *ranks.control);
  };
  HW_RETURN_IF_ERROR(exchanged([&] { return exchange->Prepare(indices); }));
  for (int step = 0; step < world; ++step) {
    const int owner = ranks.schedule->Owner(ranks.rank, step);
    const bool more = step + 1 < world;
    if (more) HW_RETURN_IF_ERROR(exchanged([&] { return exchange->Start(step + 1); }));
    if (ranks.schedule->Needs(ranks.rank, owner)) {
      HW_RETURN_IF_ERROR(
          timed(&times->attention, [&] { return attender.Attend(owner, exchange->Chunk(step)); }));
    }
    if (more) HW_RETURN_IF_ERROR(exchanged([&] { return exchange->Finish(step + 1); }));
  }
  times->bytes += exchange->bytes();
  times->allgather_bytes += exchange->allgather_bytes();
  return absl::OkStatus();
}

}  // namespace headwater
