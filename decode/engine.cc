#include "decode/engine.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include <sched.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kernels/ops/linear.h"

namespace headwater {
namespace {

constexpr uint32_t kMaxNewTokens = 65536;
constexpr size_t kMaxSessionIdBytes = 256;
constexpr int kMaxStopTokens = 256;
constexpr size_t kMaxPendingReleases = 1024;
constexpr auto kSweepInterval = std::chrono::seconds(1);

void SetDuration(absl::Duration from, google::protobuf::Duration* to) {
  const int64_t nanos = absl::ToInt64Nanoseconds(from);
  to->set_seconds(nanos / 1'000'000'000);
  to->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
}

int NumCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

absl::Status BadField(absl::string_view field, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD, message,
                   {{"field", std::string(field)}});
}

absl::Status CheckSessionId(absl::string_view session_id) {
  if (session_id.empty()) return BadField("session_id", "session_id is empty");
  if (session_id.size() > kMaxSessionIdBytes) {
    return BadField("session_id", absl::StrCat("session_id has ", session_id.size(), " bytes, the limit is ",
                                               kMaxSessionIdBytes));
  }
  return absl::OkStatus();
}

absl::Status CheckRequest(const v1::GenerateRequest& request) {
  HW_RETURN_IF_ERROR(CheckSessionId(request.session_id()));
  if (request.max_new_tokens() < 1 || request.max_new_tokens() > kMaxNewTokens) {
    return BadField("max_new_tokens", absl::StrCat("max_new_tokens ", request.max_new_tokens(),
                                                   " is not in 1..", kMaxNewTokens));
  }
  if (request.stop_token_ids_size() > kMaxStopTokens) {
    return BadField("stop_token_ids", absl::StrCat(request.stop_token_ids_size(),
                                                   " stop_token_ids are more than ", kMaxStopTokens));
  }
  return absl::OkStatus();
}

absl::Status DrainingError() {
  return MakeError(absl::StatusCode::kUnavailable, v1::ERROR_REASON_DRAINING,
                   "this decode node is shutting down");
}

}  // namespace

// Fields without a word are fixed at the start or the engine thread's own.
struct GenerationEngine::Generation {
  enum class Turn { kReady, kRunning, kResting };

  uint64_t id = 0;
  v1::GenerateRequest request;
  GenerationSink* sink = nullptr;
  absl::Time started;
  std::shared_ptr<const CommittedKv> kv;  // null before its first turn
  uint32_t tokens_given = 0;
  Turn turn = Turn::kReady;  // guarded by mutex_
  bool room_again = false;   // guarded by mutex_: Resume() came while running
  absl::Status ended_by;     // guarded by mutex_: why it must end; OK: it need not
};

absl::StatusOr<std::unique_ptr<GenerationEngine>> GenerationEngine::Create(const Options& options) {
  HW_ASSIGN_OR_RETURN(std::unique_ptr<Generator> generator, Generator::Create(options.model));
  return absl::WrapUnique(new GenerationEngine(options, std::move(generator)));
}

GenerationEngine::GenerationEngine(const Options& options, std::unique_ptr<Generator> generator)
    : options_(options),
      budget_(options.generated_kv_bytes),
      generator_(std::move(generator)),
      next_sweep_(options.clock->Now()),
      tokens_total_(options.metrics->Counter("headwater_decode_tokens_total", "Tokens given out.")),
      token_seconds_(options.metrics->Seconds("headwater_decode_token_seconds",
                                              "Compute time of one generated token.")) {
  thread_ = std::thread([this] { Run(); });
}

GenerationEngine::~GenerationEngine() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    draining_ = true;
    stopping_ = true;
  }
  work_.notify_all();
  thread_.join();
}

