#include "base/rpc/health.h"

#include <thread>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include <grpcpp/health_check_service_interface.h>

#include "base/rpc/server.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr absl::Duration kInterval = absl::Milliseconds(100);

class Port final : public HealthPort {
 public:
  Port(RunningServer server, Probes probes) : server_(std::move(server)), probes_(std::move(probes)) {
    Look();
    if (server_.server != nullptr) {
      thread_ = std::thread([this] {
        while (!stop_.WaitForNotificationWithTimeout(kInterval)) Look();
      });
    }
  }
  ~Port() override {
    stop_.Notify();
    if (thread_.joinable()) thread_.join();
    if (server_.server != nullptr) server_.server->Shutdown(std::chrono::system_clock::now());
  }

  void Leave() override {
    const absl::MutexLock lock(&mutex_);
    left_ = true;
    Show();
  }
  const std::string& address() const override { return server_.address; }

 private:
  void Look() {
    const bool live = probes_.live(), ready = probes_.ready();
    const absl::MutexLock lock(&mutex_);
    live_ = live;
    ready_ = ready;
    Show();
  }
  void Show() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (server_.server == nullptr) return;
    grpc::HealthCheckServiceInterface* const service = server_.server->GetHealthCheckService();
    service->SetServingStatus("liveness", live_);
    service->SetServingStatus("readiness", ready_ && !left_);
    service->SetServingStatus("", ready_ && !left_);
  }

  const RunningServer server_;
  const Probes probes_;
  absl::Mutex mutex_;
  bool live_ ABSL_GUARDED_BY(mutex_) = false, ready_ ABSL_GUARDED_BY(mutex_) = false;
  bool left_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HealthPort>> HealthPort::Start(const std::string& address, Probes probes) {
  RunningServer server;
  if (!address.empty()) {
    HW_ASSIGN_OR_RETURN(server, StartServer(address, {}));
  }
  return std::unique_ptr<HealthPort>(std::make_unique<Port>(std::move(server), std::move(probes)));
}

}  // namespace headwater
