#include "worker/cuda/cuda_policy_pass.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/block_mass.h"
#include "kernels/cuda/policies/headwater.h"
#include "model/kernel_status.h"
#include "worker/recall_samples.h"

namespace headwater {
namespace {

using Layer = CudaPolicyLog::Layer;

constexpr int64_t kMeasuredTokens = 32768;
constexpr double kMeasuredShare = 0.02;
constexpr int32_t kContractRows = 128;  // that min_recall wants whatever they cost
constexpr double kFirstDensity = 0.1;
// Of recall: blocks whose scores lie at a threshold may be listed or not, and that makes no group short
// again.
constexpr double kRounding = 0.0005;
// A wait covers what is enqueued ahead: up to the attention of the layer before.
constexpr absl::Duration kLongestWait = absl::Minutes(2), kPoll = absl::Microseconds(20);

// Blocks of a tile's window, of all layers and KV heads on average.
double MeanWindow(const kernels::HeadwaterParameters& parameters) {
  if (parameters.windows.empty()) return parameters.window_blocks;
  const double sum = std::accumulate(parameters.windows.begin(), parameters.windows.end(), 0.0);
  return sum / static_cast<double>(parameters.windows.size());
}

// The least share of the blocks that policy headwater can read.
double LeastDensity(const kernels::HeadwaterParameters& parameters, int64_t num_tokens) {
  const double blocks = static_cast<double>(num_tokens) / 128 + 1;
  const double listed = 2 * (parameters.sink_blocks + MeanWindow(parameters) + 1) / blocks;
  return std::min(1.0, listed + 2.0 * parameters.dense_last_tokens / static_cast<double>(num_tokens));
}

}  // namespace

absl::Status CheckTimeBudget(const PrefillJob& job, const ModelConfig& config, const ComputeSpeed& speed,
                             bool dense) {
  const absl::Duration budget = job.quality.time_budget;
  if (budget == absl::ZeroDuration()) return absl::OkStatus();
  const auto tokens = static_cast<int64_t>(job.tokens.size());
  const auto* const own = std::get_if<kernels::HeadwaterParameters>(&job.policy->parameters());
  const double least = dense || own == nullptr ? 1 : LeastDensity(*own, tokens);
  const absl::Duration predicted = PredictTime(WorkOf(config, tokens), speed, config.num_layers, least);
  if (predicted <= budget) return absl::OkStatus();
  return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_TIME_BUDGET_TOO_SHORT,
                   absl::StrCat("quality.time_budget is ", absl::FormatDuration(budget), "; ", tokens,
                                " tokens at density ", least, " take ", absl::FormatDuration(predicted)),
                   {{"value", absl::FormatDuration(budget)}, {"limit", absl::FormatDuration(predicted)}});
}

CudaPolicyPass::CudaPolicyPass(const CudaPolicyPassOptions& options)
    : options_(options),
      config_(*options.config),
      job_(*options.job),
      own_(std::get_if<kernels::HeadwaterParameters>(&job_.policy->parameters())),
      num_tokens_(static_cast<int64_t>(job_.tokens.size())),
      shape_(CudaPolicyShapeOf(config_)),
      counters_(nullptr, 0),
      density_(kFirstDensity) {
  char* at = options.memory;
  const auto take = [&](uint64_t bytes) {
    return bytes == 0 ? nullptr : std::exchange(at, at + AlignedCudaPart(bytes));
  };
  const CudaPolicyPlan& plan = options.plan;
  policy_memory_ = take(plan.policy);
  workspace_ = take(plan.workspace);
  lse_ = reinterpret_cast<float*>(take(plan.lse));
  out_ = take(plan.out);
  counters_ = CudaPolicyCounters(take(plan.counters), config_.num_q_heads);
  rows_ = reinterpret_cast<int64_t*>(take(plan.rows));
  mass_ = reinterpret_cast<float*>(take(plan.mass));
  curve_ = reinterpret_cast<float*>(take(plan.curve));
}

