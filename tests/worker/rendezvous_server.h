// A rendezvous server of a test's own.
#ifndef HW_TESTS_WORKER_RENDEZVOUS_SERVER_H_
#define HW_TESTS_WORKER_RENDEZVOUS_SERVER_H_

#include <chrono>
#include <memory>
#include <string>

#include <grpcpp/impl/service_type.h>

#include "base/log.h"
#include "base/rpc/server.h"
#include "worker/rendezvous.h"

namespace headwater::testing {

class RendezvousServer {
 public:
  RendezvousServer() : service_(MakeRendezvousService({})) {
    auto server = StartServer("127.0.0.1:0", {service_.get()});
    HW_CHECK(server.ok());
    server_ = *std::move(server);
  }
  ~RendezvousServer() { server_.server->Shutdown(std::chrono::system_clock::now()); }

  const std::string& address() const { return server_.address; }
  std::unique_ptr<RendezvousClient> Dial() const { return RendezvousClient::Dial(server_.address, nullptr); }

 private:
  std::unique_ptr<grpc::Service> service_;
  RunningServer server_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_RENDEZVOUS_SERVER_H_
