// What a KvSender knows of its blocks: which wait, which are on which channel, which are acknowledged, and
// whose memory is still in use. Knows no gRPC.
#ifndef HW_KVTRANSFER_SEND_LEDGER_H_
#define HW_KVTRANSFER_SEND_LEDGER_H_

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "base/metrics.h"
#include "kvtransfer/sender.h"

namespace headwater {

// A block that was submitted and whose `done` has not been handed out yet. Owned by the ledger; the channel
// that took it may read the first group until it gives it back.
struct SendBlock {
  KvBlockId id;
  uint64_t index = 0;
  const void* data = nullptr;
  uint64_t bytes = 0;
  uint32_t crc32c = 0;
  bool has_crc = false;

  // Of the ledger.
  // kQueued: to be sent. kInFlight: sent on `channel`. kHeld: its stream broke; the receiver's next state
  // says whether it arrived. kOver: acknowledged or given up.
  enum class State { kQueued, kInFlight, kHeld, kOver };
  State state = State::kQueued;
  int channel = -1;
  int sends = 0;
  int corrupt = 0;
  // Slices over `data` that gRPC still refers to; `done` waits for them.
  int slices = 0;
  absl::Time sent_at;
  std::function<void()> done;
};

// Thread-safe. No function calls gRPC or `done` while it holds the mutex, and SliceReleased takes only the
// mutex: gRPC may call it from anywhere.
class SendLedger {
  using Lock = std::unique_lock<std::mutex>;

 public:
  // `wake` is called, without the mutex, when channels should look again: `all` of them because the sender is
  // over, or the idle ones because there may be work.
  SendLedger(const KvSenderOptions& options, const KvGeometry& geometry, const Clock* clock,
             std::function<void(bool all)> wake);
  ~SendLedger();

  // The caller's side. As KvSender's functions; `done` also runs where Submit returns an error.
  absl::Status Submit(const KvBlockId& block, const void* data, std::function<void()> done);
  absl::Status Finish();
  KvSenderStats Stats() const {
    Lock lock(mutex_);
    return stats_;
  }
  std::optional<KvShare> AckedBelow(uint32_t layer) const {
    Lock lock(mutex_);
    return shares_.Below(std::min(layer, geometry_.layout().num_layers()));
  }
  std::vector<KvLayerTimes> LayerTimes() const {
    Lock lock(mutex_);
    return shares_.Times();
  }
  // OK while the sender works and after Finish.
  absl::Status status() const;
  // Ends the sender; the first status counts. No effect after Finish has returned OK.
  void Fail(const absl::Status& status);

  // The channels' side.
  // Neither failed nor finished.
  bool running() const;
  bool finished() const;
  // The next block to send on `channel`, with one slice counted; null: nothing to send, or the window is
  // full.
  SendBlock* Take(int channel);
  void SetCrc(SendBlock* block, uint32_t crc32c);
  void SliceReleased(SendBlock* block);
  // Before the hello is written: what is acknowledged now must be in the answer.
  void HelloSent(int channel);
  // The receiver's state, the answer to a hello: settles what the channel's last stream left open. DATA_LOSS,
  // KV_CORRUPT: the receiver lost a block that it had acknowledged. INTERNAL: no state of this session.
  absl::Status Resume(int channel, const v1::KvSessionState& state);
  // ABORTED, STALE_EPOCH; INTERNAL: refused, or an acknowledgement of what was not sent; DATA_LOSS,
  // KV_CORRUPT: a block came corrupt once too often.
  absl::Status Acknowledge(int channel, const v1::KvAck& ack);
  // The channel's stream is gone.
  void StreamLost(int channel);

  // Runs `done` functions and watches for stalls until Stop() has been called and every block is over with
  // its memory released. Call on a thread of its own.
  void RunCompletions();
  void Stop();

 private:
  bool FailLocked(const absl::Status& status);
  void OverLocked(SendBlock* block);
  void HandOutLocked(SendBlock* block);
  void AckedLocked(SendBlock* block);
  void RequeueLocked(SendBlock* block);
  absl::Status AcknowledgeLocked(int channel, const v1::KvAck& ack);
  absl::Status AcknowledgeBlockLocked(int channel, uint64_t index, bool stored);
  absl::Status ResumeLocked(int channel, const v1::KvSessionState& state);
  bool StalledLocked(absl::Time* deadline) const;
  void SetInFlightLocked(uint64_t bytes);

  const KvSenderOptions options_;
  const KvGeometry geometry_;
  const Clock* const clock_;
  const std::function<void(bool all)> wake_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, std::unique_ptr<SendBlock>> blocks_;
  std::deque<SendBlock*> queue_;
  // `done` functions to run, and how many run now.
  std::vector<std::function<void()>> ready_;
  size_t running_done_ = 0;
  // Of blocks kInFlight and kHeld.
  uint64_t in_flight_bytes_ = 0;
  // Blocks not kOver.
  uint64_t open_blocks_ = 0;
  absl::Time last_progress_;
  std::vector<bool> submitted_;
  std::vector<bool> acked_;
  LayerShares shares_;
  // By channel: acked_ when its last hello was sent, and whether a hello of it was ever answered.
  std::vector<std::vector<bool>> acked_at_hello_;
  std::vector<bool> connected_;
  KvSenderStats stats_;
  absl::Status status_;
  bool finished_ = false;
  bool stopped_ = false;

  struct Instruments;
  const std::unique_ptr<Instruments> instruments_;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_SEND_LEDGER_H_
