// Gloo groups whose ranks are in one process, over a rendezvous server of their own.
#ifndef HW_TESTS_WORKER_GLOO_GROUP_H_
#define HW_TESTS_WORKER_GLOO_GROUP_H_

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include <grpcpp/impl/service_type.h>

#include "base/rpc/server.h"
#include "worker/gloo_collectives.h"

namespace headwater::testing {

class GlooGroups {
 public:
  GlooGroups();
  ~GlooGroups();

  // A connected group, one endpoint per rank.
  std::vector<std::unique_ptr<Collectives>> Make(int world, absl::Duration timeout);

  // One rank of the group `name`.
  absl::StatusOr<std::unique_ptr<Collectives>> Join(const std::string& name, int rank, int world,
                                                    absl::Duration timeout,
                                                    absl::Duration connect_timeout = absl::Seconds(20));

  const std::string& address() const { return server_.address; }

 private:
  std::unique_ptr<grpc::Service> service_;
  RunningServer server_;
  std::atomic<int> next_group_{0};
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_GLOO_GROUP_H_
