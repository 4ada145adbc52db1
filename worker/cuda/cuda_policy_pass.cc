#include "worker/cuda/cuda_policy_pass.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "kernels/cuda/block_masks.h"
#include "kernels/cuda/block_mass.h"
#include "kernels/cuda/block_stats.h"
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

}  // namespace

CudaPolicyPass::CudaPolicyPass(const CudaPolicyPassOptions& options)
    : options_(options),
      config_(*options.config),
      job_(*options.job),
      own_(std::get_if<kernels::HeadwaterParameters>(&job_.policy->parameters())),
      num_tokens_(static_cast<int64_t>(job_.tokens.size())),
      shape_(CudaPolicyShapeOf(config_)),
      mass_row_(config_.num_q_heads * kernels::CudaStatsBlocks(num_tokens_)),
      counters_(nullptr, 0, 1),
      density_(kFirstDensity),
      kept_density_(kFirstDensity) {
  char* at = options.memory;
  const auto take = [&](uint64_t bytes) {
    return bytes == 0 ? nullptr : std::exchange(at, at + AlignedCudaPart(bytes));
  };
  const CudaPolicyPlan& plan = options.plan;
  policy_memory_ = take(plan.policy);
  workspace_ = take(plan.workspace);
  lse_ = reinterpret_cast<float*>(take(plan.lse));
  out_ = take(plan.out);
  counters_ = CudaPolicyCounters(take(plan.counters), config_.num_q_heads, options.group->world_size());
  rows_ = reinterpret_cast<int64_t*>(take(plan.rows));
  mass_ = reinterpret_cast<float*>(take(plan.mass));
  curve_ = reinterpret_cast<float*>(take(plan.curve));
  part_ = take(plan.part);
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
  const CudaPolicyGroup& group = *options_.group;
  HW_RETURN_IF_ERROR(log_.Init(config_, job_.policy->name(), group.rank(), group.world_size()));
  HW_RETURN_IF_ERROR(arrived_.Create(cudaEventDisableTiming));
  // Ranks without tokens, and policies that count no overflows, leave their counts as they are.
  HW_RETURN_IF_ERROR(
      FromCuda(cudaMemsetAsync(counters_.slots, 0, options_.plan.counters, options_.stream), "counters"));
  const kernels::Status begun =
      group.alone()
          ? options_.policy->Begin(num_tokens_, policy_memory_, options_.plan.policy, options_.stream)
          : options_.policy->BeginRanges(num_tokens_, ranges(), policy_memory_, options_.plan.policy,
                                         options_.stream);
  return FromKernels(begun, absl::StrCat("policy ", job_.policy->name()));
}

kernels::CudaPolicyLayer CudaPolicyPass::Part(const kernels::CudaPolicyLayer& layer, size_t range) const {
  int64_t row = 0;
  for (size_t i = 0; i < range; ++i) row += ranges()[i].count;
  kernels::CudaPolicyLayer part = layer;
  part.q = static_cast<const char*>(layer.q) + row * config_.num_q_heads * config_.head_dim * 2;
  part.range = static_cast<int32_t>(range);
  return part;
}

absl::Span<const int64_t> CudaPolicyPass::Positions(int32_t layer) const {
  return {log_.positions(layer), static_cast<size_t>(log_.layer(layer).rows)};
}

CudaPolicyGroup::Run CudaPolicyPass::RunOf(int32_t layer, size_t range) const {
  return CudaPolicyGroup::RunOf(ranges()[range], Positions(layer));
}

