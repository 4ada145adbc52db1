#include "worker/calibration.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "kernels/attention/attention.h"
#include "kernels/pattern/policy.h"
#include "kvtransfer/discarding_sender.h"
#include "kvtransfer/layout.h"
#include "model/kernel_status.h"
#include "worker/backend.h"
#include "worker/job_control.h"
#include "worker/partition.h"

namespace headwater {
namespace {

constexpr absl::Duration kEnough = absl::Milliseconds(60);
constexpr int64_t kFirstTokens = 64, kMostTokens = 2048;
constexpr uint32_t kBlockTokens = 256;

// FLOP a second of work(count), whose FLOP flop(count) tells, at the count where it takes kEnough: the better
// of two calls, as the first of a count prepares what later ones use.
absl::StatusOr<double> MeasureRate(int64_t most, const std::function<absl::Status(int64_t)>& work,
                                   const std::function<double(int64_t)>& flop) {
  int64_t count = std::min(kFirstTokens, most);
  for (;;) {
    absl::Duration took = absl::InfiniteDuration();
    for (int round = 0; round < 2; ++round) {
      const absl::Time start = Clock::Real()->Now();
      HW_RETURN_IF_ERROR(work(count));
      took = std::min(took, Clock::Real()->Now() - start);
    }
    if (took >= kEnough || count == most) {
      return flop(count) / std::max(1e-9, absl::ToDoubleSeconds(took));
    }
    count = std::min(2 * count, most);
  }
}

std::vector<int32_t> SomeTokens(const ModelConfig& config, int64_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(config.vocab_size));
  }
  return tokens;
}

// A prompt's Q, K, V and hidden states in layer 0.
struct LayerRows {
  std::vector<float> hidden, attention, lse;
  std::vector<char> q, k, v;

  LayerRows(const ModelConfig& config, kernels::DType dtype, int64_t count) {
    const auto tokens = static_cast<size_t>(count);
    const auto q_width = static_cast<size_t>(config.num_q_heads) * static_cast<size_t>(config.head_dim);
    const auto kv_width = static_cast<size_t>(config.num_kv_heads) * static_cast<size_t>(config.head_dim);
    hidden.resize(tokens * static_cast<size_t>(config.hidden_size));
    attention.resize(tokens * q_width);
    lse.resize(tokens * static_cast<size_t>(config.num_q_heads));
    q.resize(tokens * q_width * kernels::SizeOf(dtype));
    k.resize(tokens * kv_width * kernels::SizeOf(dtype));
    v.resize(k.size());
  }
};

absl::Status RunLinear(const Model& model, int64_t count, LayerRows* rows) {
  HW_RETURN_IF_ERROR(model.BeforeAttention(0, rows->hidden.data(), count, 0, rows->q.data(), rows->k.data(),
                                           rows->v.data()));
  return model.AfterAttention(0, rows->attention.data(), count, rows->hidden.data());
}

absl::Status RunAttention(const Model& model, const kernels::PatternPolicy& dense, int64_t count,
                          LayerRows* rows) {
  const kernels::AttentionShape shape = model.attention_shape();
  kernels::PatternInputs inputs;
  inputs.num_q_heads = shape.num_q_heads;
  inputs.num_kv_heads = shape.num_kv_heads;
  inputs.num_tokens = count;
  inputs.num_q_tiles = (count - 1) / kernels::kQueryTileTokens + 1;
  kernels::BlockIndex index;
  HW_RETURN_IF_ERROR(FromKernels(dense.Select(inputs, &index), "calibration"));
  const kernels::QueryChunk queries{rows->q.data(), model.compute(), 0, count};
  const kernels::KeyChunk keys{rows->k.data(), rows->v.data(), model.compute(), 0, count};
  const kernels::AttentionState state{rows->attention.data(), rows->lse.data()};
  kernels::ResetAttentionState(shape, count, state);
  return FromKernels(kernels::SparseAttention(shape, queries, keys, index, state), "calibration");
}

}  // namespace

absl::StatusOr<ComputeSpeed> MeasureModel(const Model& model) {
  const ModelConfig& config = model.config();
  const int64_t most = std::min<int64_t>(kMostTokens, config.max_position);
  const int64_t most_linear = std::min(most, model.chunk_tokens());
  LayerRows rows(config, model.compute(), most);
  HW_RETURN_IF_ERROR(model.Embed(SomeTokens(config, most), rows.hidden.data()));
  ComputeSpeed speed;
  HW_ASSIGN_OR_RETURN(speed.linear,
                      MeasureRate(
                          most_linear, [&](int64_t count) { return RunLinear(model, count, &rows); },
                          [&](int64_t count) { return WorkOf(config, count).linear; }));
  std::unique_ptr<kernels::PatternPolicy> dense;
  HW_RETURN_IF_ERROR(FromKernels(kernels::MakePolicy("dense", {}, &dense), "calibration"));
  HW_ASSIGN_OR_RETURN(speed.attention,
                      MeasureRate(
                          most, [&](int64_t count) { return RunAttention(model, *dense, count, &rows); },
                          [&](int64_t count) { return WorkOf(config, count).dense_attention; }));
  return speed;
}

