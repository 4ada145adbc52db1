// headwater-bench-prefill, which `headwater bench prefill` runs: what one device, or several GPUs together,
// make of prompts of given lengths.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include <unistd.h>

#include "base/rpc/server.h"
#include "base/signals.h"
#include "base/status_macros.h"
#include "bench/prefill_device.h"
#include "bench/prefill_job.h"
#include "bench/prefill_options.h"
#include "bench/prefill_prediction.h"
#include "bench/prefill_prompts.h"
#include "bench/prefill_report.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/store.h"
#include "tools/cli/console.h"
#include "tools/cli/exit_code.h"
#include "worker/policy_tables.h"

namespace headwater {
namespace {

constexpr char kName[] = "bench";

// Of all that lies in --kv_dir at once, which is one cache.
constexpr uint64_t kMostKept = uint64_t{1} << 40;

// Stands for a decode node: checks every block, and drops or keeps it.
struct Receiver {
  std::unique_ptr<KvStore> store;
  Metrics metrics{kName};
  std::unique_ptr<grpc::Service> service;
  RunningServer server;
};

// kv_dir: where blocks are kept; empty: they are not.
absl::StatusOr<std::unique_ptr<Receiver>> StartReceiver(const std::string& kv_dir) {
  auto receiver = std::make_unique<Receiver>();
  KvStoreOptions options;
  options.sink = kv_dir.empty() ? KvSink::kVerify : KvSink::kMemory;
  options.directory = kv_dir;
  options.budget_bytes = kv_dir.empty() ? uint64_t{1} << 30 : kMostKept;
  HW_ASSIGN_OR_RETURN(receiver->store, KvStore::Open(options));
  receiver->service = MakeKvReceiver(receiver->store.get(), &receiver->metrics);
  HW_ASSIGN_OR_RETURN(receiver->server, StartServer("127.0.0.1:0", {receiver->service.get()}));
  return receiver;
}

absl::Status OpenSession(Receiver* receiver, const KvGeometry& geometry) {
  v1::OpenSessionRequest open;
  open.set_session_id(kName);
  open.set_session_token(kName);
  open.set_epoch(1);
  *open.mutable_layout() = geometry.layout();
  return receiver->store->OpenSession(open).status();
}

absl::StatusOr<std::unique_ptr<KvSender>> ConnectTo(Receiver* receiver, const KvGeometry& geometry,
                                                    int64_t channels, size_t rank) {
  KvSenderOptions options;
  options.rank = static_cast<uint32_t>(rank);
  options.address = receiver->server.address;
  options.session_id = options.session_token = kName;
  options.epoch = 1;
  options.num_channels = static_cast<int>(channels);
  return KvSender::Create(options, geometry);
}

struct Sample {
  double ttft_s = 0;
  double kv_acked_s = 0;
  double acked_share = 0;              // of the bytes, when the first token was known
  std::vector<PrefillResult> results;  // of the ranks
};

using Senders = std::vector<std::unique_ptr<KvSender>>;

class Bench {
 public:
  Bench(const PrefillBenchOptions& options, Interrupt* interrupt)
      : options_(options), interrupt_(interrupt) {}

