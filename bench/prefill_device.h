// PrefillDevice: what a prefill benchmark times, the CPU, one GPU or several ranks that share prompts, with
// its model.
#ifndef HW_BENCH_PREFILL_DEVICE_H_
#define HW_BENCH_PREFILL_DEVICE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

#include "bench/prefill_options.h"
#include "bench/prefill_report.h"
#include "worker/job_control.h"
#include "worker/prefill.h"
#include "worker/quality.h"

namespace headwater {

// Used from one thread.
class PrefillDevice {
 public:
  virtual ~PrefillDevice() = default;

  virtual const ModelConfig& config() const = 0;
  virtual std::string name() const = 0;    // of the hardware
  virtual std::string linear() const = 0;  // type of linear layers
  virtual v1::KvDtype kv_dtype() const = 0;
  // That share a job: its partition must be of so many.
  virtual int num_ranks() const { return 1; }
  // All of them, or 1 where their shares are computed in turn.
  virtual int ranks_at_once() const { return num_ranks(); }
  // Memory of a rank that a job may have, with the model's; 0: not known.
  virtual uint64_t device_bytes() const { return 0; }

  // Bytes that the job takes on the rank that takes most, those of the model included; sets the job's plan.
  virtual absl::StatusOr<uint64_t> Plan(PrefillJob* job) const = 0;
  // Of the host, on all ranks together: what waits for the KV stream, and checkpoints.
  virtual uint64_t PlannedHostBytes(const PrefillJob& /*job*/) const { return 0; }
  // Makes room for the job; RunPrefill() and RunCudaPrefill() have the errors of Run().
  virtual absl::Status Reserve(const PrefillJob& job) = 0;
  // ranks_at_once() ranks, from `first_rank` on. One sender and one result a rank; the error is of the rank
  // that failed first.
  virtual absl::StatusOr<std::vector<PrefillResult>> Run(const PrefillJob& job, int first_rank,
                                                         absl::Span<KvSender* const> senders,
                                                         JobControl* control) = 0;

  // Of one rank alone, as a worker measures itself at its start.
  virtual absl::StatusOr<ComputeSpeed> MeasureSpeed() = 0;

  // nullopt: this device has no floor.
  virtual absl::StatusOr<std::optional<LinearRate>> MeasureLinear() = 0;

  // Most bytes in use since the last call; a CPU's: of the process so far.
  virtual absl::StatusOr<uint64_t> TakePeakBytes() = 0;
};

// --partition.
v1::Partition PartitionOf(const PrefillBenchOptions& options);

// Deals the job's tokens out to the device's ranks, as the options say.
absl::Status DealOut(const PrefillBenchOptions& options, const PrefillDevice& device, PrefillJob* job);

// Calls `run` of every rank, each on a thread of its own but for rank 0's, which is the caller's. Their
// results in the order of the ranks, or the error of one that was not left by another.
absl::StatusOr<std::vector<PrefillResult>> RunRanks(
    int num_ranks, const std::function<absl::StatusOr<PrefillResult>(int rank)>& run);

// Each loads the model that the options name, or makes it. Errors name the flag that they come from.
// options.gpus ranks, each with a copy of the model and a Gloo endpoint of its own, as workers on one host;
// the process must ignore SIGPIPE where they are several.
absl::StatusOr<std::unique_ptr<PrefillDevice>> OpenCpu(const PrefillBenchOptions& options);
// Only in builds with CUDA.
absl::StatusOr<std::unique_ptr<PrefillDevice>> OpenGpu(const PrefillBenchOptions& options);

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_DEVICE_H_
