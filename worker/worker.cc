#include "worker/worker.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include <unistd.h>

#include "base/health.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/rpc/accept_limit.h"
#include "base/rpc/server.h"
#include "base/rpc/transport_stats.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "worker/calibration.h"
#include "worker/control_client.h"
#include "worker/executor.h"
#include "worker/gloo_collectives.h"
#include "worker/metrics.h"
#include "worker/rendezvous.h"

namespace headwater {
namespace {

// Without a step of what runs for so long the worker is not live.
constexpr absl::Duration kStuck = absl::Minutes(2);
constexpr absl::Duration kServerShutdown = absl::Seconds(1);

std::string HostOf(const std::string& address) {
  std::string host = address.substr(0, address.rfind(':'));
  if (absl::StartsWith(host, "[") && absl::EndsWith(host, "]")) host = host.substr(1, host.size() - 2);
  return host;
}

bool IsWildcard(const std::string& host) { return host == "0.0.0.0" || host == "::"; }

absl::StatusOr<std::unique_ptr<Collectives>> JoinGlooGroup(const std::string& host, const GroupSpec& spec,
                                                           JobControl* control) {
  GlooOptions options;
  options.rank = spec.rank;
  options.world_size = spec.world_size;
  options.host = host;
  options.group_name = spec.name;
  options.connect_timeout = spec.connect_timeout;
  options.timeout = spec.timeout;
  HW_ASSIGN_OR_RETURN(std::unique_ptr<GlooCollectives> group, GlooCollectives::Create(options));
  const std::unique_ptr<RendezvousClient> rendezvous =
      RendezvousClient::Dial(spec.rendezvous_address, spec.transport.get());
  const JobControl::CancelHook hook(control, [&] { group->Abort(); });
  HW_RETURN_IF_ERROR(group->Connect(rendezvous.get()));
  return std::unique_ptr<Collectives>(std::move(group));
}

// Nothing where it is not to be measured, or cannot be.
std::optional<v1::ComputeRates> MeasureRates(const WorkerOptions& options, PrefillBackend* backend) {
  if (!options.measure_rates) return std::nullopt;
  const absl::StatusOr<ComputeSpeed> speed = backend->MeasureSpeed();
  if (!speed.ok()) {
    HW_LOG(WARNING) << "the planner gets no rates of this worker: " << speed.status();
    return std::nullopt;
  }
  LinkRates links = DefaultLinkRates(options.device != "cpu");
  if (options.link_gbytes_per_s > 0) links.link_bytes_per_s = 1e9 * options.link_gbytes_per_s;
  if (options.egress_gbytes_per_s > 0) links.egress_bytes_per_s = 1e9 * options.egress_gbytes_per_s;
  v1::ComputeRates rates = MakeComputeRates(*speed, links, backend->config(), backend->exchange_type());
  HW_LOG(INFO)
          .Field("linear_gflops", absl::StrFormat("%.4g", rates.linear_flops() / 1e9))
          .Field("attention_gflops", absl::StrFormat("%.4g", rates.attention_flops() / 1e9))
          .Field("link_gbytes_per_s", absl::StrFormat("%.4g", rates.link_bytes_per_s() / 1e9))
          .Field("egress_gbytes_per_s", absl::StrFormat("%.4g", rates.egress_bytes_per_s() / 1e9))
      << "rates for the planner";
  return rates;
}

v1::WorkerRegistration MakeRegistration(const WorkerOptions& options, const PrefillBackend& backend,
                                        const std::optional<v1::ComputeRates>& rates,
                                        const std::string& rendezvous_address) {
  v1::WorkerRegistration registration;
  registration.set_worker_id(options.worker_id);
  registration.set_incarnation(RandomId());
  registration.set_rendezvous_address(rendezvous_address);
  registration.set_device(options.device);
  registration.set_protocol_version(kProtocolVersion);
  registration.set_max_world_size(backend.max_world_size());
  *registration.mutable_memory() = backend.memory_model();
  if (const PackLimits packed = backend.pack_limits(); packed.max_prompts > 1) {
    registration.set_max_packed_prompts(packed.max_prompts);
    registration.set_max_packed_tokens(static_cast<uint64_t>(packed.max_tokens));
  }
  for (const std::string& name : backend.policies()) registration.add_policies(name);
  registration.set_default_policy(backend.default_policy());
  for (v1::PolicyLimit& limit : backend.policy_limits()) {
    *registration.add_policy_limits() = std::move(limit);
  }
  registration.set_serves_quality(backend.serves_quality());
  for (const v1::Strategy strategy : backend.strategies()) registration.add_strategies(strategy);
  v1::ServedModel* const served = registration.mutable_model();
  *served = ShapeOf(backend.config());
  served->set_name(options.model_name);
  served->set_fingerprint(backend.fingerprint());
  if (rates.has_value()) *registration.mutable_rates() = *rates;
  // A flag is the operator's word, which no measurement replaces.
  registration.set_measures_links(rates.has_value() && options.link_gbytes_per_s == 0);
  return registration;
}

class WorkerProcess final : public Worker {
 public:
  WorkerProcess() : metrics_("worker"), worker_metrics_(&metrics_) {}
  ~WorkerProcess() override {
    health_ = nullptr;
    if (client_ != nullptr) client_->Stop();
    if (server_.server != nullptr) {
      server_.server->Shutdown(std::chrono::system_clock::now() +
                               absl::ToChronoMilliseconds(kServerShutdown));
    }
  }