// The same on all ranks, and where a quality depends on it the same whenever it is asked.
int32_t CudaPolicyPass::RowsToSample() const {
  const double density = job_.quality.any()        ? kept_density_
                         : options_.group->alone() ? density_
                                                   : kFirstDensity;
  const auto affordable = [&](int32_t most) {
    return AffordableRows(num_tokens_, density, kMeasuredShare, config_.num_q_heads / config_.num_kv_heads,
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
  for (size_t i = 0; i < ranges().size(); ++i) {
    const CudaPolicyGroup::Run run = RunOf(layer.layer, i);
    if (run.count == 0) continue;
    kernels::CudaRowMassArgs args;
    args.problem = {Part(layer, i).q,     layer.k,          num_tokens_,          config_.num_q_heads,
                    config_.num_kv_heads, config_.head_dim, shape_.softmax_scale, ranges()[i].first};
    args.rows.positions = rows_ + run.first;
    args.rows.num_rows = static_cast<int32_t>(run.count);
    args.mass = mass_ + run.first * mass_row_;
    HW_RETURN_IF_ERROR(FromKernels(kernels::CudaRowMass(args, options_.stream), "masses of sampled queries"));
  }
  return absl::OkStatus();
}

// Selections of all ranges, and of how many lists they are: of a rank without tokens, too.
absl::Status CudaPolicyPass::SelectRanges(const kernels::CudaPolicyLayer& layer,
                                          const kernels::CudaSearchSettings* settings) {
  selections_.assign(ranges().size(), {});
  for (size_t i = 0; i < ranges().size(); ++i) {
    const kernels::CudaPolicyLayer part = Part(layer, i);
    HW_RETURN_IF_ERROR(FromKernels(
        settings == nullptr ? options_.policy->Select(part, options_.stream, &selections_[i])
                            : options_.policy->Reselect(part, *settings, options_.stream, &selections_[i]),
        absl::StrCat("policy ", job_.policy->name())));
  }
  if (options_.group->alone()) {
    num_lists_ = selections_[0].lists.num_lists;
    return absl::OkStatus();
  }
  const std::vector<GroupSetting> own = SettingsOf(layer.layer);
  const bool dense =
      settings == nullptr &&
      std::all_of(own.begin(), own.end(), [](const GroupSetting& setting) { return setting.threshold == 0; });
  num_lists_ = dense ? 0 : config_.num_kv_heads;
  return absl::OkStatus();
}

// Counts what the selections hold, on all ranks, and copies that to the host.
absl::Status CudaPolicyPass::Measure(const kernels::CudaPolicyLayer& layer) {
  Layer& log = log_.layer(layer.layer);
  const bool by_key = options_.group->alone() && selections_[0].ranges != nullptr;
  log.num_lists = num_lists_;
  log.kind = by_key ? Layer::Kind::kRanges : num_lists_ > 0 ? Layer::Kind::kLists : Layer::Kind::kDense;
  if (by_key) log.possible = selections_[0].possible;
  if (log.kind == Layer::Kind::kLists) HW_RETURN_IF_ERROR(CountLists(layer.layer));
  return log_.Copy(layer.layer, counters_, by_key ? selections_[0] : kernels::CudaSelection(),
                   options_.stream);
}

absl::Status CudaPolicyPass::CountLists(int32_t layer) {
  Layer& log = log_.layer(layer);
  const CudaPolicyGroup& group = *options_.group;
  const int32_t positions = 128 / (config_.num_q_heads / num_lists_);
  if (possible_.first != positions) possible_ = {positions, group.PossibleBlocks(positions)};
  log.possible = possible_.second;
  if (own_ != nullptr) log.usual_dense_tiles = group.TilesOfLast(own_->dense_last_tokens, positions);
  const CudaPolicyCounters::Slot slot = counters_.slot(group.rank());
  for (size_t i = 0; i < ranges().size(); ++i) {
    const kernels::CudaSelection& selection = selections_[i];
    kernels::CudaCountListsArgs count{selection.lists, num_tokens_,      config_.num_q_heads,
                                      slot.visited,    slot.dense_tiles, selection.queries};
    count.accumulate = i > 0;
    count.overflows = selection.overflows;
    count.overflow_sum = selection.overflows == nullptr ? nullptr : slot.overflows;
    HW_RETURN_IF_ERROR(FromKernels(kernels::CudaCountLists(count, options_.stream), "counts of lists"));
    const CudaPolicyGroup::Run run = RunOf(layer, i);
    if (run.count == 0) continue;
    kernels::CudaRecallArgs args;
    args.mass = mass_ + run.first * mass_row_;
    args.rows.positions = rows_ + run.first;
    args.rows.num_rows = static_cast<int32_t>(run.count);
    args.num_tokens = num_tokens_;
    args.num_q_heads = config_.num_q_heads;
    args.lists = selection.lists;
    args.recall = counters_.recall + run.first * config_.num_q_heads;
    args.queries = selection.queries;
    HW_RETURN_IF_ERROR(FromKernels(kernels::CudaRecallOfRows(args, options_.stream), "recall"));
  }
  const SampledArray recall{counters_.recall, static_cast<uint64_t>(config_.num_q_heads) * sizeof(float)};
  return group.Share(counters_.slots, CudaPolicyCounters::SlotBytes(config_.num_q_heads), {&recall, 1},
                     Positions(layer), "exchange of a layer's counts", options_.stream);
}

// Thresholds that min_recall wants, for Judge(); before Measure(), which copies them.
absl::Status CudaPolicyPass::FindEnough(const kernels::CudaPolicyLayer& layer) {
  const int64_t curve_row = int64_t{config_.num_kv_heads} * (kernels::kRecallSteps + 1);
  kernels::CudaRecallGoal goal;
  const double least = job_.quality.min_recall;
  goal.min_recall = static_cast<float>(least + std::min(kRounding, (1 - least) / 2));
  goal.errors = static_cast<float>(RecallContract::kErrors);
  for (size_t i = 0; i < ranges().size(); ++i) {
    const CudaPolicyGroup::Run run = RunOf(layer.layer, i);
    if (run.count == 0) continue;
    goal.rows.positions = rows_ + run.first;
    goal.rows.num_rows = static_cast<int32_t>(run.count);
    goal.mass = mass_ + run.first * mass_row_;
    goal.curve = curve_ + run.first * curve_row;
    HW_RETURN_IF_ERROR(
        FromKernels(options_.policy->ThresholdsForRecall(Part(layer, i), goal, options_.stream),
                    "curves for min_recall"));
  }
  const SampledArray curves{curve_, static_cast<uint64_t>(curve_row) * sizeof(float)};
  HW_RETURN_IF_ERROR(options_.group->Share(nullptr, 0, {&curves, 1}, Positions(layer.layer),
                                           "exchange of sampled recalls", options_.stream));
  goal.rows = {rows_, nullptr, log_.layer(layer.layer).rows};
  goal.curve = curve_;
  goal.thresholds = counters_.enough;
  return FromKernels(kernels::CudaThresholdsOfCurves(goal, config_.num_kv_heads, options_.stream),
                     "thresholds for min_recall");
}

absl::Status CudaPolicyPass::Wait(int32_t layer) {
  const absl::Time start = SteadyNow();
  HW_RETURN_IF_ERROR(arrived_.Record(options_.stream));
  while (true) {
    const cudaError_t state = cudaEventQuery(arrived_.get());
    if (state == cudaSuccess) break;
    if (state != cudaErrorNotReady) return FromCuda(state, absl::StrCat("layer ", layer));
    (void)cudaGetLastError();  // no failure: the next launch must not take it for its own
    HW_RETURN_IF_ERROR(options_.step());
    if (SteadyNow() - start > kLongestWait) {
      return absl::InternalError(absl::StrCat("layer ", layer, ": the device has not answered within ",
                                              absl::FormatDuration(kLongestWait)));
    }
    absl::SleepFor(kPoll);
  }
  waited_ += SteadyNow() - start;
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

absl::StatusOr<ContractRules> CudaPolicyPass::RulesFor(int32_t layer) const {
  ContractRules rules;
  rules.min_recall = job_.quality.min_recall;
  if (job_.quality.max_density > 0) rules.max_density = job_.quality.max_density;
  if (job_.quality.time_budget > absl::ZeroDuration()) {
    // As if one device had all of the time.
    const absl::Duration left =
        (job_.quality.time_budget - (SteadyNow() - options_.start)) * options_.group->world_size();
    rules.max_density = std::max(
        0.0, DensityWithin(left, WorkOf(config_, num_tokens_), *options_.speed, config_.num_layers - layer));
    HW_RETURN_IF_ERROR(options_.group->Least(&rules.max_density));
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
  HW_ASSIGN_OR_RETURN(const ContractRules rules, RulesFor(layer.layer));
  RecallContract contract(rules, SettingsOf(layer.layer));
  const auto measures = [&] {
    if (log.kind == Layer::Kind::kLists) return log_.Groups(layer.layer);
    return std::vector<GroupMeasure>(static_cast<size_t>(config_.num_kv_heads));
  };
  while (contract.Judge(measures())) {
    const std::vector<float> thresholds = contract.thresholds();
    const kernels::CudaSearchSettings settings{thresholds.data(), nullptr, contract.forced_density()};
    HW_RETURN_IF_ERROR(SelectRanges(layer, &settings));
    HW_RETURN_IF_ERROR(Measure(layer));
    HW_RETURN_IF_ERROR(Wait(layer.layer));
  }
  log.outcomes = contract.outcomes();
  kept_density_ = 0;
  for (const GroupMeasure& group : measures()) kept_density_ += group.density / config_.num_kv_heads;
  if (log.kind == Layer::Kind::kDense) return true;
  const std::vector<float> thresholds = contract.thresholds();
  return contract.forced_density() == 0 &&
         std::all_of(thresholds.begin(), thresholds.end(), [](float threshold) { return threshold == 0; });
}

absl::StatusOr<bool> CudaPolicyPass::Select(const kernels::CudaPolicyLayer& layer) {
  HW_RETURN_IF_ERROR(SelectRanges(layer, nullptr));
  const bool lists = num_lists_ > 0;
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
  if (options_.part_out != nullptr) {
    *out = options_.part_out;
    return AttendParts(layer);
  }
  *out = out_ != nullptr ? out_ : static_cast<char*>(const_cast<void*>(layer.q));
  for (size_t i = 0; i < ranges().size(); ++i) {
    const kernels::CudaPolicyLayer part = Part(layer, i);
    char* const to = out_ != nullptr ? out_ : static_cast<char*>(const_cast<void*>(part.q));
    HW_RETURN_IF_ERROR(FromKernels(
        kernels::CudaAttentionOver(selections_[i], options_.policy, shape_, num_tokens_, part, {to, lse_},
                                   workspace_, options_.plan.workspace, options_.stream),
        "attention"));
  }
  return absl::OkStatus();
}

absl::Status CudaPolicyPass::AttendParts(const kernels::CudaPolicyLayer& layer) {
  const int64_t row_bytes = int64_t{config_.num_q_heads} * config_.head_dim * 2;
  char* to = options_.part_out;
  for (const kernels::CudaQueryRange& range : options_.parts) {
    kernels::CudaPolicyLayer part = layer;
    part.q = static_cast<const char*>(layer.q) + range.first * row_bytes;
    float* const lse = lse_ == nullptr ? nullptr : lse_ + range.first * config_.num_q_heads;
    HW_RETURN_IF_ERROR(FromKernels(
        kernels::CudaAttentionOverPart(selections_[0], range, shape_, num_tokens_, part, {to, lse}, part_,
                                       workspace_, options_.plan.workspace, options_.stream),
        "attention"));
    to += range.count * row_bytes;
  }
  if (!options_.policy->wants_lse()) return absl::OkStatus();
  HW_RETURN_IF_ERROR(options_.gather_lse(lse_));
  return FromKernels(options_.policy->Finish(layer, lse_, options_.stream),
                     absl::StrCat("policy ", job_.policy->name()));
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
