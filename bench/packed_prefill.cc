// Prefills many short prompts on one GPU, packed by hand into passes in their order: what packing in the
// service is measured against (bench/packed_bench.py). KV blocks are dropped as soon as they are handed over.
// Prints one JSON line; --requests writes the prompts as `headwater batch` reads them.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "nlohmann/json.hpp"

#include "base/status_macros.h"
#include "bench/prefill_job.h"
#include "model/cuda/device_buffer.h"
#include "worker/cuda/cuda_prefill.h"

ABSL_FLAG(std::string, model, "", "checkpoint directory");
ABSL_FLAG(int, prompts, 1000, "how many");
ABSL_FLAG(int, least_tokens, 64, "of the shortest prompt");
ABSL_FLAG(int, most_tokens, 2048, "of the longest");
ABSL_FLAG(int, pass_tokens, 1 << 15, "most tokens of a pass");
ABSL_FLAG(int, pass_prompts, 128, "most prompts of a pass");
ABSL_FLAG(std::string, requests, "", "file that the prompts are written to, one request a line");

namespace headwater {
namespace {

using Prompt = std::vector<int32_t>;

std::vector<Prompt> MakePrompts(int vocab_size) {
  std::mt19937 random(20261122);
  const int least = absl::GetFlag(FLAGS_least_tokens), most = absl::GetFlag(FLAGS_most_tokens);
  std::vector<Prompt> prompts(static_cast<size_t>(absl::GetFlag(FLAGS_prompts)));
  for (Prompt& prompt : prompts) {
    prompt.resize(static_cast<size_t>(least) + random() % static_cast<unsigned>(most - least + 1));
    for (int32_t& token : prompt) token = static_cast<int32_t>(random() % static_cast<unsigned>(vocab_size));
  }
  return prompts;
}

absl::Status WriteRequests(const std::vector<Prompt>& prompts, const std::string& path) {
  std::ofstream out(path);
  for (size_t i = 0; i < prompts.size(); ++i) {
    out << "{\"request_id\": \"packed-" << i << "\", \"token_ids\": [" << absl::StrJoin(prompts[i], ", ")
        << "]}\n";
  }
  out.close();
  return out ? absl::OkStatus()
             : absl::InvalidArgumentError(absl::StrCat("--requests=", path, ": cannot be written"));
}

// [begin, end) of each pass.
std::vector<std::pair<size_t, size_t>> Pack(const std::vector<Prompt>& prompts) {
  std::vector<std::pair<size_t, size_t>> passes;
  size_t tokens = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const bool fits = !passes.empty() &&
                      tokens + prompts[i].size() <= static_cast<size_t>(absl::GetFlag(FLAGS_pass_tokens)) &&
                      i - passes.back().first < static_cast<size_t>(absl::GetFlag(FLAGS_pass_prompts));
    if (!fits) {
      passes.emplace_back(i, i);
      tokens = 0;
    }
    passes.back().second = i + 1;
    tokens += prompts[i].size();
  }
  return passes;
}

absl::Status RunPass(const std::vector<PrefillJob>& jobs, std::pair<size_t, size_t> pass,
                     const CudaPrefillContext& context) {
  DiscardingSender sender;
  JobControl control;
  std::vector<CudaPrefillPrompt> prompts;
  for (size_t i = pass.first; i < pass.second; ++i) prompts.push_back({&jobs[i], &sender, &control, {}});
  for (const absl::StatusOr<PrefillResult>& result : RunCudaPrefill(prompts, context)) {
    HW_RETURN_IF_ERROR(result.status());
  }
  return absl::OkStatus();
}

absl::Status Run() {
  if (absl::GetFlag(FLAGS_prompts) < 1 || absl::GetFlag(FLAGS_least_tokens) < 1 ||
      absl::GetFlag(FLAGS_most_tokens) < absl::GetFlag(FLAGS_least_tokens) ||
      absl::GetFlag(FLAGS_pass_tokens) < absl::GetFlag(FLAGS_most_tokens)) {
    return absl::InvalidArgumentError(
        "--prompts and --least_tokens must be positive, --most_tokens at least --least_tokens, --pass_tokens "
        "at least "
        "--most_tokens");
  }
  CudaModelOptions options;
  options.directory = absl::GetFlag(FLAGS_model);
  HW_ASSIGN_OR_RETURN(const std::unique_ptr<CudaModel> model, CudaModel::Load(options));
  HW_ASSIGN_OR_RETURN(const std::unique_ptr<CudaEgressMemory> egress, CudaEgressMemory::Allocate());
  const std::vector<Prompt> prompts = MakePrompts(model->config().vocab_size);
  const std::string requests = absl::GetFlag(FLAGS_requests);
  if (!requests.empty()) HW_RETURN_IF_ERROR(WriteRequests(prompts, requests));
  const std::vector<std::pair<size_t, size_t>> passes = Pack(prompts);
  std::vector<PrefillJob> jobs;
  size_t tokens = 0;
  for (const Prompt& prompt : prompts) {
    tokens += prompt.size();
    HW_ASSIGN_OR_RETURN(PrefillJob job, MakeBenchJob(model->config(), prompt, v1::KV_DTYPE_BF16, {}));
    jobs.push_back(std::move(job));
  }
  const CudaPrefillContext context{model.get(), egress.get(), nullptr};
  for (size_t i = 0; i < std::min<size_t>(passes.size(), 3); ++i)
    HW_RETURN_IF_ERROR(RunPass(jobs, passes[i], context));
  const absl::Time start = absl::Now();
  for (const std::pair<size_t, size_t>& pass : passes) HW_RETURN_IF_ERROR(RunPass(jobs, pass, context));
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  cudaDeviceProp properties{};
  HW_RETURN_IF_ERROR(FromCuda(cudaGetDeviceProperties(&properties, model->device()), "the device's name"));
  const nlohmann::json row = {
      {"device", properties.name}, {"prompts", prompts.size()},
      {"tokens", tokens},          {"passes", passes.size()},
      {"seconds", seconds},        {"tokens_per_s", static_cast<double>(tokens) / seconds}};
  std::printf("%s\n", row.dump().c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = headwater::Run();
  if (!status.ok()) std::fprintf(stderr, "packed_prefill: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