absl::StatusOr<ComputeSpeed> MeasureRun(PrefillBackend* backend, int64_t num_tokens, absl::Duration settle) {
  const ModelConfig& config = backend->config();
  PrefillJob job;
  job.request_id = "calibration";
  job.epoch = 1;
  job.tokens = SomeTokens(config, num_tokens);
  v1::KvLayout layout;
  layout.set_num_layers(static_cast<uint32_t>(config.num_layers));
  layout.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  layout.set_head_dim(static_cast<uint32_t>(config.head_dim));
  layout.set_num_tokens(static_cast<uint64_t>(num_tokens));
  layout.set_block_tokens(kBlockTokens);
  layout.set_dtype(v1::KV_DTYPE_BF16);
  HW_ASSIGN_OR_RETURN(job.partition, PartitionTokens(num_tokens, 1, v1::PARTITION_CONTIGUOUS, kBlockTokens));
  HW_ASSIGN_OR_RETURN(KvGeometry geometry, KvGeometry::Create(layout));
  job.geometry = std::make_shared<const KvGeometry>(std::move(geometry));
  std::unique_ptr<kernels::PatternPolicy> dense;
  HW_RETURN_IF_ERROR(FromKernels(kernels::MakePolicy("dense", {}, &dense), "calibration"));
  job.policy = std::move(dense);
  HW_ASSIGN_OR_RETURN(job.plan, backend->Plan(*job.policy, kernels::DType::kBF16, num_tokens, num_tokens,
                                              num_tokens, 1, 0, job.strategy));
  PrefillResult last;
  const absl::Time start = SteadyNow();
  for (int round = 0; round < 2 || SteadyNow() - start < settle; ++round) {
    DiscardingSender sender;
    JobControl control;
    PrefillContext context;
    context.sender = &sender;
    context.control = &control;
    HW_RETURN_IF_ERROR(backend->Reserve(job));
    HW_ASSIGN_OR_RETURN(last, backend->Run(job, context));
  }
  return SpeedOf(config, num_tokens, last);
}

absl::StatusOr<ComputeSpeed> SpeedOf(const ModelConfig& config, int64_t num_tokens,
                                     const PrefillResult& result) {
  // Of the last layer, only the last token's attention and what follows: all but nothing of either.
  const LayerWork layer = WorkOf(config, num_tokens);
  const double kv_width = static_cast<double>(config.num_kv_heads) * config.head_dim;
  const double q_width = static_cast<double>(config.num_q_heads) * config.head_dim;
  const double projection =
      2.0 * static_cast<double>(num_tokens) * config.hidden_size * (q_width + 2 * kv_width);
  const double whole_layers = config.num_layers - 1;
  if (whole_layers == 0 || result.linear <= absl::ZeroDuration() ||
      result.attention <= absl::ZeroDuration()) {
    return absl::FailedPreconditionError("a prompt's times tell nothing");
  }
  ComputeSpeed speed;
  speed.linear = (whole_layers * layer.linear + projection) / absl::ToDoubleSeconds(result.linear);
  speed.attention = whole_layers * layer.dense_attention / absl::ToDoubleSeconds(result.attention);
  return speed;
}

LinkRates DefaultLinkRates(bool gpu) {
  if (gpu) return {100e9, 7.2e9, 30e-6, 0.3};
  return {1e9, 0.75e9, 200e-6, 0.02};
}

v1::ServedModel ShapeOf(const ModelConfig& config) {
  v1::ServedModel shape;
  shape.set_vocab_size(static_cast<uint32_t>(config.vocab_size));
  shape.set_max_position(static_cast<uint64_t>(config.max_position));
  shape.set_num_layers(static_cast<uint32_t>(config.num_layers));
  shape.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  shape.set_head_dim(static_cast<uint32_t>(config.head_dim));
  shape.set_hidden_size(static_cast<uint32_t>(config.hidden_size));
  shape.set_num_q_heads(static_cast<uint32_t>(config.num_q_heads));
  shape.set_intermediate_size(static_cast<uint32_t>(config.intermediate_size));
  return shape;
}

v1::ComputeRates MakeComputeRates(const ComputeSpeed& speed, const LinkRates& links,
                                  const ModelConfig& config, kernels::DType exchanged) {
  v1::ComputeRates rates;
  rates.set_linear_flops(speed.linear);
  rates.set_attention_flops(speed.attention);
  rates.set_link_bytes_per_s(links.link_bytes_per_s);
  rates.set_egress_bytes_per_s(links.egress_bytes_per_s);
  rates.set_exchange_bytes_per_token(static_cast<uint32_t>(2 * static_cast<uint64_t>(config.num_kv_heads) *
                                                           static_cast<uint64_t>(config.head_dim) *
                                                           kernels::SizeOf(exchanged)));
  rates.set_exchange_step_s(links.exchange_step_s);
  rates.set_group_start_s(links.group_start_s);
  return rates;
}

}  // namespace headwater
