// KvSender: pushes one rank's share of a KV cache to a decode node and does not forget a block before it is
// acknowledged.
#ifndef HW_KVTRANSFER_SENDER_H_
#define HW_KVTRANSFER_SENDER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "base/metrics.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/layer_shares.h"
#include "kvtransfer/layout.h"

namespace headwater {

class Transport;

struct KvSenderOptions {
  std::string address;  // host:port of the decode node's KvTransferService
  std::string session_id;
  std::string session_token;
  std::string request_id;  // for logs
  // W3C Trace Context, sent as the streams' metadata; empty: none.
  std::string traceparent;
  std::string tracestate;
  uint32_t epoch = 0;
  uint32_t rank = 0;
  // TCP connections; each is about one core at either end.
  int num_channels = 2;
  // Sent and not acknowledged, over all channels.
  uint64_t max_inflight_bytes = 64 << 20;
  // Without any acknowledgement for this long while blocks wait, the stream fails with UNAVAILABLE,
  // KV_STREAM_STALLED. Reconnecting to a restarted receiver counts into it.
  absl::Duration stall_timeout = absl::Seconds(30);
  // Times that one block may arrive corrupt before the stream fails with DATA_LOSS, KV_CORRUPT.
  int max_corrupt_retries = 8;
  Metrics* metrics = nullptr;                  // may be null; must outlive the sender
  std::shared_ptr<const Transport> transport;  // null: plaintext
};

struct KvSenderStats {
  uint64_t blocks_acked = 0;
  uint64_t bytes_acked = 0;
  uint64_t bytes_submitted = 0;
  uint64_t blocks_resent = 0;   // sent more than once, for whatever reason
  uint32_t stream_resumes = 0;  // connections made anew after the first
  // Of the blocks sent so far: of all submitted blocks once Finish has returned OK.
  KvDigest digest;
};

// One use: Create, Submit..., Finish (or Cancel). Submit and Finish from one thread; the others from any.
class KvSender {
 public:
  // Starts connecting and returns.
  static std::unique_ptr<KvSender> Create(const KvSenderOptions& options, const KvGeometry& geometry);
  // Cancels what is under way and waits until no thread uses the caller's memory: at once as a rule, about 3
  // s where the peer has stopped reading.
  virtual ~KvSender() = default;

  // Queues the block for sending. `data` (geometry.BytesOf(block) bytes) must stay unchanged until `done` has
  // run; `done` runs exactly once, on another thread: when the block is acknowledged, or the sender has
  // failed, is cancelled or destroyed, and gRPC has let go of the memory. It runs even where Submit returns
  // an error: the sender's, if it has failed, FAILED_PRECONDITION after Finish, INVALID_ARGUMENT for a block
  // that is not of this geometry or was submitted before. Never waits: the caller bounds what it submits by
  // the buffers that `done` frees. `done` must be short and must not call the sender's Finish or destructor.
  virtual absl::Status Submit(const KvBlockId& block, const void* data, std::function<void()> done) = 0;

  // Waits until every submitted block is acknowledged and its `done` has run, or for the sender's error:
  //   UNAVAILABLE, KV_STREAM_STALLED   no acknowledgement for stall_timeout
  //   UNAVAILABLE, DECODE_LOST         the receiver no longer knows the session: begin again in a new epoch
  //   ABORTED, STALE_EPOCH             a higher epoch has taken over
  //   DATA_LOSS, KV_CORRUPT            a block arrived corrupt too often, or the receiver lost an
  //   acknowledged one INTERNAL                         the receiver refused a block PERMISSION_DENIED the
  //   session token is wrong CANCELLED
  virtual absl::Status Finish() = 0;

  // Makes Submit and Finish return CANCELLED; sends nothing more. Returns at once.
  virtual void Cancel() = 0;

  virtual absl::Status status() const = 0;
  virtual KvSenderStats Stats() const = 0;
  // What the blocks add up to that were submitted so far of layers below `layer` (at most the cache's);
  // nullopt: one of them is not acknowledged.
  virtual std::optional<KvShare> AckedBelow(uint32_t layer) const = 0;
  // Of every layer of the cache, by the sender's clock; empty: not known.
  virtual std::vector<KvLayerTimes> LayerTimes() const = 0;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_SENDER_H_
