// A whole Headwater service of real processes on loopback.
#ifndef HW_TESTS_INTEGRATION_CLUSTER_H_
#define HW_TESTS_INTEGRATION_CLUSTER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include <grpcpp/channel.h>

#include "base/rpc/transport.h"
#include "headwater/v1/admin.grpc.pb.h"
#include "headwater/v1/decode.grpc.pb.h"
#include "headwater/v1/prefill.grpc.pb.h"
#include "tests/integration/process.h"

namespace headwater::testing {

struct ClusterOptions {
  int workers = 2;
  std::string model_directory;
  // f32 makes results comparable over different plans.
  std::string compute = "f32";
  // Without rates plans go by length alone, whatever the machine.
  bool measure_rates = false;
  std::vector<std::string> coordinator_flags;
  std::vector<std::string> worker_flags;
  std::vector<std::string> decode_flags;
  // Of one worker alone, besides worker_flags.
  std::function<std::vector<std::string>(int index)> flags_of_worker;
  // Goes before every process's command line ("/usr/bin/env", "NAME=value").
  std::vector<std::string> command_prefix;
  // Port that workers reach the decode node's KV service at instead of its own (a proxy's); 0: none. Called
  // with the decode node's port before it starts.
  std::function<int(int decode_port)> kv_proxy_port;
  // Of this test's own calls; null: plaintext. The processes' are flags.
  std::shared_ptr<const Transport> transport;
};

class Cluster {
 public:
  // Starts everything and waits until the coordinator knows all of it; aborts the test program with logs on
  // failure.
  explicit Cluster(ClusterOptions options);
  ~Cluster();

  void StartWorker(int index);
  void StartDecode();
  Process& worker(int index) { return *workers_[static_cast<size_t>(index)]; }
  Process& decode() { return *decode_; }
  Process& coordinator() { return *coordinator_; }
  // Waits until the coordinator lists as many workers and connected decode nodes.
  void WaitForMembers(int workers, int decode_nodes);

  v1::PrefillService::Stub& prefill() { return *prefill_; }
  v1::AdminService::Stub& admin() { return *admin_; }
  std::string coordinator_address() const { return coordinator_address_; }
  const std::string& directory() const { return directory_; }
  int decode_metrics_port() const { return decode_metrics_port_; }
  int coordinator_metrics_port() const { return coordinator_metrics_port_; }
  int worker_metrics_port(int index) const { return worker_metrics_ports_[static_cast<size_t>(index)]; }

  // Runs a prefill to its terminal event; `on_event` sees every event. A failed event becomes its status.
  absl::StatusOr<v1::PrefillCompleted> Prefill(
      const v1::PrefillRequest& request,
      const std::function<void(const v1::PrefillResponse&)>& on_event = nullptr,
      absl::Duration timeout = absl::Seconds(120));
  absl::StatusOr<std::vector<uint32_t>> Generate(const v1::PrefillCompleted& completed, uint32_t count);
  // Bytes reclaimed.
  absl::StatusOr<uint64_t> Release(const v1::PrefillCompleted& completed);

  // Of all processes, for failure messages.
  std::string Logs() const;

 private:
  std::unique_ptr<Process> Start(const std::vector<std::string>& arguments, const std::string& log);

  const ClusterOptions options_;
  const std::string directory_;
  std::string coordinator_address_;
  int decode_port_ = 0;
  int kv_port_ = 0;
  int decode_metrics_port_ = 0;
  int coordinator_metrics_port_ = 0;
  std::vector<int> worker_metrics_ports_;
  std::unique_ptr<Process> coordinator_;
  std::vector<std::unique_ptr<Process>> workers_;
  std::unique_ptr<Process> decode_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::PrefillService::Stub> prefill_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

// `count` tokens below `vocab`, the same for the same seed.
std::vector<uint32_t> RandomTokens(uint64_t seed, int count, uint32_t vocab = 256);
v1::PrefillRequest MakeRequest(const std::vector<uint32_t>& tokens);

// Value of one sample line that starts with `name_and_labels` on a process's /metrics; -1: not there.
double ReadMetric(int port, const std::string& name_and_labels);

}  // namespace headwater::testing

#endif  // HW_TESTS_INTEGRATION_CLUSTER_H_