absl::StatusOr<uint64_t> GenerationEngine::Start(const v1::GenerateRequest& request, GenerationSink* sink) {
  HW_RETURN_IF_ERROR(CheckRequest(request));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (draining_) return DrainingError();
  if (by_session_.count(request.session_id()) > 0) {
    return MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_SESSION_BUSY,
                     absl::StrCat("session ", request.session_id(), " has a Generate call already"));
  }
  if (generations_.size() >= options_.max_generations) {
    return WithRetryAfter(
        MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                  absl::StrCat(generations_.size(), " generations are under way, the limit is ",
                               options_.max_generations),
                  {{"limit", absl::StrCat(options_.max_generations)}}),
        absl::Seconds(1));
  }
  auto generation = std::make_shared<Generation>();
  generation->id = next_id_++;
  generation->request = request;
  generation->sink = sink;
  generation->started = options_.clock->Now();
  generations_[generation->id] = generation;
  by_session_[request.session_id()] = generation;
  ready_.push_back(generation);
  work_.notify_one();
  return generation->id;
}

void GenerationEngine::Cancel(uint64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = generations_.find(id);
  if (found == generations_.end()) return;
  Generation& generation = *found->second;
  if (generation.ended_by.ok()) {
    generation.ended_by = MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED,
                                    "the caller cancelled the generation");
  }
  if (generation.turn == Generation::Turn::kResting) {
    generation.turn = Generation::Turn::kReady;
    ready_.push_back(found->second);
  }
  work_.notify_one();
}

void GenerationEngine::Resume(uint64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = generations_.find(id);
  if (found == generations_.end()) return;
  Generation& generation = *found->second;
  generation.room_again = true;
  if (generation.turn != Generation::Turn::kResting) return;
  generation.turn = Generation::Turn::kReady;
  ready_.push_back(found->second);
  work_.notify_one();
}

absl::Status GenerationEngine::Release(absl::string_view session_id, std::function<void(uint64_t)> done) {
  HW_RETURN_IF_ERROR(CheckSessionId(session_id));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (releases_.size() >= kMaxPendingReleases) {
    return WithRetryAfter(MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_QUEUE_FULL,
                                    absl::StrCat(kMaxPendingReleases, " releases wait already")),
                          absl::Seconds(1));
  }
  releases_.push_back({std::string(session_id), std::move(done)});
  work_.notify_one();
  return absl::OkStatus();
}

void GenerationEngine::Drain() {
  const std::lock_guard<std::mutex> lock(mutex_);
  draining_ = true;
}

bool GenerationEngine::WaitIdle(absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return idle_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return generations_.empty(); });
}

uint32_t GenerationEngine::num_generations() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<uint32_t>(generations_.size());
}

bool GenerationEngine::NextWork(std::shared_ptr<Generation>* generation, PendingRelease* release) {
  std::unique_lock<std::mutex> lock(mutex_);
  work_.wait_for(lock, kSweepInterval, [this] { return stopping_ || !ready_.empty() || !releases_.empty(); });
  if (!releases_.empty()) {
    *release = std::move(releases_.front());
    releases_.pop_front();
    return true;
  }
  if (stopping_) return false;
  if (!ready_.empty()) {
    *generation = std::move(ready_.front());
    ready_.pop_front();
    (*generation)->turn = Generation::Turn::kRunning;
    (*generation)->room_again = false;
  }
  return true;
}

void GenerationEngine::Run() {
  kernels::SetNumThreads(options_.num_threads > 0 ? options_.num_threads : NumCpus());
  while (true) {
    std::shared_ptr<Generation> generation;
    PendingRelease release;
    if (!NextWork(&generation, &release)) break;
    if (release.done != nullptr) ReleaseNow(release);
    if (generation != nullptr) Step(generation);
    if (options_.clock->Now() >= next_sweep_) DropIdleSessions();
  }
  std::vector<std::shared_ptr<Generation>> left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [id, generation] : generations_) left.push_back(generation);
  }
  for (const auto& generation : left) End(generation, DrainingError());
}

void GenerationEngine::Step(const std::shared_ptr<Generation>& generation) {
  absl::Status status;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    status = generation->ended_by;
  }
  if (status.ok() && generation->kv == nullptr) status = Attach(generation.get());
  if (!status.ok()) return End(generation, status);
  const absl::StatusOr<v1::GenerateResponse> token = NextToken(generation.get());
  if (!token.ok()) return End(generation, token.status());
  const bool room = generation->sink->OnToken(*token);
  if (token->finish_reason() != v1::FINISH_REASON_UNSPECIFIED) return End(generation, absl::OkStatus());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (room || generation->room_again || !generation->ended_by.ok()) {
    generation->turn = Generation::Turn::kReady;
    ready_.push_back(generation);
  } else {
    generation->turn = Generation::Turn::kResting;
  }
}

