// Command line of `headwater bench prefill`.
#ifndef HW_BENCH_PREFILL_OPTIONS_H_
#define HW_BENCH_PREFILL_OPTIONS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

#include "bench/prefill_job.h"
#include "worker/quality.h"

namespace headwater {

// What the flags say; prefill_options.cc has each one's meaning.
struct PrefillBenchOptions {
  static constexpr int kCpu = -1;

  std::string preset = "llama-3-8b";
  std::string model;  // empty: the preset's shape
  std::vector<int64_t> tokens = {8192};
  std::string prompts;  // file (bench/prefill_prompts.h), in place of random tokens; empty: none
  std::string device = "cuda:0";
  int gpu = 0;                         // --device's number, or kCpu
  int64_t gpus = 1;                    // from there on
  std::string strategy = "allgather";  // of a prompt over several
  std::string partition = "zigzag";    // of a prompt over several
  // The shares of `gpus` ranks are timed one after the other on one GPU (bench/emulated_group.h).
  bool emulate = false;
  // The ranks are threads that share --device (worker/cuda/inprocess_device_group.h); no flag of this
  // program.
  bool share_gpu = false;
  double link_gbytes_per_s = 0;    // 0: DefaultLinkRates()
  double egress_gbytes_per_s = 0;  // likewise
  std::string linear = "auto";
  BenchPolicy policy;
  QualityBound quality;  // no bound: none
  bool measure_recall = false;
  std::string share_clusters;
  std::string headwater_calibration;
  std::string sink = "none";
  std::string kv_dir;             // of sink memory
  int64_t checkpoint_layers = 0;  // of a prompt over several
  int64_t kv_channels = 8;
  int64_t chunk_tokens = 8192;
  int64_t threads = 0;
  int64_t warm_up = 1;
  int64_t repeat = 3;
  double attention_tflops = 0;  // 0: the floor has no attention
  bool json = false;
  std::string output;
  std::string commit;

  int64_t longest() const;
  // "llama-3-8b", or the last part of --model.
  std::string model_name() const;
};

// Reads the arguments after the program's name and checks them. INVALID_ARGUMENT names the flag, its value
// and what is allowed. On --help, `help` is set and nothing else is done.
absl::Status ParsePrefillBenchOptions(absl::Span<const std::string> arguments, PrefillBenchOptions* options,
                                      std::string* help);

// "cpu" (then *gpu is kCpu) or "cuda:N". INVALID_ARGUMENT names --device.
absl::Status ParseDevice(const std::string& text, int* gpu);

// "key=value,key=value" into *parameters. INVALID_ARGUMENT names the part that is wrong, or a key that is
// there twice.
absl::Status ParseParameters(absl::string_view text, std::map<std::string, double>* parameters);

// Prompt lengths: "8192,64K,1M" in that order, K and M counting 1024 and 1024^2; "8K..1M" doubles from the
// first to the last. INVALID_ARGUMENT names the part that is wrong.
absl::StatusOr<std::vector<int64_t>> ParseLengths(absl::string_view text);

}  // namespace headwater

#endif  // HW_BENCH_PREFILL_OPTIONS_H_
