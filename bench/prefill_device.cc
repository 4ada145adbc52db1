#include "bench/prefill_device.h"

#include <thread>
#include <utility>

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
  (void)v1::Strategy_Parse(absl::StrCat("STRATEGY_", absl::AsciiStrToUpper(options.strategy)),
                           &job->strategy);
  HW_ASSIGN_OR_RETURN(job->partition,
                      PartitionTokens(static_cast<int64_t>(job->tokens.size()), device.num_ranks(),
                                      PartitionOf(options), job->geometry->layout().block_tokens()));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<PrefillResult>> RunRanks(
    int num_ranks, const std::function<absl::StatusOr<PrefillResult>(int rank)>& run) {
  std::vector<absl::StatusOr<PrefillResult>> ended(static_cast<size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int rank = 1; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] { ended[static_cast<size_t>(rank)] = run(rank); });
  }
  ended[0] = run(0);
  for (std::thread& thread : threads) thread.join();
  std::vector<PrefillResult> results;
  absl::Status lost;  // what a rank ends with that another one left
  for (absl::StatusOr<PrefillResult>& result : ended) {
    if (result.ok()) {
      results.push_back(*std::move(result));
    } else if (absl::IsUnavailable(result.status())) {
      lost.Update(result.status());
    } else {
      return result.status();
    }
  }
  if (!lost.ok()) return lost;
  return results;
}

}  // namespace headwater
