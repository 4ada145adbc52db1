#include "worker/ring_attention.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

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
        element_bytes_(kernels::SizeOf(args.dtype)),
        q_row_(static_cast<int64_t>(args.shape.num_q_heads) * args.shape.head_dim),
        kv_row_bytes_(static_cast<uint64_t>(args.shape.num_kv_heads) * args.shape.head_dim * element_bytes_) {
    const double pairs = args.flop_per_step / (4.0 * static_cast<double>(q_row_));
    pairs_per_call_ = std::max<int64_t>(1, static_cast<int64_t>(pairs));
  }

  uint64_t ChunkBytes(int owner) const {
    return 2 * static_cast<uint64_t>(NumTokens((*args_.keys)[owner])) * kv_row_bytes_;
  }

  // All segments against the chunk of `owner`.
  absl::Status Attend(int owner, const char* kv) const {
    const RankTokens& ranges = (*args_.keys)[owner];
    const char* const v = kv + static_cast<uint64_t>(NumTokens(ranges)) * kv_row_bytes_;
    uint64_t offset = 0;
    for (const TokenRange& range : ranges) {
      KeyChunk keys;
      keys.k = kv + offset;
      keys.v = v + offset;
      keys.dtype = args_.dtype;
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
        HW_RETURN_IF_ERROR(args_.control->Step());
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
    state.lse_ln = segment.state.lse_ln + row * args_.shape.num_q_heads;
    return FromKernels(kernels::SparseAttention(args_.shape, queries, part, *segment.index, state),
                       "attention");
  }

  const RingAttentionArgs& args_;
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
  const int world = args.schedule->world_size();
  for (const QuerySegment& segment : args.queries) {
    kernels::ResetAttentionState(args.shape, segment.chunk.num_tokens, segment.state);
  }
  const char* in_hand = args.own_kv;
  for (int step = 0; step < world; ++step) {
    const int owner = args.schedule->Owner(args.rank, step);
    char* const incoming = args.receive_kv[step % 2];
    std::unique_ptr<PendingExchange> exchange;
    if (step + 1 < world) {
      absl::Span<const char> send;
      absl::Span<char> receive;
      if (args.schedule->Sends(args.rank, step)) send = absl::MakeSpan(in_hand, attender.ChunkBytes(owner));
      if (args.schedule->Receives(args.rank, step)) {
        receive = absl::MakeSpan(incoming, attender.ChunkBytes(args.schedule->Owner(args.rank, step + 1)));
      }
      exchange = args.collectives->StartExchange((args.rank + 1) % world, send,
                                                 (args.rank - 1 + world) % world, receive);
    }
    const absl::Time start = clock->Now();
    if (args.schedule->Needs(args.rank, owner)) HW_RETURN_IF_ERROR(attender.Attend(owner, in_hand));
    const absl::Time computed = clock->Now();
    times->attention += computed - start;
    if (exchange != nullptr) {
      absl::Status status;
      {
        const JobControl::Waiting waiting(args.control);
        status = exchange->Wait();
      }
      times->exchange += clock->Now() - computed;
      if (!status.ok()) return CollectiveError(status, *args.control);
      HW_RETURN_IF_ERROR(args.control->Step());
    }
    in_hand = incoming;
  }
  return absl::OkStatus();
}

}  // namespace headwater
