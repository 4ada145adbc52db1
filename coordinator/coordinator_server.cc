#include "coordinator/coordinator_server.h"

#include <chrono>
#include <future>

#include "absl/time/clock.h"
#include <grpcpp/health_check_service_interface.h>

#include "base/clock.h"
#include "base/rpc/accept_limit.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/transport_stats.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

// The scheduler ticks several times a second.
constexpr absl::Duration kStuck = absl::Seconds(10);

// The page asks again.
constexpr std::chrono::seconds kSnapshotWait(1);

constexpr absl::Duration kTickInterval = absl::Milliseconds(50);

absl::Status Cut() {
  return WithRetryAfter(MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING,
                                  "the coordinator shut down before the request ended"),
                        absl::Seconds(1));
}

}  // namespace

CoordinatorServer::CoordinatorServer(const CoordinatorOptions& options,
                                     std::shared_ptr<const Transport> transport)
    : transport_(std::move(transport)),
      metrics_("coordinator"),
      coordinator_metrics_(&metrics_),
      loop_(kTickInterval),
      decode_client_(std::make_unique<GrpcDecodeClient>(&loop_, transport_)),
      scheduler_(options, Clock::Real(), decode_client_.get(), &coordinator_metrics_),
      prefill_service_(&scheduler_, &loop_),
      admin_service_(&scheduler_, &loop_),
      worker_service_(&scheduler_, &loop_),
      decode_service_(&scheduler_, &loop_) {
  loop_.Start([this] { scheduler_.Tick(); });
}

absl::StatusOr<std::unique_ptr<CoordinatorServer>> CoordinatorServer::Start(
    const CoordinatorOptions& options, const CoordinatorEndpoints& endpoints) {
  auto server = std::unique_ptr<CoordinatorServer>(new CoordinatorServer(options, endpoints.transport));
  LimitConnections();
  server->metrics_.AddConfig(endpoints.config_sha256);
  server->metrics_.Add(std::make_shared<TransportStats>(server->transport_));
  HW_RETURN_IF_ERROR(server->metrics_.Serve(endpoints.metrics));
  HW_ASSIGN_OR_RETURN(server->running_, StartServer(endpoints.listen,
                                                    {&server->prefill_service_, &server->admin_service_,
                                                     &server->worker_service_, &server->decode_service_},
                                                    server->transport_.get()));
  SchedulerLoop* const loop = &server->loop_;
  HW_ASSIGN_OR_RETURN(server->health_,
                      HealthPort::Start(endpoints.health,
                                        {[loop] { return loop->TickAge() < kStuck; }, [] { return true; }}));
  HW_ASSIGN_OR_RETURN(server->page_, PageServer::Start(endpoints.page, [owner = server.get()] {
                        return owner->TakeSnapshot();
                      }));
  return server;
}

CoordinatorServer::~CoordinatorServer() { Stop(absl::ZeroDuration()); }

void CoordinatorServer::RunOnLoop(const std::function<void()>& work) {
  std::promise<void> done;
  const bool posted = loop_.Post([&] {
    work();
    done.set_value();
  });
  if (posted) done.get_future().wait();
}

absl::StatusOr<Snapshot> CoordinatorServer::TakeSnapshot() {
  const auto done = std::make_shared<std::promise<Snapshot>>();
  std::future<Snapshot> snapshot = done->get_future();
  const bool posted = loop_.TryPost([this, done] { done->set_value(scheduler_.TakeSnapshot({})); });
  if (!posted || snapshot.wait_for(kSnapshotWait) != std::future_status::ready) {
    return absl::UnavailableError("the scheduler is busy");
  }
  return snapshot.get();
}

void CoordinatorServer::BeginDrain() {
  health_->Leave();
  running_.server->GetHealthCheckService()->SetServingStatus(false);
  RunOnLoop([this] { scheduler_.BeginDrain(); });
}

size_t CoordinatorServer::NumJobs() {
  size_t num_jobs = 0;
  RunOnLoop([&] { num_jobs = scheduler_.num_jobs(); });
  return num_jobs;
}

size_t CoordinatorServer::Stop(absl::Duration limit) {
  if (stopped_) return 0;
  stopped_ = true;
  // Its library takes up to 2 s to end.
  const std::future<void> page_end =
      std::async(std::launch::async, [page = std::move(page_)]() mutable { page.reset(); });
  size_t cut = 0;
  RunOnLoop([&] {
    cut = scheduler_.num_jobs();
    scheduler_.CancelAll(Cut());
  });
  const absl::Time end = Clock::Real()->Now() + limit;
  while (Clock::Real()->Now() < end && NumJobs() > 0) absl::SleepFor(absl::Milliseconds(20));
  RunOnLoop([this] { scheduler_.EndAll(Cut()); });
  if (running_.server != nullptr) {
    running_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(500));
    running_.server.reset();
  }
  page_end.wait();
  decode_client_.reset();
  loop_.Stop();
  return cut;
}

}  // namespace headwater