  absl::Status Run() {
    if (!options_.output.empty()) {
      output_.open(options_.output, std::ios::app);
      if (!output_) {
        return absl::InvalidArgumentError(absl::StrCat("--output=", options_.output, ": cannot be written"));
      }
    }
    std::vector<BenchPrompt> prompts;
    if (!options_.prompts.empty()) {
      HW_ASSIGN_OR_RETURN(prompts, ReadBenchPrompts(options_.prompts));
    }
    HW_ASSIGN_OR_RETURN(device_, Open());
    HW_RETURN_IF_ERROR(CheckFits(prompts));
    HW_ASSIGN_OR_RETURN(tables_, ReadPolicyTables(options_.share_clusters, options_.headwater_calibration,
                                                  device_->config()));
    if (options_.sink != "none") {
      HW_ASSIGN_OR_RETURN(receiver_, StartReceiver(options_.kv_dir));
    }
    HW_ASSIGN_OR_RETURN(linear_rate_, device_->MeasureLinear());
    HW_ASSIGN_OR_RETURN(speed_, device_->MeasureSpeed());
    for (const BenchPrompt& prompt : prompts) HW_RETURN_IF_ERROR(Named(prompt, RunPrompt(prompt)));
    if (!prompts.empty()) return absl::OkStatus();
    for (const int64_t length : options_.tokens) {
      const BenchPrompt prompt{"", RandomPrompt(device_->config(), length)};
      HW_RETURN_IF_ERROR(Named(prompt, RunPrompt(prompt)));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status CheckFits(const std::vector<BenchPrompt>& prompts) const {
    const ModelConfig& config = device_->config();
    const auto too_long = [&](const std::string& what, int64_t tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": ", tokens, " is over the model's maximum of ", config.max_position));
    };
    for (const BenchPrompt& prompt : prompts) {
      const std::string what = absl::StrCat("--prompts=", options_.prompts, ": ", prompt.name);
      const auto tokens = static_cast<int64_t>(prompt.tokens.size());
      if (tokens > config.max_position) return too_long(what, tokens);
      const int32_t largest = *std::max_element(prompt.tokens.begin(), prompt.tokens.end());
      if (largest >= config.vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat(what, ": token ", largest, " is not below the vocabulary's ", config.vocab_size));
      }
    }
    if (prompts.empty() && options_.longest() > config.max_position) {
      return too_long("--tokens", options_.longest());
    }
    return absl::OkStatus();
  }

  absl::Status Named(const BenchPrompt& prompt, const absl::Status& status) const {
    if (status.ok()) return status;
    return absl::Status(status.code(), absl::StrCat(options_.device, " (", device_->name(), "), ",
                                                    prompt.name.empty() ? "" : prompt.name + ", ",
                                                    prompt.tokens.size(), " tokens: ", status.message()));
  }

  absl::StatusOr<std::unique_ptr<PrefillDevice>> Open() const {
    if (options_.gpu == PrefillBenchOptions::kCpu) return OpenCpu(options_);
#ifdef HW_WITH_CUDA
    return OpenGpu(options_);
#else
    return absl::UnimplementedError(
        absl::StrCat("--device=", options_.device,
                     ": this build has no code for GPUs; --device=cpu --model=DIR runs here"));
#endif
  }

  absl::StatusOr<Sample> RunOnce(const PrefillJob& job) {
    HW_RETURN_IF_ERROR(device_->Reserve(job));
    if (receiver_ != nullptr) HW_RETURN_IF_ERROR(OpenSession(receiver_.get(), *job.geometry));
    Senders senders(job.partition.size());
    for (size_t rank = 0; rank < senders.size(); ++rank) {
      if (receiver_ == nullptr) {
        senders[rank] = std::make_unique<DiscardingSender>();
      } else {
        HW_ASSIGN_OR_RETURN(senders[rank],
                            ConnectTo(receiver_.get(), *job.geometry, options_.kv_channels, rank));
      }
    }
    HW_ASSIGN_OR_RETURN(Sample sample, Time(job, senders));
    senders.clear();  // closes their streams before the session goes
    if (receiver_ != nullptr) receiver_->store->Release(kName);
    return sample;
  }

  // Ranks that run at once end together; those that run in turn would have begun together.
  absl::StatusOr<Sample> Time(const PrefillJob& job, const Senders& senders) {
    JobControl control;
    const Interrupt::Scope scope(interrupt_, [&](int) {
      control.Cancel(absl::CancelledError("interrupted"));
      for (const auto& sender : senders) sender->Cancel();
    });
    std::vector<KvSender*> given;
    for (const auto& sender : senders) given.push_back(sender.get());
    const auto at_once = static_cast<size_t>(device_->ranks_at_once());
    Sample sample;
    uint64_t acked = 0;
    for (size_t first = 0; first < given.size(); first += at_once) {
      const absl::Span<KvSender* const> turn(given.data() + first, at_once);
      const absl::Time start = absl::Now();
      HW_ASSIGN_OR_RETURN(std::vector<PrefillResult> results,
                          device_->Run(job, static_cast<int>(first), turn, &control));
      sample.ttft_s = std::max(sample.ttft_s, absl::ToDoubleSeconds(absl::Now() - start));
      for (PrefillResult& result : results) sample.results.push_back(std::move(result));
      for (KvSender* const sender : turn) acked += sender->Stats().bytes_acked;
      for (KvSender* const sender : turn) HW_RETURN_IF_ERROR(sender->Finish());
      sample.kv_acked_s = std::max(sample.kv_acked_s, absl::ToDoubleSeconds(absl::Now() - start));
    }
    sample.acked_share = static_cast<double>(acked) / static_cast<double>(job.geometry->total_bytes());
    return sample;
  }