absl::StatusOr<std::unique_ptr<CudaPolicyPass>> CudaPolicyPass::Begin(const CudaPolicyPassOptions& options) {
  auto pass = std::unique_ptr<CudaPolicyPass>(new CudaPolicyPass(options));
  HW_RETURN_IF_ERROR(pass->Init());
  return pass;
}

absl::Status CudaPolicyPass::Init() {
  if (job_.quality.any() && own_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("quality with policy ", job_.policy->name()));
  }
  HW_RETURN_IF_ERROR(log_.Init(config_, job_.policy->name()));
  HW_RETURN_IF_ERROR(arrived_.Create(cudaEventDisableTiming));
  return FromKernels(
      options_.policy->Begin(num_tokens_, policy_memory_, options_.plan.policy, options_.stream),
      absl::StrCat("policy ", job_.policy->name()));
}

int32_t CudaPolicyPass::RowsToSample() const {
  const auto affordable = [&](int32_t most) {
    return AffordableRows(num_tokens_, density_, kMeasuredShare, config_.num_q_heads / config_.num_kv_heads,
                          most);
  };
  if (job_.quality.min_recall > 0) {
    return std::min(options_.plan.sampled_rows,
                    std::max(kContractRows, affordable(options_.plan.sampled_rows)));
  }
  if (job_.quality.any()) return CudaPolicyPlan::kSampledRows;
  return options_.measure_recall && num_tokens_ >= kMeasuredTokens ? affordable(CudaPolicyPlan::kSampledRows)
                                                                   : 0;
}

// Masses of sampled queries, which do not depend on the lists.
absl::Status CudaPolicyPass::Sample(const kernels::CudaPolicyLayer& layer, int32_t rows) {
  const std::vector<int64_t> positions = SampleRows(job_.request_id, layer.layer, num_tokens_, rows);
  log_.layer(layer.layer).rows = static_cast<int32_t>(positions.size());
  if (positions.empty()) return absl::OkStatus();
  int64_t* const pinned = log_.positions(layer.layer);
  std::copy(positions.begin(), positions.end(), pinned);
  HW_RETURN_IF_ERROR(FromCuda(cudaMemcpyAsync(rows_, pinned, positions.size() * sizeof(int64_t),
                                              cudaMemcpyHostToDevice, options_.stream),
                              "sampled queries"));
  kernels::CudaRowMassArgs args;
  args.problem = {layer.q,
                  layer.k,
                  num_tokens_,
                  config_.num_q_heads,
                  config_.num_kv_heads,
                  config_.head_dim,
                  shape_.softmax_scale};
  args.rows.positions = rows_;
  args.rows.num_rows = static_cast<int32_t>(positions.size());
  args.mass = mass_;
  return FromKernels(kernels::CudaRowMass(args, options_.stream), "masses of sampled queries");
}

// Counts what the selection holds and copies that to the host.
absl::Status CudaPolicyPass::Measure(const kernels::CudaPolicyLayer& layer) {
  Layer& log = log_.layer(layer.layer);
  log.num_lists = selection_.lists.num_lists;
  log.kind = selection_.ranges != nullptr ? Layer::Kind::kRanges
             : log.num_lists > 0          ? Layer::Kind::kLists
                                          : Layer::Kind::kDense;
  log.possible = selection_.possible;
  if (log.kind == Layer::Kind::kLists) {
    const bool per_query_head = log.num_lists == config_.num_q_heads;
    const kernels::CudaBlockMasks one =
        kernels::CudaBlockMasksOf(num_tokens_, config_.num_q_heads, config_.num_kv_heads, per_query_head);
    log.possible = kernels::CudaPossibleBlocks(one) / static_cast<uint64_t>(one.num_lists);
    if (own_ != nullptr) {
      const int64_t last = own_->dense_last_tokens, first_dense = std::max<int64_t>(0, num_tokens_ - last);
      log.usual_dense_tiles =
          last == 0 ? 0 : static_cast<uint32_t>(one.tiles() - first_dense / one.tile_positions);
    }
    HW_RETURN_IF_ERROR(FromKernels(
        kernels::CudaCountLists(
            {selection_.lists, num_tokens_, config_.num_q_heads, counters_.visited, counters_.dense_tiles},
            options_.stream),
        "counts of lists"));
    if (log.rows > 0) {
      kernels::CudaRecallArgs args;
      args.mass = mass_;
      args.rows.positions = rows_;
      args.rows.num_rows = log.rows;
      args.num_tokens = num_tokens_;
      args.num_q_heads = config_.num_q_heads;
      args.lists = selection_.lists;
      args.recall = counters_.recall;
      HW_RETURN_IF_ERROR(FromKernels(kernels::CudaRecallOfRows(args, options_.stream), "recall"));
    }
  }
  return log_.Copy(layer.layer, counters_, selection_, options_.stream);
}

