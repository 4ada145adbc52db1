// The attention of a pass: dense, packed, searched some queries at a time, or by a policy over the whole
// prompt.
#include <algorithm>
#include <functional>
#include <utility>

#include "base/log.h"
#include "base/status_macros.h"
#include "model/kernel_status.h"
#include "worker/cuda/cuda_pass.h"

namespace headwater {
namespace {

constexpr double kLeastDensity = 0.002;
constexpr int64_t kLeastLearnt = 8192;

// (query, key, head) of a whole prompt.
uint64_t PairsOf(int64_t num_tokens, int32_t num_q_heads) {
  const auto count = static_cast<uint64_t>(num_tokens);
  return count * (count + 1) / 2 * static_cast<uint64_t>(num_q_heads);
}

}  // namespace

kernels::CudaAttentionArgs CudaPass::AttentionArgs(const char* k, const char* v, int64_t row, int64_t begin,
                                                   int64_t count) const {
  kernels::CudaAttentionArgs args;
  args.num_q_heads = config_.num_q_heads;
  args.num_kv_heads = config_.num_kv_heads;
  args.head_dim = config_.head_dim;
  args.softmax_scale = CudaPolicyShapeOf(config_).softmax_scale;
  args.q = Query(row, begin);
  args.out = Q(row);
  args.k = k;
  args.v = v;
  args.total_q = count;
  args.total_k = begin + count;
  if (!packed()) args.prompt_k = num_tokens_;
  return args;
}

absl::Status CudaPass::Launch(const kernels::CudaAttentionArgs& args) {
  return FromKernels(kernels::CudaAttention(args, workspace_, workspace_bytes_, stream_), "attention");
}

absl::Status CudaPass::Attend(int32_t layer, const char* k, const char* v) {
  if (IsLast(layer)) {
    if (!HoldsLastToken()) return absl::OkStatus();
    return AttendRange(layer, k, v, num_rows_ - 1, {num_tokens_ - 1, num_tokens_});
  }
  if (pattern_) HW_RETURN_IF_ERROR(pattern_->StartLayer(stream_));
  int64_t row = 0;
  for (const TokenRange& range : tokens_) {
    HW_RETURN_IF_ERROR(AttendRange(layer, k, v, row, range));
    row += range.size();
  }
  return absl::OkStatus();
}

absl::Status CudaPass::AttendRange(int32_t layer, const char* k, const char* v, int64_t row,
                                   const TokenRange& range) {
  const bool searched = pattern_.has_value() && !IsLast(layer);
  const double flop_per_pair = 4.0 * static_cast<double>(q_width_) * (searched ? density_ : 1);
  std::function<int64_t(int64_t)> fit;
  if (searched) fit = [this](int64_t count) { return pattern_->QueriesOfSearch(count); };
  PrefillProgress& progress = sequences_[0].result.progress;
  for (int64_t begin = range.begin; begin < range.end;) {
    const int64_t count = QueriesOfCall(flop_per_pair, begin, range.end,
                                        searched ? CudaPatternPlan::kMaxQueries : range.end, fit);
    kernels::CudaAttentionArgs args = AttentionArgs(k, v, row + begin - range.begin, begin, count);
    if (searched) {
      HW_RETURN_IF_ERROR(pattern_->Select(begin, &args, log_.AddSearch(layer, begin, count), stream_));
    }
    HW_RETURN_IF_ERROR(Launch(args));
    const uint64_t pairs = PairsOf(begin + count, config_.num_q_heads) - PairsOf(begin, config_.num_q_heads);
    if (!searched) {
      progress.pairs_computed += pairs;
      progress.pairs_possible += pairs;
    }
    begin += count;
    HW_RETURN_IF_ERROR(pacer_.Enqueued(flop_per_pair * static_cast<double>(pairs) / config_.num_q_heads));
  }
  return absl::OkStatus();
}

absl::Status CudaPass::AttendPacked(const char* k, const char* v) {
  kernels::CudaAttentionArgs args = AttentionArgs(k, v, 0, 0, num_tokens_);
  args.num_sequences = static_cast<int32_t>(sequences_.size());
  args.cu_seqlens_q = args.cu_seqlens_k = cu_seqlens_;
  HW_RETURN_IF_ERROR(Launch(args));
  double flop = 0;
  for (CudaSequence& sequence : sequences_) {
    const uint64_t pairs = PairsOf(sequence.num_tokens, config_.num_q_heads);
    sequence.result.progress.pairs_computed += pairs;
    sequence.result.progress.pairs_possible += pairs;
    flop += 4.0 * config_.head_dim * static_cast<double>(pairs);
  }
  return pacer_.Enqueued(flop);
}

// One call a range, which a cancelled job waits for; a layer that turns out dense goes in pieces.
absl::Status CudaPass::AttendPolicy(int32_t layer, const char* k, const char* v, char** out) {
  const kernels::CudaPolicyLayer arrays{layer, Query(0, 0), k, v};
  HW_ASSIGN_OR_RETURN(const bool dense, policy_pass_->Select(arrays));
  *out = Q(0);
  if (dense) return Attend(layer, k, v);
  HW_RETURN_IF_ERROR(policy_pass_->Attend(arrays, out));
  return pacer_.Enqueued(4.0 * config_.head_dim * static_cast<double>(Pairs()) * policy_pass_->density());
}

uint64_t CudaPass::Pairs() const {
  uint64_t pairs = 0;
  for (const TokenRange& range : tokens_) {
    pairs += PairsOf(range.end, config_.num_q_heads) - PairsOf(range.begin, config_.num_q_heads);
  }
  return pairs;
}

void CudaPass::LogOverflows(int32_t layer, uint32_t overflows) {
  if (overflows == 0) return;
  if (context_.metrics != nullptr) context_.metrics->search_overflows.Increment(overflows);
  if (std::exchange(overflow_logged_, true)) return;
  HW_LOG(WARNING).Field("request_id", sequences_[0].prompt->job->request_id)
      << "layer " << layer << ": the lists of " << overflows
      << " query tiles found no room; these tiles are computed densely";
}

double CudaPass::TakeDensity(int32_t layer) {
  PrefillProgress& progress = sequences_[0].result.progress;
  if (policy_pass_ != nullptr) {
    if (IsLast(layer)) return 1;  // the policy was not told of it
    const CudaPolicyLog::Read read = policy_pass_->Take(layer, &progress);
    LogOverflows(layer, read.overflows);
    density_ = std::max(kLeastDensity, read.density);
    // What the loop attends to is counted as it is enqueued.
    if (!read.by_policy) return 1;
    const uint64_t pairs = Pairs();
    progress.pairs_computed += static_cast<uint64_t>(read.density * static_cast<double>(pairs));
    progress.pairs_possible += pairs;
    return read.density;
  }
  constexpr uint64_t kPairs = uint64_t{128} * kernels::kStatsBlockTokens;
  const CudaLayerLog::Searches found = log_.CountSearches(layer, *pattern_);
  LogOverflows(layer, found.overflows);
  if (found.blocks.possible == 0) return 1;
  progress.pairs_computed += found.blocks.computed * kPairs;
  progress.pairs_possible += found.blocks.possible * kPairs;
  const double density =
      static_cast<double>(found.blocks.computed) / static_cast<double>(found.blocks.possible);
  density_ = std::max(kLeastDensity, density);
  return density;
}

void CudaPass::NoteLayer(int32_t layer) {
  PrefillProgress::Layer read{1};
  if (pattern_ || policy_pass_ != nullptr) {
    const PrefillProgress& progress = sequences_[0].result.progress;
    const double sum = progress.recall_sum;
    const uint64_t recalls = progress.recalls;
    read.density = static_cast<float>(TakeDensity(layer));
    if (progress.recalls > recalls) {
      read.recall =
          static_cast<float>((progress.recall_sum - sum) / static_cast<double>(progress.recalls - recalls));
    }
  }
  for (CudaSequence& sequence : sequences_) sequence.result.progress.layers.push_back(read);
}

// Of a whole layer: the last one computes one row's attention. Short prompts' kernels do not fill the device.
void CudaPass::LearnSpeed(int32_t layer, absl::Duration linear, absl::Duration attention) {
  if (context_.speed == nullptr || num_tokens_ < kLeastLearnt || packed() || shared() || IsLast(layer))
    return;
  const LayerWork work = WorkOf(config_, num_tokens_);
  context_.speed->Add(work.linear, linear, work.dense_attention * density_, attention);
}

}  // namespace headwater
