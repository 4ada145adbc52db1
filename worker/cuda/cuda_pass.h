// CudaPass: the prompts of one pass on their way through the layers; RunCudaPrefill()'s state. For
// cuda_prefill.cc, cuda_attend.cc and cuda_pass_group.cc alone.
#ifndef HW_WORKER_CUDA_CUDA_PASS_H_
#define HW_WORKER_CUDA_CUDA_PASS_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

#include "base/status_macros.h"
#include "kernels/cuda/attention.h"
#include "model/cuda/device_buffer.h"
#include "worker/cuda/cuda_checkpoints.h"
#include "worker/cuda/cuda_group.h"
#include "worker/cuda/cuda_layer_log.h"
#include "worker/cuda/cuda_pattern.h"
#include "worker/cuda/cuda_policy_group.h"
#include "worker/cuda/cuda_policy_pass.h"
#include "worker/cuda/cuda_sequences.h"
#include "worker/cuda/gpu_pacer.h"

namespace headwater {

class CudaPass {
 public:
  CudaPass(absl::Span<const CudaPrefillPrompt> prompts, const CudaPrefillContext& context);
  // Nothing may be running on the device when its memory goes.
  ~CudaPass();
  std::vector<absl::StatusOr<PrefillResult>> Run();

 private:
  absl::Status RunLayers();
  absl::Status Step();
  bool packed() const { return sequences_.size() > 1; }
  bool shared() const { return context_.devices != nullptr; }
  // A rank whose policy looks at all queries: their Q comes here, too.
  bool SelectsForAll() const {
    return shared() && policy_ != nullptr &&
           !kernels::CudaPolicyTakesRanges(sequences_[0].prompt->job->policy->parameters());
  }
  bool HoldsLastToken() const { return !tokens_.empty() && tokens_.back().end == num_tokens_; }
  absl::Status Agree();

  absl::Status Prepare();
  absl::Status BeginExchange();
  // What the links carry when a layer's exchange has nothing to hide behind.
  absl::Status ProbeLink();
  bool TakesCheckpoints() const { return shared() && checkpoint_layers_ > 0; }
  // 0: none are taken. What this rank has room for.
  int WantedCheckpointLayers() const;
  absl::Status BeginCheckpoints(char* memory);
  // Finds the newest checkpoint that an epoch can go on from.
  absl::Status FinishCheckpoints();
  absl::Status Embed();
  // Goes on from the job's resume point.
  absl::Status Resume();
  // That all ranks use.
  absl::StatusOr<ComputeSpeed> Speed() const;
  absl::Status BeginPattern(const CudaPrefillPlan& plan, char* memory);
  absl::Status Upload();

  // Calls work(begin, count) for rows [0, num_rows), a model chunk at a time, at the device's pace.
  template <typename Work>
  absl::Status ForChunks(int64_t num_rows, const Work& work, double flop_per_row = 0) {
    for (int64_t begin = 0; begin < num_rows; begin += model_->chunk_tokens()) {
      const int64_t count = std::min(model_->chunk_tokens(), num_rows - begin);
      HW_RETURN_IF_ERROR(work(begin, count));
      HW_RETURN_IF_ERROR(pacer_.Enqueued(flop_per_row * static_cast<double>(count)));
    }
    return absl::OkStatus();
  }

  // Likewise for this rank's tokens: work(chunk), which is enqueued in whole.
  template <typename Work>
  absl::Status ForTokens(const Work& work, double flop_per_row = 0) {
    for (const CudaChunk& chunk : chunks_) {
      HW_RETURN_IF_ERROR(work(chunk));
      HW_RETURN_IF_ERROR(pacer_.Enqueued(flop_per_row * static_cast<double>(chunk.tokens.size())));
    }
    return absl::OkStatus();
  }

  absl::Status RunLayer(int32_t layer);
  // Q, K and V of this rank's tokens; the others' K and V are on their way when it returns.
  absl::Status Project(int32_t layer, char* k, char* v);
  // Bytes of a layer.
  void PlanExchange();
  // What came from other ranks for the layer.
  void CountExchange();
  // Likewise of f32 [num_tokens, num_q_heads], on the stream.
  absl::Status GatherRows(float* values);
  // Where K and V leave their block means as they are projected.
  kernels::CudaBlockStats MeansOf() const;
  // Of what the group shares.
  std::vector<SharedArray> SharedArrays(char* k, char* v) const;
  bool IsLast(int32_t layer) const { return layer + 1 == config_.num_layers && !packed(); }
  // (query, key, head) of this rank's tokens.
  uint64_t Pairs() const;
  // The rows whose attention is computed: in the last layer only the last token's result is used.
  struct Rows {
    int64_t first, count;
  };
  Rows QueriesOf(int32_t layer) const {
    if (!IsLast(layer)) return {0, num_rows_};
    return HoldsLastToken() ? Rows{num_rows_ - 1, 1} : Rows{0, 0};
  }
  // Of a row of this rank.
  int64_t TokenOf(int64_t row) const;
  // attention: of the first of QueriesOf().
  absl::Status FinishRows(int32_t layer, const char* attention);
  absl::Status CheckFinishedLayers();
  absl::Status ScoreLastTokens();
  void FillReports();

