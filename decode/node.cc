#include "decode/node.h"

#include <algorithm>
#include <chrono>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include <grpcpp/health_check_service_interface.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/rpc/accept_limit.h"
#include "base/rpc/transport_stats.h"
#include "base/status_macros.h"
#include "base/version.h"
#include "decode/service.h"
#include "kernels/ops/linear.h"
#include "kvtransfer/layout.h"
#include "kvtransfer/receiver.h"

namespace headwater {
namespace {

// Of the KV budget, the part kept for generated tokens.
constexpr uint64_t kGeneratedShare = 8;
constexpr auto kHousekeepingInterval = std::chrono::seconds(1);
constexpr absl::Duration kStuck = absl::Seconds(30);
constexpr auto kShutdownGrace = std::chrono::seconds(1);

kernels::DType ComputeType(absl::string_view name) {
  if (name == "f32") return kernels::DType::kF32;
  if (name == "bf16") return kernels::DType::kBF16;
  return kernels::PreferredComputeType();
}

absl::Status Annotate(const absl::Status& status, absl::string_view prefix) {
  return absl::Status(status.code(), absl::StrCat(prefix, ": ", status.message()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<DecodeNode>> DecodeNode::Start(const DecodeOptions& options) {
  auto node = absl::WrapUnique(new DecodeNode());
  HW_ASSIGN_OR_RETURN(node->transport_, Transport::Create(options.transport, Role::kDecode));
  LogTransport(node->transport_.get(), options.listen);
  // Before the model is loaded.
  HW_ASSIGN_OR_RETURN(node->health_,
                      HealthPort::Start(options.health, {[raw = node.get()] { return raw->KeepsHouse(); },
                                                         [raw = node.get()] { return raw->registered(); }}));
  node->metrics_ = std::make_unique<Metrics>("decode");
  LimitConnections();
  node->metrics_->AddConfig(options.config.sha256);
  node->metrics_->Add(std::make_shared<TransportStats>(node->transport_));
  HW_RETURN_IF_ERROR(node->LoadModel(options));
  HW_RETURN_IF_ERROR(node->OpenStore(options));
  HW_RETURN_IF_ERROR(node->Serve(options));
  node->Register(options);
  node->UpdateGauges();
  node->housekeeping_ = std::thread([raw = node.get()] { raw->KeepHouse(); });
  return node;
}

absl::Status DecodeNode::LoadModel(const DecodeOptions& options) {
  ModelOptions model_options;
  model_options.directory = options.model;
  model_options.compute = ComputeType(options.compute);
  absl::StatusOr<std::unique_ptr<Model>> model = Model::Load(model_options);
  if (!model.ok()) return Annotate(model.status(), absl::StrCat("--model ", options.model));
  model_ = *std::move(model);
  HW_LOG(INFO).Field("fingerprint", model_->fingerprint()).Field("compute", NameOf(model_->compute()))
      << "loaded " << options.model << ", " << model_->weight_bytes() << " bytes of weights";
  return absl::OkStatus();
}

absl::Status DecodeNode::OpenStore(const DecodeOptions& options) {
  KvStoreOptions store_options;
  store_options.sink = options.sink == "verify" ? KvSink::kVerify : KvSink::kMemory;
  const bool verify = store_options.sink == KvSink::kVerify;
  uint64_t budget = options.kv_budget_bytes;
  if (budget == 0 && verify) budget = kVerifyBudgetBytes;
  if (budget == 0) HW_RETURN_IF_ERROR(DefaultKvBudget(options.kv_dir, &budget));
  if (budget == 0) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "--kv_dir ", options.kv_dir, ": its file system has no free space; pass --kv_budget or another"));
  }
  generated_budget_bytes_ = verify ? 0 : budget / kGeneratedShare;
  store_budget_bytes_ = budget - generated_budget_bytes_;
  store_options.directory = verify ? "" : options.kv_dir;
  store_options.budget_bytes = store_budget_bytes_;
  store_options.lease = options.kv_lease;
  store_options.model_fingerprint = model_->fingerprint();
  absl::StatusOr<std::unique_ptr<KvStore>> store = KvStore::Open(store_options);
  if (!store.ok()) {
    return Annotate(store.status(), verify ? "--sink=verify" : absl::StrCat("--kv_dir ", options.kv_dir));
  }
  store_ = *std::move(store);
  return absl::OkStatus();
}

absl::Status DecodeNode::Serve(const DecodeOptions& options) {
  GenerationEngine::Options engine_options;
  engine_options.model = model_.get();
  engine_options.store = store_.get();
  engine_options.metrics = metrics_.get();
  engine_options.generated_kv_bytes = generated_budget_bytes_;
  engine_options.max_generations = static_cast<uint32_t>(options.max_generations);
  engine_options.lease = options.kv_lease;
  engine_options.num_threads = static_cast<int>(options.threads);
  HW_ASSIGN_OR_RETURN(engine_, GenerationEngine::Create(engine_options));
  kv_service_ = MakeKvReceiver(store_.get(), metrics_.get());
  decode_service_ = MakeDecodeService(engine_.get());
  absl::StatusOr<RunningServer> server = StartServer(
      options.listen, {kv_service_.get(), decode_service_.get()}, transport_.get(), kMaxBufferedKvBytes);
  if (!server.ok()) return Annotate(server.status(), absl::StrCat("--listen ", options.listen));
  server_ = *std::move(server);
  const absl::Status served = metrics_->Serve(options.metrics);
  if (!served.ok()) return Annotate(served, absl::StrCat("--metrics ", options.metrics));
  if (store_->sink() == KvSink::kVerify) {
    HW_LOG(INFO).Field("address", server_.address).Field("sink", options.sink)
        << "serving: caches are checked and dropped, " << store_budget_bytes_ << " bytes for their checksums";
  } else {
    HW_LOG(INFO).Field("address", server_.address).Field("kv_dir", options.kv_dir)
        << "serving, " << store_budget_bytes_ << " bytes for caches, " << generated_budget_bytes_
        << " for generated tokens";
  }
  return absl::OkStatus();
}

void DecodeNode::Register(const DecodeOptions& options) {
  const std::string decode_address = options.advertise.empty() ? server_.address : options.advertise;
  RegistryClient::Options client;
  client.coordinator = options.coordinator;
  client.transport = transport_;
  client.metrics = metrics_.get();
  v1::DecodeRegistration& registration = client.registration;
  registration.set_decode_node(options.decode_node);
  registration.set_incarnation(RandomId());
  registration.set_pool(options.pool);
  registration.set_kv_address(options.advertise_kv.empty() ? decode_address : options.advertise_kv);
  registration.set_decode_address(decode_address);
  registration.set_epoch_tokens(true);
  registration.set_model_fingerprint(model_->fingerprint());
  for (const auto dtype : {v1::KV_DTYPE_F32, v1::KV_DTYPE_F16, v1::KV_DTYPE_BF16}) {
    registration.add_kv_dtypes(dtype);
  }
  // What is kept of a cache has no size that the coordinator could compare: any cache passes.
  registration.set_kv_budget_bytes(store_->sink() == KvSink::kVerify ? kMaxCacheBytes : store_budget_bytes_);
  registration.set_max_position(static_cast<uint64_t>(model_->config().max_position));
  registration.set_protocol_version(kProtocolVersion);
  client.heartbeat = [this] {
    const KvStore::Usage usage = store_->usage();
    v1::DecodeHeartbeat heartbeat;
    heartbeat.set_kv_bytes_used(usage.bytes);
    heartbeat.set_sessions(usage.sessions);
    return heartbeat;
  };
  const std::lock_guard<std::mutex> lock(registry_mutex_);
  registry_ = RegistryClient::Start(client);
}

void DecodeNode::KeepHouse() {
  auto& expired_total =
      metrics_->Counter("headwater_lease_expired_total", "Sessions freed because their lease ended.");
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_.wait_for(lock, kHousekeepingInterval, [this] { return stopping_; })) {
    lock.unlock();
    const int expired = store_->ExpireLeases();
    if (expired > 0) expired_total.Increment(expired);
    UpdateGauges();
    kept_house_at_ = absl::ToUnixNanos(SteadyNow());
    lock.lock();
  }
}

void DecodeNode::UpdateGauges() {
  const auto pool_bytes = [this](const char* state) -> prometheus::Gauge& {
    return metrics_->Gauge(
        "headwater_kv_pool_bytes",
        "KV memory by state: free, active (not committed, or of generated tokens), committed; with "
        "--sink=verify that of checksums.",
        {{"state", state}});
  };
  const KvStore::Usage usage = store_->usage();
  const uint64_t generated = engine_->generated_kv_bytes();
  const uint64_t total = store_budget_bytes_ + generated_budget_bytes_;
  const uint64_t used = std::min(usage.bytes + generated, total);
  pool_bytes("free").Set(static_cast<double>(total - used));
  pool_bytes("committed").Set(static_cast<double>(usage.committed_bytes));
  pool_bytes("active").Set(static_cast<double>(usage.bytes - usage.committed_bytes + generated));
  metrics_->Gauge("headwater_kv_pool_usage_ratio", "Used part of the KV memory.")
      .Set(static_cast<double>(used) / static_cast<double>(std::max<uint64_t>(total, 1)));
  metrics_->Gauge("headwater_sessions", "Sessions held.").Set(usage.sessions);
  metrics_->Gauge("headwater_decode_generations", "Generate calls under way.")
      .Set(engine_->num_generations());
}

bool DecodeNode::registered() const {
  const std::lock_guard<std::mutex> lock(registry_mutex_);
  return registry_ != nullptr && registry_->connected();
}

void DecodeNode::Leave() {
  std::unique_ptr<RegistryClient> registry;  // its end takes a second: not under the mutex
  const std::lock_guard<std::mutex> lock(registry_mutex_);
  registry = std::move(registry_);
}

bool DecodeNode::KeepsHouse() const {
  const int64_t at = kept_house_at_;
  return at == 0 || SteadyNow() - absl::FromUnixNanos(at) < kStuck;
}

bool DecodeNode::Drain(absl::Duration timeout) {
  health_->Leave();
  if (auto* health = server_.server->GetHealthCheckService(); health != nullptr)
    health->SetServingStatus(false);
  Leave();
  engine_->Drain();
  return engine_->WaitIdle(timeout);
}

DecodeNode::~DecodeNode() {
  health_ = nullptr;
  Leave();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (housekeeping_.joinable()) housekeeping_.join();
  // Calls that are still there are cancelled after the grace, so that Shutdown() ends; the engine answers
  // them.
  if (server_.server != nullptr) {
    engine_->Drain();
    server_.server->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
  }
  server_.server = nullptr;
}

}  // namespace headwater
