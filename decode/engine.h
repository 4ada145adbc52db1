// GenerationEngine: runs the generations of all sessions on one thread, a token of each in turn.
#ifndef HW_DECODE_ENGINE_H_
#define HW_DECODE_ENGINE_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "base/clock.h"
#include "base/metrics.h"
#include "decode/generator.h"
#include "headwater/v1/decode.pb.h"
#include "kvtransfer/store.h"
#include "model/model.h"

namespace headwater {

// Where one generation's tokens go. Called on the engine's thread, one call at a time; must not wait.
class GenerationSink {
 public:
  virtual ~GenerationSink() = default;
  // False: full. The token is taken, but the generation rests until GenerationEngine::Resume().
  virtual bool OnToken(const v1::GenerateResponse& token) = 0;
  // Last call; the engine does not touch the sink any more. OK after the token with the finish reason.
  virtual void OnDone(const absl::Status& status) = 0;
};

// Thread-safe. The thread's OpenMP team does the compute, so one token of one session is computed at a time.
// A session's generated KV stays between calls until the session is released or idle for the lease.
class GenerationEngine {
 public:
  struct Options {
    const Model* model = nullptr;  // must outlive the engine
    KvStore* store = nullptr;      // must outlive the engine
    Metrics* metrics = nullptr;    // must outlive the engine
    const Clock* clock = Clock::Real();
    // For the KV of generated tokens, over all sessions.
    uint64_t generated_kv_bytes = 0;
    // Generations under way or waiting for their turn; more are refused.
    uint32_t max_generations = 64;
    // How long the KV of a session's generated tokens outlives the last call; the store's lease.
    absl::Duration lease = absl::Minutes(5);
    // Size of the OpenMP team; 0: the process's CPUs.
    int num_threads = 0;
  };

  static absl::StatusOr<std::unique_ptr<GenerationEngine>> Create(const Options& options);
  // Ends all generations with UNAVAILABLE, DRAINING and answers all releases.
  ~GenerationEngine();
  GenerationEngine(const GenerationEngine&) = delete;
  GenerationEngine& operator=(const GenerationEngine&) = delete;

  // Takes a call and returns its id; unless it fails, `sink` gets tokens and one OnDone(), perhaps before
  // this returns. INVALID_ARGUMENT, BAD_FIELD: max_new_tokens outside 1..65536, over 256 stop ids, a session
  // id that is empty or over 256 bytes; ABORTED, SESSION_BUSY: the session has a call; RESOURCE_EXHAUSTED,
  // QUEUE_FULL: max_generations; UNAVAILABLE, DRAINING. Through the sink come: NOT_FOUND, UNKNOWN_SESSION
  // (also when the session is released meanwhile); FAILED_PRECONDITION, SESSION_NOT_COMMITTED, or BAD_FIELD
  // where the store verifies caches and keeps none; what Generator::Next() returns.
  absl::StatusOr<uint64_t> Start(const v1::GenerateRequest& request, GenerationSink* sink);
  // Ends a call with CANCELLED within one token; unknown ids are no error.
  void Cancel(uint64_t id);
  // The sink of that call has room again.
  void Resume(uint64_t id);

  // Frees a session: ends its call first if there is one. `done` runs once, on the engine's thread, with the
  // bytes reclaimed when they are. INVALID_ARGUMENT, BAD_FIELD: as for Start(); RESOURCE_EXHAUSTED,
  // QUEUE_FULL (and `done` never runs): 1024 releases wait.
  absl::Status Release(absl::string_view session_id, std::function<void(uint64_t)> done);

  // Refuses new calls from now on.
  void Drain();
  // Waits until no call is left; false: `timeout` passed.
  bool WaitIdle(absl::Duration timeout);

  uint32_t num_generations() const;
  uint64_t generated_kv_bytes() const { return budget_.used_bytes(); }

 private:
  struct Generation;
  struct Session {
    std::unique_ptr<Sequence> sequence;
    bool in_use = false;
    absl::Time idle_since;
  };
  struct PendingRelease {
    std::string session_id;
    std::function<void(uint64_t)> done;
  };

  GenerationEngine(const Options& options, std::unique_ptr<Generator> generator);
  void Run();
  // Waits for something to do; false: stop. Sets at most one of the two.
  bool NextWork(std::shared_ptr<Generation>* generation, PendingRelease* release);
  void Step(const std::shared_ptr<Generation>& generation);
  absl::Status Attach(Generation* generation);
  absl::StatusOr<v1::GenerateResponse> NextToken(Generation* generation);
  void End(const std::shared_ptr<Generation>& generation, const absl::Status& status);
  void ReleaseNow(const PendingRelease& release);
  void DropIdleSessions();

  const Options options_;
  GeneratedKvBudget budget_;
  const std::unique_ptr<Generator> generator_;  // the engine thread's
  std::map<std::string, Session> sessions_;     // the engine thread's
  absl::Time next_sweep_;                       // the engine thread's
  prometheus::Counter& tokens_total_;
  prometheus::Histogram& token_seconds_;

  mutable std::mutex mutex_;
  std::condition_variable work_;  // ready_, releases_ or stopping_ changed
  std::condition_variable idle_;  // generations_ became empty
  // All below: guarded by mutex_.
  uint64_t next_id_ = 1;
  std::map<uint64_t, std::shared_ptr<Generation>> generations_;
  std::map<std::string, std::shared_ptr<Generation>> by_session_;
  std::deque<std::shared_ptr<Generation>> ready_;
  std::deque<PendingRelease> releases_;
  bool draining_ = false;
  bool stopping_ = false;

  std::thread thread_;
};

}  // namespace headwater

#endif  // HW_DECODE_ENGINE_H_
