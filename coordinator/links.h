// What the scheduler needs from the network, as small interfaces: the gRPC adapters in service/ implement
// them, and so do the fakes of the tests.
//
// All calls come from the scheduler's thread. No implementation may call back into the scheduler from inside
// one of these calls.
#ifndef HW_COORDINATOR_LINKS_H_
#define HW_COORDINATOR_LINKS_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "headwater/v1/kv.pb.h"
#include "headwater/v1/prefill.pb.h"
#include "headwater/v1/worker.pb.h"

namespace headwater {

// The coordinator's end of a registration stream.
class PeerLink {
 public:
  virtual ~PeerLink() = default;
  // Ends the stream with `why`. Idempotent; does not block.
  virtual void Close(const absl::Status& why) = 0;
};

class WorkerLink : public PeerLink {
 public:
  // Queues a message and returns at once. False: the stream has ended or its bounded outbox is full; the
  // worker is lost.
  virtual bool Send(v1::ConnectResponse message) = 0;
};

// KvTransferService of the decode nodes. Each `done` runs exactly once, on the scheduler's thread, after the
// call that took it has returned. UNAVAILABLE and DEADLINE_EXCEEDED: the node may be away.
class DecodeClient {
 public:
  using Done = std::function<void(const absl::Status&)>;

  virtual ~DecodeClient() = default;
  virtual void OpenSession(const std::string& kv_address, v1::OpenSessionRequest request,
                           absl::Duration timeout, Done done) = 0;
  virtual void CommitSession(const std::string& kv_address, v1::CommitSessionRequest request,
                             absl::Duration timeout, Done done) = 0;
  virtual void AbortSession(const std::string& kv_address, v1::AbortSessionRequest request,
                            absl::Duration timeout, Done done) = 0;
};

// One call that watches a job. Gets either OnRejected alone, or accepted, any number of progress events and
// one terminal event; a replay is the terminal event alone. Never blocks.
class JobWatcher {
 public:
  virtual ~JobWatcher() = default;
  virtual void OnEvent(std::shared_ptr<const v1::PrefillResponse> event) = 0;
  virtual void OnRejected(const absl::Status& status) = 0;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_LINKS_H_