  // The density that attention should have, before it has run: a forced one, dense's, or that of a run
  // before.
  std::optional<double> ExpectedDensity(const std::optional<Sample>& before) const {
    if (options_.policy.density > 0) return options_.policy.density;
    if (options_.policy.name == "dense") return 1;
    if (!before.has_value()) return std::nullopt;
    return DensityOf(*before);
  }

  static double DensityOf(const Sample& sample) {
    double computed = 0, possible = 0;
    for (const PrefillResult& result : sample.results) {
      computed += static_cast<double>(result.progress.pairs_computed);
      possible += static_cast<double>(result.progress.pairs_possible);
    }
    return computed / possible;
  }

  // Whether the job's plan goes into the device; else the row says so.
  bool Fits(const PrefillReport& planned) {
    if (device_->device_bytes() == 0 || planned.planned_bytes <= device_->device_bytes()) return true;
    const std::string json = SkippedToJson(planned, options_).dump() + "\n";
    std::fputs(options_.json ? json.c_str() : SkippedLine(planned).c_str(), stdout);
    std::fflush(stdout);
    if (output_.is_open()) output_ << json << std::flush;
    return false;
  }

  absl::Status RunPrompt(const BenchPrompt& prompt) {
    HW_ASSIGN_OR_RETURN(PrefillJob job, MakeBenchJob(device_->config(), prompt.tokens, device_->kv_dtype(),
                                                     options_.policy, tables_, options_.quality));
    if (!prompt.name.empty()) job.request_id = prompt.name;  // by which queries are sampled
    HW_RETURN_IF_ERROR(DealOut(options_, *device_, &job));
    PrefillReport report = ReportOf(prompt);
    HW_ASSIGN_OR_RETURN(report.planned_bytes, device_->Plan(&job));
    report.planned_host_bytes = device_->PlannedHostBytes(job);
    report.device_bytes = device_->device_bytes();
    if (!Fits(report)) return absl::OkStatus();
    HW_RETURN_IF_ERROR(device_->TakePeakBytes().status());
    std::vector<Sample> samples;
    std::optional<Sample> warmed;
    for (int64_t run = 0; run < options_.warm_up; ++run) {
      HW_ASSIGN_OR_RETURN(warmed, RunOnce(job));
    }
    if (const auto density = ExpectedDensity(warmed); density.has_value()) {
      report.predicted = PredictPrefill(options_, device_->config(), speed_, job, *density);
    }
    for (int64_t run = 0; run < options_.repeat; ++run) {
      HW_ASSIGN_OR_RETURN(Sample sample, RunOnce(job));
      samples.push_back(std::move(sample));
    }
    HW_ASSIGN_OR_RETURN(report.peak_bytes, device_->TakePeakBytes());
    std::sort(samples.begin(), samples.end(),
              [](const Sample& a, const Sample& b) { return a.ttft_s < b.ttft_s; });
    Fill(samples[samples.size() / 2], &report);
    Show(report);
    return absl::OkStatus();
  }

  PrefillReport ReportOf(const BenchPrompt& prompt) const {
    PrefillReport report;
    report.prompt = prompt.name;
    report.tokens = static_cast<int64_t>(prompt.tokens.size());
    report.device = device_->name();
    report.linear = device_->linear();
    report.gpus = options_.gpu == PrefillBenchOptions::kCpu ? 0 : device_->num_ranks();
    report.date = absl::Now();
    return report;
  }

