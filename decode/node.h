// DecodeNode: everything that the headwater-decode process runs, wired together.
#ifndef HW_DECODE_NODE_H_
#define HW_DECODE_NODE_H_

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include <grpcpp/impl/service_type.h>

#include "base/health.h"
#include "base/metrics.h"
#include "base/rpc/server.h"
#include "base/rpc/transport.h"
#include "decode/engine.h"
#include "decode/options.h"
#include "decode/registry_client.h"
#include "kvtransfer/store.h"
#include "model/model.h"

namespace headwater {

// Model, KV store, receiver, engine, gRPC server, registration and the thread that ends leases.
class DecodeNode {
 public:
  // Loads the model, takes over --kv_dir (--sink=memory), serves and starts to register. Errors name the flag
  // to change: the model is missing or refused, the KV directory cannot be used or is another process's, a
  // port is taken.
  static absl::StatusOr<std::unique_ptr<DecodeNode>> Start(const DecodeOptions& options);
  // Ends everything at once: running generations get UNAVAILABLE, DRAINING.
  ~DecodeNode();
  DecodeNode(const DecodeNode&) = delete;
  DecodeNode& operator=(const DecodeNode&) = delete;

  // Leaves the coordinator, refuses new generations, and waits for the running ones; false: `timeout` passed.
  bool Drain(absl::Duration timeout);

  // Where the gRPC services really listen.
  const std::string& address() const { return server_.address; }
  bool registered() const;

 private:
  DecodeNode() = default;
  absl::Status LoadModel(const DecodeOptions& options);
  absl::Status OpenStore(const DecodeOptions& options);
  absl::Status Serve(const DecodeOptions& options);
  void Register(const DecodeOptions& options);
  void KeepHouse();
  void UpdateGauges();
  void Leave();
  bool KeepsHouse() const;

  // In order of construction; the destructor takes them down the other way round.
  std::shared_ptr<const Transport> transport_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<Model> model_;
  uint64_t store_budget_bytes_ = 0;
  uint64_t generated_budget_bytes_ = 0;  // 0 with --sink=verify
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<GenerationEngine> engine_;
  std::unique_ptr<grpc::Service> kv_service_;
  std::unique_ptr<grpc::Service> decode_service_;
  RunningServer server_;
  mutable std::mutex registry_mutex_;
  std::unique_ptr<RegistryClient> registry_;  // guarded by registry_mutex_

  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;  // guarded by mutex_
  std::thread housekeeping_;
  std::atomic<int64_t> kept_house_at_{0};  // nanoseconds since 1970; 0: not yet
  std::unique_ptr<HealthPort> health_;     // its thread asks the others
};

}  // namespace headwater

#endif  // HW_DECODE_NODE_H_