// Thresholds that min_recall wants, for Judge(); before Measure(), which copies them.
absl::Status CudaPolicyPass::FindEnough(const kernels::CudaPolicyLayer& layer) {
  kernels::CudaRecallGoal goal;
  goal.rows.positions = rows_;
  goal.rows.num_rows = log_.layer(layer.layer).rows;
  goal.mass = mass_;
  const double least = job_.quality.min_recall;
  goal.min_recall = static_cast<float>(least + std::min(kRounding, (1 - least) / 2));
  goal.errors = static_cast<float>(RecallContract::kErrors);
  goal.curve = curve_;
  goal.thresholds = counters_.enough;
  return FromKernels(options_.policy->ThresholdsForRecall(layer, goal, options_.stream),
                     "thresholds for min_recall");
}

absl::Status CudaPolicyPass::Wait(int32_t layer) {
  const absl::Time start = absl::Now();
  HW_RETURN_IF_ERROR(arrived_.Record(options_.stream));
  while (true) {
    const cudaError_t state = cudaEventQuery(arrived_.get());
    if (state == cudaSuccess) break;
    if (state != cudaErrorNotReady) return FromCuda(state, absl::StrCat("layer ", layer));
    (void)cudaGetLastError();  // no failure: the next launch must not take it for its own
    HW_RETURN_IF_ERROR(options_.step());
    if (absl::Now() - start > kLongestWait) {
      return absl::InternalError(absl::StrCat("layer ", layer, ": the device has not answered within ",
                                              absl::FormatDuration(kLongestWait)));
    }
    absl::SleepFor(kPoll);
  }
  waited_ += absl::Now() - start;
  return absl::OkStatus();
}

std::vector<GroupSetting> CudaPolicyPass::SettingsOf(int32_t layer) const {
  std::vector<GroupSetting> settings;
  for (int32_t head = 0; own_ != nullptr && head < config_.num_kv_heads; ++head) {
    const auto i =
        static_cast<size_t>(layer) * static_cast<size_t>(config_.num_kv_heads) + static_cast<size_t>(head);
    settings.push_back({own_->thresholds.empty() ? static_cast<float>(own_->threshold) : own_->thresholds[i],
                        own_->windows.empty() ? own_->window_blocks : own_->windows[i]});
  }
  return settings;
}

ContractRules CudaPolicyPass::RulesFor(int32_t layer) const {
  ContractRules rules;
  rules.min_recall = job_.quality.min_recall;
  if (job_.quality.max_density > 0) rules.max_density = job_.quality.max_density;
  if (job_.quality.time_budget > absl::ZeroDuration()) {
    const absl::Duration left = job_.quality.time_budget - (absl::Now() - options_.start);
    rules.max_density = std::max(
        0.0, DensityWithin(left, WorkOf(config_, num_tokens_), *options_.speed, config_.num_layers - layer));
  }
  // What is always listed comes on top of what is forced.
  const double blocks = static_cast<double>(num_tokens_) / 128 + 2;
  double window = 0;
  for (const GroupSetting& setting : SettingsOf(layer)) window += setting.window_blocks;
  window /= config_.num_kv_heads;
  const double room = static_cast<double>(kernels::HeadwaterBlocksPerTile(*own_, shape_, num_tokens_)) -
                      own_->sink_blocks - window - 2;
  rules.most_forced = std::clamp(2 * room / blocks, 0.0, 1.0);
  return rules;
}