absl::Status GenerationEngine::Attach(Generation* generation) {
  const std::string& id = generation->request.session_id();
  absl::StatusOr<std::shared_ptr<const CommittedKv>> kv = options_.store->Acquire(id);
  if (!kv.ok()) {
    sessions_.erase(id);
    return kv.status();
  }
  const auto found = sessions_.find(id);
  if (found == sessions_.end() || !found->second.sequence->Continues(**kv)) {
    HW_ASSIGN_OR_RETURN(std::unique_ptr<Sequence> sequence, generator_->Begin(**kv, &budget_));
    sessions_[id].sequence = std::move(sequence);
  }
  sessions_[id].in_use = true;
  generation->kv = *std::move(kv);
  return absl::OkStatus();
}

absl::StatusOr<v1::GenerateResponse> GenerationEngine::NextToken(Generation* generation) {
  const v1::GenerateRequest& request = generation->request;
  Sequence* const sequence = sessions_.at(request.session_id()).sequence.get();
  const bool computes = sequence->tokens_given() > 0;
  const absl::Time before = options_.clock->Now();
  HW_ASSIGN_OR_RETURN(const GeneratedToken next, generator_->Next(*generation->kv, sequence));
  const absl::Time after = options_.clock->Now();
  if (computes) token_seconds_.Observe(absl::ToDoubleSeconds(after - before));
  tokens_total_.Increment();
  ++generation->tokens_given;

  v1::GenerateResponse response;
  response.set_token_id(static_cast<uint32_t>(next.token));
  response.set_position(static_cast<uint64_t>(next.position));
  response.set_top2_logit_gap(next.top2_logit_gap);
  SetDuration(after - generation->started, response.mutable_elapsed());
  const auto& stops = request.stop_token_ids();
  if (std::find(stops.begin(), stops.end(), response.token_id()) != stops.end()) {
    response.set_finish_reason(v1::FINISH_REASON_STOP);
  } else if (next.is_last_position) {
    response.set_finish_reason(v1::FINISH_REASON_CONTEXT);
  } else if (generation->tokens_given >= request.max_new_tokens()) {
    response.set_finish_reason(v1::FINISH_REASON_LENGTH);
  }
  return response;
}

void GenerationEngine::End(const std::shared_ptr<Generation>& generation, const absl::Status& status) {
  const std::string& session_id = generation->request.session_id();
  if (generation->kv != nullptr) {
    // Held any longer, the cache would never reach the end of its lease.
    generation->kv = nullptr;
    Session& session = sessions_.at(session_id);
    session.in_use = false;
    session.idle_since = options_.clock->Now();
  }
  GenerationSink* const sink = generation->sink;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    generations_.erase(generation->id);
    by_session_.erase(session_id);
    ready_.erase(std::remove(ready_.begin(), ready_.end(), generation), ready_.end());
  }
  sink->OnDone(status);
  idle_.notify_all();
}

void GenerationEngine::ReleaseNow(const PendingRelease& release) {
  std::shared_ptr<Generation> user;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_session_.find(release.session_id);
    if (found != by_session_.end()) user = found->second;
  }
  if (user != nullptr) {
    End(user, MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION,
                        absl::StrCat("session ", release.session_id, " was released")));
  }
  uint64_t bytes = 0;
  const auto session = sessions_.find(release.session_id);
  if (session != sessions_.end()) {
    bytes += session->second.sequence->generated_bytes();
    sessions_.erase(session);
  }
  bytes += options_.store->Release(release.session_id);
  release.done(bytes);
}

void GenerationEngine::DropIdleSessions() {
  const absl::Time now = options_.clock->Now();
  next_sweep_ = now + absl::FromChrono(kSweepInterval);
  for (auto it = sessions_.begin(); it != sessions_.end();) {
    const bool drop = !it->second.in_use && now - it->second.idle_since >= options_.lease;
    it = drop ? sessions_.erase(it) : std::next(it);
  }
}

}  // namespace headwater