  void Fill(const Sample& sample, PrefillReport* report) const {
    const ModelConfig& config = device_->config();
    report->date = absl::Now();
    report->ttft_s = sample.ttft_s;
    if (receiver_ != nullptr) {
      report->kv_acked_s = sample.kv_acked_s;
      report->kv_acked_share = sample.acked_share;
    }
    FillStages(sample, report);
    report->density = DensityOf(sample);
    if (sample.results.size() == 1) report->attention = sample.results[0].attention_report;
    report->linear_flop = LinearFlop(config, report->tokens);
    report->attention_flop = report->density * DenseAttentionFlop(config, report->tokens);
    if (linear_rate_.has_value()) {
      report->linear_floor_s = LinearSeconds(*linear_rate_, config, report->tokens) / device_->num_ranks();
    }
    if (options_.attention_tflops > 0) {
      report->attention_floor_s =
          report->attention_flop / (options_.attention_tflops * 1e12) / device_->num_ranks();
    }
  }

  // Of the rank that took longest in each.
  void FillStages(const Sample& sample, PrefillReport* report) const {
    std::vector<PrefillReport::Group::Rank> ranks;
    double linear = 0, attention = 0, exchange = 0, stall = 0, computed = 0, most = 0;
    for (const PrefillResult& result : sample.results) {
      const auto& rank = ranks.emplace_back(PrefillReport::Group::Rank{
          absl::ToDoubleSeconds(result.linear), absl::ToDoubleSeconds(result.attention),
          absl::ToDoubleSeconds(result.exchange), absl::ToDoubleSeconds(result.egress_stall)});
      linear = std::max(linear, rank.linear_s);
      attention = std::max(attention, rank.attention_s);
      exchange = std::max(exchange, rank.exchange_s);
      stall = std::max(stall, rank.egress_stall_s);
      computed += rank.linear_s + rank.attention_s;
      most = std::max(most, rank.linear_s + rank.attention_s);
    }
    report->stages = {{"linear", linear}, {"attention", attention}, {"egress_stall", stall}};
    if (sample.results.size() == 1) return;
    report->stages.emplace_back("exchange", exchange);
    const double mean = computed / static_cast<double>(sample.results.size());
    report->group = {options_.partition, options_.strategy, exchange / sample.ttft_s, most / mean,
                     std::move(ranks)};
    const auto& checkpoint = sample.results[0].progress.checkpoint;
    if (checkpoint.has_value()) report->group->checkpoint_layer = checkpoint->layer;
  }

  void Show(const PrefillReport& report) {
    const std::string json = ToJson(report, options_).dump() + "\n";
    std::string text = json;
    if (!options_.json) {
      text = TableRow(report);
      if (!headed_) text = absl::StrCat(TableTitle(report, options_), TableHead(report), text);
      headed_ = true;
    }
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
    if (output_.is_open()) output_ << json << std::flush;
  }

  const PrefillBenchOptions& options_;
  Interrupt* const interrupt_;
  std::ofstream output_;
  std::unique_ptr<PrefillDevice> device_;
  std::unique_ptr<Receiver> receiver_;
  std::optional<LinearRate> linear_rate_;
  ComputeSpeed speed_;  // for predictions
  PolicyTables tables_;
  bool headed_ = false;
};

int Main(int argc, char** argv) {
  BlockTerminationSignals();
  PrefillBenchOptions options;
  std::string help;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  absl::Status status = ParsePrefillBenchOptions(arguments, &options, &help);
  if (!help.empty()) {
    std::fputs(help.c_str(), stdout);
    return kExitOk;
  }
  // Never destroyed: the thread below may still use it while the process ends.
  auto* const interrupt = new Interrupt();
  std::thread([interrupt] {
    while (true) {
      if (WaitForTerminationSignal(absl::Hours(1)) != 0 && !interrupt->Raise()) _exit(kExitInterrupted);
    }
  }).detach();
  if (status.ok()) status = Bench(options, interrupt).Run();
  if (status.ok()) return kExitOk;
  std::fprintf(stderr, "headwater bench prefill: %s\n", std::string(status.message()).c_str());
  if (interrupt->raised()) return kExitInterrupted;
  const bool usage =
      absl::IsInvalidArgument(status) || absl::IsNotFound(status) || absl::IsUnimplemented(status);
  return usage ? kExitUsage : kExitOther;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Main(argc, argv); }
