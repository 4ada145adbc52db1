// Times the worker's prefill loop on the CPU backend: one rank, policy dense, KV blocks dropped as soon as
// they are handed over. Prints one JSON line; bench/cpu_prefill.py sets it beside llama.cpp in one run and
// writes the result rows.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include <sys/resource.h>

#include "base/status_macros.h"
#include "bench/prefill_job.h"
#include "worker/prefill.h"

ABSL_FLAG(std::string, model, "", "Hugging Face checkpoint directory");
ABSL_FLAG(int, tokens, 2048, "prompt length");
ABSL_FLAG(int, threads, 0, "OpenMP threads; 0: all cores");
ABSL_FLAG(int, repeat, 3, "timed runs, after one that warms up; the median counts");
ABSL_FLAG(std::string, compute, "auto", "auto, f32 or bf16");

namespace headwater {
namespace {

absl::StatusOr<PrefillJob> MakeJob(const Model& model, int num_tokens, int threads) {
  HW_ASSIGN_OR_RETURN(
      PrefillJob job,
      MakeBenchJob(model.config(), num_tokens,
                   model.compute() == kernels::DType::kF32 ? v1::KV_DTYPE_F32 : v1::KV_DTYPE_BF16));
  job.plan = PlanMemory(MakeMemoryShape(model, threads, /*egress_buffers=*/3, /*kv_channels=*/1),
                        model.compute(), num_tokens, num_tokens, num_tokens, 1);
  return job;
}

absl::Status Run() {
  ModelOptions options;
  options.directory = absl::GetFlag(FLAGS_model);
  const std::string compute = absl::GetFlag(FLAGS_compute);
  if (compute != "auto" && compute != "f32" && compute != "bf16") {
    return absl::InvalidArgumentError("--compute=" + compute + " is none of auto, f32, bf16");
  }
  options.compute = compute == "auto"  ? kernels::PreferredComputeType()
                    : compute == "f32" ? kernels::DType::kF32
                                       : kernels::DType::kBF16;
  int threads = absl::GetFlag(FLAGS_threads);
  if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  kernels::SetNumThreads(threads);
  HW_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options));
  const int tokens = absl::GetFlag(FLAGS_tokens);
  if (tokens < 1 || tokens > model->config().max_position) {
    return absl::InvalidArgumentError("--tokens must be 1 to the model's maximum");
  }
  HW_ASSIGN_OR_RETURN(const PrefillJob job, MakeJob(*model, tokens, threads));
  Arena arena;
  std::vector<double> seconds;
  for (int run = 0; run <= std::max(1, absl::GetFlag(FLAGS_repeat)); ++run) {
    HW_RETURN_IF_ERROR(arena.Reset(job.plan.arena_bytes()));
    JobControl control;
    DiscardingSender sender;
    PrefillContext context;
    context.model = model.get();
    context.sender = &sender;
    context.control = &control;
    context.arena = &arena;
    const absl::Time start = absl::Now();
    HW_ASSIGN_OR_RETURN(const PrefillResult result, RunPrefill(job, context));
    if (run > 0) seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
    if (result.top.empty()) return absl::InternalError("no token came out");
  }
  std::sort(seconds.begin(), seconds.end());
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::printf(
      "{\"tokens\": %d, \"threads\": %d, \"compute\": \"%s\", \"tokens_per_s\": %.2f, \"peak_rss_bytes\": "
      "%lld}\n",
      tokens, threads, kernels::NameOf(model->compute()), tokens / seconds[seconds.size() / 2],
      static_cast<long long>(usage.ru_maxrss) * 1024);
  return absl::OkStatus();
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = headwater::Run();
  if (!status.ok()) std::fprintf(stderr, "cpu_prefill: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