  absl::Status Init(const WorkerOptions& options, const BackendFactory& make_backend) {
    // Addresses first: a port in use is told before the model is loaded.
    HW_ASSIGN_OR_RETURN(transport_, Transport::Create(options.transport, Role::kWorker));
    LogTransport(transport_.get(), options.listen);
    LimitConnections();
    metrics_.AddConfig(options.config.sha256);
    metrics_.Add(std::make_shared<TransportStats>(transport_));
    HW_RETURN_IF_ERROR(metrics_.Serve(options.metrics));
    // Before the model is loaded, which may take minutes.
    HW_ASSIGN_OR_RETURN(health_, HealthPort::Start(options.health, {[this] { return Steps(); },
                                                                    [this] { return Registered(); }}));
    rendezvous_ = MakeRendezvousService({});
    HW_ASSIGN_OR_RETURN(server_, StartServer(options.listen, {rendezvous_.get()}, transport_.get()));
    const std::string advertise = options.advertise.empty() ? server_.address : options.advertise;
    const std::string collective_host =
        options.collective_host.empty() ? HostOf(advertise) : options.collective_host;
    if (IsWildcard(HostOf(advertise))) {
      return absl::InvalidArgumentError(absl::StrCat("--advertise: other workers cannot reach ", advertise,
                                                     "; name an address of this host"));
    }
    HW_ASSIGN_OR_RETURN(backend_, make_backend(options));
    worker_metrics_.memory_budget.Set(static_cast<double>(backend_->memory_model().budget_bytes()));

    const int threads = static_cast<int>(options.threads);
    ExecutorOptions executor;
    executor.backend = backend_.get();
    executor.worker_id = options.worker_id;
    executor.num_threads = threads;
    executor.kv_channels = static_cast<int>(options.kv_channels);
    executor.checkpoint_layers = static_cast<int>(options.checkpoint_layers);
    executor.measure_egress = options.egress_gbytes_per_s == 0;
    executor.collective_timeout = options.collective_timeout;
    executor.kv_stall_timeout = options.kv_stall_timeout;
    executor.metrics = &worker_metrics_;
    executor.transport = transport_;
    executor.join_group = [collective_host](const GroupSpec& spec, JobControl* control) {
      return JoinGlooGroup(collective_host, spec, control);
    };
    executor_ = std::make_unique<PrefillExecutor>(executor);

    ControlClientOptions client;
    client.coordinator = options.coordinator;
    client.registration =
        MakeRegistration(options, *backend_, MeasureRates(options, backend_.get()), advertise);
    // As much as the coordinator may send ahead.
    client.max_queued = std::max(client.max_queued, 2 * backend_->pack_limits().max_prompts);
    client.metrics = &worker_metrics_;
    client.transport = transport_;
    client_ = ControlClient::Start(client, executor_.get());
    started_ = client_.get();
    HW_LOG(INFO).Field("worker_id", options.worker_id).Field("listen", server_.address)
        << "serving " << options.model_name << " on " << options.device << " (" << backend_->Describe()
        << ", " << threads << " threads)";
    return absl::OkStatus();
  }

  bool Drain(absl::Duration timeout) override {
    health_->Leave();
    return client_->Drain(timeout);
  }
  bool drain_requested() const override { return client_->drain_requested(); }

 private:
  bool Registered() {
    const ControlClient* const client = started_;
    return client != nullptr && client->registered();
  }
  // A prompt that computes, waits for a peer or for its KV stream steps at least every few seconds.
  bool Steps() {
    const ControlClient* const client = started_;
    return client == nullptr || client->StepAge() < kStuck;
  }

  std::shared_ptr<const Transport> transport_;
  Metrics metrics_;
  WorkerMetrics worker_metrics_;
  std::unique_ptr<PrefillBackend> backend_;
  std::unique_ptr<grpc::Service> rendezvous_;
  RunningServer server_;
  std::unique_ptr<PrefillExecutor> executor_;
  std::unique_ptr<ControlClient> client_;
  std::atomic<const ControlClient*> started_{nullptr};
  std::unique_ptr<HealthPort> health_;  // goes first: its thread asks the others
};

}  // namespace

absl::StatusOr<std::unique_ptr<Worker>> Worker::Start(const WorkerOptions& options,
                                                      const BackendFactory& make_backend) {
  auto worker = std::make_unique<WorkerProcess>();
  HW_RETURN_IF_ERROR(worker->Init(options, make_backend));
  return worker;
}

}  // namespace headwater