  // cuda_attend.cc. Each writes the layer's attention to Q's memory, AttendPolicy() to *out.
  // Of `count` queries from `row` on, the first of which is token `begin`.
  kernels::CudaAttentionArgs AttentionArgs(const char* k, const char* v, int64_t row, int64_t begin,
                                           int64_t count) const;
  absl::Status Launch(const kernels::CudaAttentionArgs& args);
  // Of QueriesOf(), some at a time; each call's output takes the place of its queries.
  absl::Status Attend(int32_t layer, const char* k, const char* v);
  absl::Status AttendRange(int32_t layer, const char* k, const char* v, int64_t row, const TokenRange& range);
  // All prompts at once.
  absl::Status AttendPacked(const char* k, const char* v);
  absl::Status AttendPolicy(int32_t layer, const char* k, const char* v, char** out);
  // Of a layer that has run.
  // Returns the share of the layer's pairs that was read.
  double TakeDensity(int32_t layer);
  // Adds a layer that has run to what progress tells.
  void NoteLayer(int32_t layer);
  void LogOverflows(int32_t layer, uint32_t overflows);
  void LearnSpeed(int32_t layer, absl::Duration linear, absl::Duration attention);

  int64_t RowChunks(int64_t rows) const {
    return (rows + model_->chunk_tokens() - 1) / model_->chunk_tokens();
  }
  float* Hidden(int64_t row) const { return hidden_ + row * config_.hidden_size; }
  // Attention's output of a row, and its query, which is token `token`.
  char* Q(int64_t row) const { return q_ + row * q_width_ * 2; }
  char* Query(int64_t row, int64_t token) const {
    return all_q_ == nullptr ? Q(row) : all_q_ + token * q_width_ * 2;
  }

  const CudaPrefillContext& context_;
  CudaModel* const model_;
  const ModelConfig& config_;
  const int64_t q_width_;
  const int64_t kv_width_;
  std::vector<CudaSequence> sequences_;
  int64_t num_tokens_ = 0;  // whose K and V are here: of all prompts, or of the prompt that is shared
  RankTokens tokens_;       // of them, those that are computed here, row by row
  int64_t num_rows_ = 0;
  std::vector<CudaChunk> chunks_;
  absl::Time start_;
  absl::Time compute_begin_;            // when the stream got the first layer; it was idle then
  std::vector<absl::Duration> stalls_;  // by layer: what it waited for the egress of one before it
  DeviceBuffer memory_;
  int32_t* ids_ = nullptr;
  int32_t* positions_ = nullptr;
  int32_t* cu_seqlens_ = nullptr;
  float* hidden_ = nullptr;
  char* q_ = nullptr;
  char* all_q_ = nullptr;  // null: the queries are at their rows in q_
  char* kv_[kCudaKvBuffers] = {};
  float* logits_ = nullptr;
  int64_t* bad_rows_ = nullptr;
  char* workspace_ = nullptr;
  uint64_t workspace_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  GpuPacer pacer_;
  CudaLayerLog log_;
  std::optional<CudaPattern> pattern_;           // of probe
  std::unique_ptr<kernels::CudaPolicy> policy_;  // of others that search
  std::unique_ptr<CudaPolicyPass> policy_pass_;
  ComputeSpeed speed_;  // as it was before the pass
  bool measure_recall_;
  double density_ = 1;  // of the last layer that has run
  bool overflow_logged_ = false;
  const int32_t first_layer_;
  int32_t layers_done_ = first_layer_;
  int32_t checked_ = first_layer_;
  std::unique_ptr<CudaEgress> egress_;
  std::optional<CudaKvExchange> exchange_;  // of a shared prompt
  std::optional<CudaPolicyGroup> policy_group_;
  std::optional<CudaPolicyGroup> policy_of_all_;  // where SelectsForAll()
  int32_t checkpoint_layers_ = 0;                 // that all ranks take
  std::unique_ptr<DeviceToHostCopier> copier_;
  std::optional<CudaCheckpoints> checkpoints_;
  uint64_t layer_exchange_bytes_ = 0, layer_allgather_bytes_ = 0;
};

}  // namespace headwater

#endif  // HW_WORKER_CUDA_CUDA_PASS_H_
