// One connection of a KvSender: a thread with a completion queue of its own that keeps one PushBlocks stream
// up, writes what the ledger gives it and reports what the receiver answers.
#ifndef HW_KVTRANSFER_SENDER_CHANNEL_H_
#define HW_KVTRANSFER_SENDER_CHANNEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include <grpcpp/alarm.h>
#include <grpcpp/completion_queue.h>

#include "kvtransfer/send_ledger.h"

namespace headwater {

class SenderChannel {
 public:
  SenderChannel(const KvSenderOptions& options, const KvGeometry& geometry, int index,
                std::shared_ptr<SendLedger> ledger);
  ~SenderChannel() { Join(); }
  SenderChannel(const SenderChannel&) = delete;
  SenderChannel& operator=(const SenderChannel&) = delete;

  void Start();
  // Waits for the thread, whose connection is then gone; the ledger must have failed or finished.
  void Join();
  // Makes the thread look at the ledger again; without `always` only if it is idle. Any thread.
  void Wake(bool always);

 private:
  struct Stream;
  enum class Event : intptr_t { kWake = 1, kStarted, kRead, kWritten, kWritesDone, kFinished };

  void Run();
  // Keeps one stream up until it ends; returns its status.
  absl::Status RunStream();
  void Begin(Stream* stream);
  // Starts whatever the stream's and the ledger's states call for.
  void Advance(Stream* stream);
  void HandleEvent(Stream* stream, Event event, bool ok);
  void HandleRead(Stream* stream);
  bool WriteNext(Stream* stream);
  // What a stream's end means: OK: connect again; otherwise the sender's error.
  absl::Status Judge(const absl::Status& end);
  void BackOff();
  bool NextEvent(absl::Duration limit, Event* event, bool* ok);

  const KvSenderOptions options_;
  const KvGeometry geometry_;
  const int index_;
  const std::shared_ptr<SendLedger> ledger_;

  grpc::CompletionQueue queue_;
  std::shared_ptr<grpc::Channel> channel_;
  int failures_ = 0;
  int corrupt_streams_ = 0;
  std::atomic<bool> idle_{false};

  std::mutex wake_mutex_;
  std::unique_ptr<grpc::Alarm> alarm_;
  bool alarm_pending_ = false;
  bool closed_ = false;

  std::thread thread_;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_SENDER_CHANNEL_H_
