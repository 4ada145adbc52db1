#include "worker/agreement.h"

#include <algorithm>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kvtransfer/digest.h"
#include "worker/prefill.h"
#include "worker/ring_attention.h"

namespace headwater {
namespace {

struct Agreement {
  uint32_t plan = 0;
  int32_t checkpoint_layers = 0;
};

// group: not null.
absl::Status GatherFromAll(const Agreement& mine, Collectives* group, JobControl* control,
                           std::vector<Agreement>* all) {
  all->assign(static_cast<size_t>(group->world_size()), mine);
  const JobControl::Waiting waiting(control);
  const absl::Status status = group->AllGather(&mine, sizeof(mine), all->data());
  return status.ok() ? status : CollectiveError(status, *control);
}

// What workers may be started with different tables for.
void AppendTables(const kernels::PolicyParameters& parameters, std::string* plan) {
  const auto* const own = std::get_if<kernels::HeadwaterParameters>(&parameters);
  if (own == nullptr) return;
  absl::StrAppend(plan, " tables ", Crc32c(own->thresholds.data(), own->thresholds.size() * sizeof(float)),
                  " ", Crc32c(own->windows.data(), own->windows.size() * sizeof(int32_t)));
}

uint32_t PlanDigest(const PrefillJob& job, absl::string_view computes) {
  std::string plan =
      absl::StrCat(computes, " ", job.policy->name(), " ", job.strategy, " ", job.tokens.size());
  for (const RankTokens& tokens : job.partition) {
    absl::StrAppend(&plan, ";");
    for (const TokenRange& range : tokens) absl::StrAppend(&plan, " ", range.begin, "-", range.end);
  }
  AppendTables(job.policy->parameters(), &plan);
  absl::StrAppend(&plan, " ", Crc32c(job.tokens.data(), job.tokens.size() * sizeof(int32_t)), " from ",
                  job.resume.has_value() ? job.resume->layer : 0);
  return Crc32c(plan.data(), plan.size());
}

}  // namespace

absl::Status AgreeOnPlan(const PrefillJob& job, absl::string_view computes, Collectives* group,
                         JobControl* control, int32_t* checkpoint_layers) {
  if (group == nullptr) return absl::OkStatus();
  std::vector<Agreement> all;
  const Agreement mine{PlanDigest(job, computes), *checkpoint_layers};
  HW_RETURN_IF_ERROR(GatherFromAll(mine, group, control, &all));
  for (const Agreement& one : all) {
    const bool none = one.checkpoint_layers == 0 || *checkpoint_layers == 0;
    *checkpoint_layers = none ? 0 : std::max(*checkpoint_layers, one.checkpoint_layers);
  }
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank].plan == mine.plan) continue;
    return MakeError(
        absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MODEL_MISMATCH,
        absl::StrCat("rank ", rank, " and rank ", job.rank, " differ in model, compute type (here ", computes,
                     "), policy or its tables, prompt, strategy, partition or first layer"));
  }
  return absl::OkStatus();
}

absl::Status WaitForPeers(Collectives* group, JobControl* control) {
  if (group == nullptr) return absl::OkStatus();
  std::vector<Agreement> all;
  return GatherFromAll({}, group, control, &all);
}

}  // namespace headwater
