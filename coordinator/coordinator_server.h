// A whole coordinator in one object: scheduler, its thread, services, metrics.
#ifndef HW_COORDINATOR_COORDINATOR_SERVER_H_
#define HW_COORDINATOR_COORDINATOR_SERVER_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "base/health.h"
#include "base/metrics.h"
#include "base/rpc/server.h"
#include "base/rpc/transport.h"
#include "coordinator/coordinator_metrics.h"
#include "coordinator/options.h"
#include "coordinator/page/page_server.h"
#include "coordinator/scheduler.h"
#include "coordinator/scheduler_loop.h"
#include "coordinator/service/client_services.h"
#include "coordinator/service/grpc_decode_client.h"
#include "coordinator/service/peer_services.h"

namespace headwater {

// host:port each; port 0 takes a free one.
struct CoordinatorEndpoints {
  std::string listen;
  std::string metrics;                         // empty: none
  std::string health;                          // of HealthPort; empty: none
  std::shared_ptr<const Transport> transport;  // of `listen` and to decode nodes; null: plaintext
  std::string page = {};                       // of PageServer; empty: none
  std::string config_sha256 = {};              // as ConfigSummary has it
};

// The members may be called from any one thread.
class CoordinatorServer {
 public:
  // UNAVAILABLE: an address cannot be bound; the message names it.
  static absl::StatusOr<std::unique_ptr<CoordinatorServer>> Start(const CoordinatorOptions& options,
                                                                  const CoordinatorEndpoints& endpoints);
  // Stops without delay.
  ~CoordinatorServer();

  const std::string& address() const { return running_.address; }
  const std::string& page_address() const { return page_->address(); }

  // New requests are refused, health turns NOT_SERVING, accepted requests go on.
  void BeginDrain();
  // Accepted requests that have not ended.
  size_t NumJobs();
  // Cancels what runs, giving it `limit` to end in order, then ends all connections. Returns how many
  // requests were cut. Idempotent.
  size_t Stop(absl::Duration limit);

 private:
  CoordinatorServer(const CoordinatorOptions& options, std::shared_ptr<const Transport> transport);
  // From the page's threads. UNAVAILABLE: the scheduler did not come to it in time.
  absl::StatusOr<Snapshot> TakeSnapshot();
  // Runs `work` on the scheduler's thread and waits for it.
  void RunOnLoop(const std::function<void()>& work);

  const std::shared_ptr<const Transport> transport_;
  Metrics metrics_;
  CoordinatorMetrics coordinator_metrics_;
  SchedulerLoop loop_;
  std::unique_ptr<GrpcDecodeClient> decode_client_;
  Scheduler scheduler_;
  PrefillServiceAdapter prefill_service_;
  AdminServiceAdapter admin_service_;
  WorkerControlAdapter worker_service_;
  DecodeRegistryAdapter decode_service_;
  RunningServer running_;
  std::unique_ptr<HealthPort> health_;
  std::unique_ptr<PageServer> page_;
  bool stopped_ = false;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_COORDINATOR_SERVER_H_
