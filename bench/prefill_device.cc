#include "bench/prefill_device.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

#include "base/status_macros.h"

namespace headwater {

v1::Partition PartitionOf(const PrefillBenchOptions& options) {
  v1::Partition partition = v1::PARTITION_UNSPECIFIED;
  (void)v1::Partition_Parse(absl::StrCat("PARTITION_", absl::AsciiStrToUpper(options.partition)), &partition);
  return partition;
}

absl::Status DealOut(const PrefillBenchOptions& options, const PrefillDevice& device, PrefillJob* job) {
  if (device.num_ranks() == 1) return absl::OkStatus();
  job->strategy = options.strategy == "ring" ? v1::STRATEGY_RING : v1::STRATEGY_ALLGATHER;
  HW_ASSIGN_OR_RETURN(job->partition,
                      PartitionTokens(static_cast<int64_t>(job->tokens.size()), device.num_ranks(),
                                      PartitionOf(options), job->geometry->layout().block_tokens()));
  return absl::OkStatus();
}

}  // namespace headwater
