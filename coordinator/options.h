// Limits and waits of the coordinator; main.cc fills them from flags.
#ifndef HW_COORDINATOR_OPTIONS_H_
#define HW_COORDINATOR_OPTIONS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"

#include "coordinator/address.h"

namespace headwater {

struct CoordinatorOptions {
  // Admission.
  uint64_t max_prompt_tokens = uint64_t{1} << 22;
  uint64_t max_batch_tokens = uint64_t{1} << 23;
  int max_batch_items = 1024;
  uint64_t max_queue_requests = 1024;
  uint64_t max_queue_tokens = uint64_t{1} << 24;
  // From acceptance (or, after a lost worker, from the return to the queue) to the start.
  absl::Duration max_queue_wait = absl::Minutes(10);
  // How long a request waits for workers that are not there.
  absl::Duration worker_wait = absl::Seconds(30);

  // Planning.
  uint64_t context_parallel_min_tokens = 2048;
  // How long the head of the queue keeps idle workers waiting for busy ones before it takes fewer of them.
  absl::Duration reserve_wait = absl::Seconds(10);
  uint32_t max_epochs = 4;

  // Workers. One is lost after three and a half intervals of silence.
  absl::Duration heartbeat_interval = absl::Seconds(1);
  // How long a rank may take to answer an abort before it is disconnected.
  absl::Duration abort_wait = absl::Seconds(10);

  // Decode nodes. Where they may be; empty: anywhere that CheckPeerAddress() takes.
  std::vector<AddressRange> decode_ranges = {};
  // How long one may be away before its requests fail.
  absl::Duration decode_grace = absl::Seconds(30);
  absl::Duration decode_retry_interval = absl::Milliseconds(250);
  absl::Duration open_timeout = absl::Seconds(10);
  absl::Duration commit_timeout = absl::Seconds(30);
  absl::Duration abort_session_timeout = absl::Seconds(5);
  absl::Duration abort_away_timeout = absl::Milliseconds(500);  // at a node that is not connected

  // Clients.
  absl::Duration progress_interval = absl::Milliseconds(100);
  // Idempotency: how long, and how many, ended requests are remembered.
  absl::Duration retention = absl::Minutes(10);
  size_t max_retained = 100'000;
  // Of the timelines of ended requests.
  uint64_t trace_memory = uint64_t{64} << 20;
};

}  // namespace headwater

#endif  // HW_COORDINATOR_OPTIONS_H_