// Looks at what was selected until the contract is content. Whether that is everything.
absl::StatusOr<bool> CudaPolicyPass::Keep(const kernels::CudaPolicyLayer& layer) {
  Layer& log = log_.layer(layer.layer);
  HW_RETURN_IF_ERROR(Wait(layer.layer));
  RecallContract contract(RulesFor(layer.layer), SettingsOf(layer.layer));
  const auto measures = [&] {
    if (log.kind == Layer::Kind::kLists) return log_.Groups(layer.layer);
    return std::vector<GroupMeasure>(static_cast<size_t>(config_.num_kv_heads));
  };
  while (contract.Judge(measures())) {
    const std::vector<float> thresholds = contract.thresholds();
    HW_RETURN_IF_ERROR(
        FromKernels(options_.policy->Reselect(layer, {thresholds.data(), nullptr, contract.forced_density()},
                                              options_.stream, &selection_),
                    "pattern search"));
    HW_RETURN_IF_ERROR(Measure(layer));
    HW_RETURN_IF_ERROR(Wait(layer.layer));
  }
  log.outcomes = contract.outcomes();
  if (log.kind == Layer::Kind::kDense) return true;
  const std::vector<float> thresholds = contract.thresholds();
  return contract.forced_density() == 0 &&
         std::all_of(thresholds.begin(), thresholds.end(), [](float threshold) { return threshold == 0; });
}

absl::StatusOr<bool> CudaPolicyPass::Select(const kernels::CudaPolicyLayer& layer) {
  HW_RETURN_IF_ERROR(FromKernels(options_.policy->Select(layer, options_.stream, &selection_),
                                 absl::StrCat("policy ", job_.policy->name())));
  const bool lists = selection_.lists.num_lists > 0;
  if (const int32_t rows = RowsToSample(); rows > 0 && (lists || job_.quality.any())) {
    HW_RETURN_IF_ERROR(Sample(layer, rows));
    if (lists && job_.quality.min_recall > 0) HW_RETURN_IF_ERROR(FindEnough(layer));
  }
  HW_RETURN_IF_ERROR(Measure(layer));
  Layer& log = log_.layer(layer.layer);
  const std::vector<GroupSetting> settings = SettingsOf(layer.layer);
  for (const GroupSetting& setting : settings) log.outcomes.push_back({setting});
  bool dense = log.kind == Layer::Kind::kDense;
  if (job_.quality.any()) {
    HW_ASSIGN_OR_RETURN(dense, Keep(layer));
  }
  log.by_loop = dense && !options_.policy->wants_lse();
  return log.by_loop;
}

absl::Status CudaPolicyPass::Attend(const kernels::CudaPolicyLayer& layer, char** out) {
  *out = out_ != nullptr ? out_ : static_cast<char*>(const_cast<void*>(layer.q));
  return FromKernels(
      kernels::CudaAttentionOver(selection_, options_.policy, shape_, num_tokens_, layer, {*out, lse_},
                                 workspace_, options_.plan.workspace, options_.stream),
      "attention");
}

CudaPolicyLog::Read CudaPolicyPass::Take(int32_t layer, PrefillProgress* progress) {
  const CudaPolicyLog::Read read = log_.Take(layer);
  if (log_.layer(layer).kind == Layer::Kind::kNone) return read;
  density_ = read.density;
  progress->recall_sum = log_.recall_sum();
  progress->recalls = log_.num_recalls();
  return read;
}

v1::AttentionReport CudaPolicyPass::Report() const {
  v1::AttentionReport report = log_.Report();
  const int64_t nanos = absl::ToInt64Nanoseconds(waited_);
  report.mutable_wait()->set_seconds(nanos / 1'000'000'000);
  report.mutable_wait()->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  return report;
}

}  // namespace headwater
