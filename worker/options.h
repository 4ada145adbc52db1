// Command line of headwater-worker.
#ifndef HW_WORKER_OPTIONS_H_
#define HW_WORKER_OPTIONS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

#include "base/config/config.h"
#include "base/rpc/transport.h"

namespace headwater {

// What the flags say; options.cc has each one's meaning.
struct WorkerOptions {
  std::string coordinator = "127.0.0.1:7070";
  std::string worker_id;  // empty: host name and process id
  std::string listen = "127.0.0.1:7071";
  std::string advertise;        // empty: the address listened on
  std::string collective_host;  // empty: advertise's host
  std::string metrics = "127.0.0.1:9071";
  std::string health;  // empty: none
  std::string model;
  std::string model_name;  // empty: the directory's last part
  std::string device = "cpu";
  std::string compute = "auto";
  std::string linear = "bf16";
  int64_t threads = 0;               // 0: all cores that this process may use
  uint64_t memory_budget_bytes = 0;  // 0: 80 % of what is available at the start
  int64_t kv_channels = 0;           // parsed: 0 is replaced
  int64_t egress_buffers = 3;
  int64_t checkpoint_layers = 8;
  absl::Duration collective_timeout = absl::Seconds(30);
  absl::Duration kv_stall_timeout = absl::Seconds(30);
  absl::Duration drain_timeout = absl::Seconds(45);
  std::string default_policy;  // empty: headwater on a GPU, dense on a CPU
  std::string share_clusters;  // files; empty: none
  std::string headwater_calibration;
  bool measure_recall = true;
  int64_t max_gpus = 1;
  bool measure_rates = true;
  double link_gbytes_per_s = 0;    // 0: the device kind's
  double egress_gbytes_per_s = 0;  // likewise
  std::string log_format = "text";
  TransportOptions transport;
  ConfigSummary config;
};

// Reads the arguments after the program's name, and what --config and the environment give, checks them and
// fills in what depends on other flags (worker_id, model_name, threads; `advertise` and `collective_host`
// need the port that was bound). INVALID_ARGUMENT names the flag or where else the value is from, the value
// and what is allowed; UNIMPLEMENTED: a device that this build has no code for. On --help, `help` is set and
// nothing else is done; on --print_config it is set, too.
absl::Status ParseWorkerOptions(absl::Span<const std::string> arguments, WorkerOptions* options,
                                std::string* help);

}  // namespace headwater

#endif  // HW_WORKER_OPTIONS_H_
