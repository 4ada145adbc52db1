#include "kvtransfer/store.h"

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kvtransfer/session_files.h"
#include "kvtransfer/session_verifier.h"
#include "kvtransfer/store_directory.h"
#include "kvtransfer/store_session.h"

namespace headwater {
namespace {

constexpr size_t kMaxNameBytes = 256;

absl::Status BadField(absl::string_view field, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD, message,
                   {{"field", std::string(field)}});
}

absl::Status CheckName(absl::string_view field, absl::string_view value, size_t least) {
  if (value.size() >= least && value.size() <= kMaxNameBytes) return absl::OkStatus();
  return BadField(
      field, absl::StrCat(field, " has ", value.size(), " bytes, not in [", least, ", ", kMaxNameBytes, "]"));
}

class SessionStore final : public KvStore {
 public:
  explicit SessionStore(const KvStoreOptions& options)
      : options_(options), budget_(std::make_shared<KvBudget>(options.budget_bytes)) {}

  absl::Status Start();

  absl::StatusOr<uint64_t> OpenSession(const v1::OpenSessionRequest& request) override;
  absl::StatusOr<v1::KvSessionState> Hello(const v1::KvHello& hello, KvGeometry* geometry) override;
  PutResult Put(absl::string_view session_id, const v1::KvBlock& block,
                const std::vector<absl::string_view>& payload, uint64_t* block_index,
                std::string* error) override;
  absl::StatusOr<v1::CommitSessionResponse> Commit(const v1::CommitSessionRequest& request) override;
  absl::StatusOr<uint64_t> Abort(const v1::AbortSessionRequest& request) override;
  absl::StatusOr<std::shared_ptr<const CommittedKv>> Acquire(absl::string_view session_id) override;
  uint64_t Release(absl::string_view session_id) override;
  int ExpireLeases() override;
  Usage usage() const override;
  KvSink sink() const override { return options_.sink; }

 private:
  // Of the budget: the payload, or what is kept instead.
  uint64_t BytesOf(const KvGeometry& geometry) const {
    return sink() == KvSink::kVerify ? SessionVerifier::MemoryBytes(geometry) : geometry.total_bytes();
  }
  absl::StatusOr<std::unique_ptr<SessionStorage>> MakeStorage(const v1::OpenSessionRequest& request,
                                                              const KvGeometry& geometry) const;
  absl::Status RecoverSession(const std::string& name);
  std::shared_ptr<KvSession> Find(absl::string_view session_id) const;
  absl::StatusOr<std::shared_ptr<KvSession>> FindWithToken(absl::string_view session_id,
                                                           absl::string_view token) const;
  absl::Status CheckNew(const v1::OpenSessionRequest& request) const;
  absl::StatusOr<std::unique_ptr<KvReservation>> Reserve(const KvGeometry& geometry);
  absl::StatusOr<uint64_t> Create(const v1::OpenSessionRequest& request, const KvGeometry& geometry);
  uint64_t Drop(absl::string_view session_id, const std::shared_ptr<KvSession>& session);

  const KvStoreOptions options_;
  const std::shared_ptr<KvBudget> budget_;
  // Outlives the sessions, so that no other process takes their files over. Null with KvSink::kVerify.
  std::unique_ptr<StoreDirectory> directory_;

  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<KvSession>, std::less<>> sessions_;
  // Sessions whose storage is being made or removed outside the mutex.
  std::set<std::string, std::less<>> busy_;
};

absl::Status SessionStore::Start() {
  if (options_.budget_bytes == 0) return BadField("budget_bytes", "the KV budget is 0 bytes");
  if (options_.max_sessions == 0) return BadField("max_sessions", "max_sessions is 0");
  if (sink() == KvSink::kVerify) return absl::OkStatus();
  if (options_.directory.empty()) return BadField("kv_dir", "kv_dir is empty");
  HW_ASSIGN_OR_RETURN(directory_, StoreDirectory::Open(options_.directory));
  HW_ASSIGN_OR_RETURN(const std::vector<std::string> names, directory_->TakeOver());
  for (const std::string& name : names) HW_RETURN_IF_ERROR(RecoverSession(name));
  return absl::OkStatus();
}

absl::Status SessionStore::RecoverSession(const std::string& name) {
  uint64_t dropped = 0;
  auto files = SessionFiles::Open(options_.directory, name, &dropped);
  if (!files.ok()) {
    if (absl::IsUnavailable(files.status())) return files.status();
    directory_->SetAside(name, files.status());
    return absl::OkStatus();
  }
  const v1::OpenSessionRequest& request = (*files)->request();
  const std::string& model = request.layout().model_fingerprint();
  if (!options_.model_fingerprint.empty() && model != options_.model_fingerprint) {
    HW_LOG(INFO).Field("request_id", request.request_id()) << "removed a KV session of another model";
    (*files)->Unlink();
    return absl::OkStatus();
  }
  if (dropped > 0) {
    HW_LOG(WARNING).Field("request_id", request.request_id())
        << dropped << " blocks of a KV session were damaged and are dropped";
  }
  const uint64_t bytes = (*files)->geometry().total_bytes();
  uint64_t available = 0;
  budget_->Take(bytes, true, &available);
  if (bytes > available) {
    HW_LOG(WARNING).Field("request_id", request.request_id())
        << "KV sessions of an earlier process pass the budget of " << options_.budget_bytes << " bytes";
  }
  auto reservation = std::make_unique<KvReservation>(budget_, bytes);
  const std::string id = request.session_id();
  sessions_[id] = std::make_shared<KvSession>(std::move(*files), std::move(reservation), options_.clock);
  return absl::OkStatus();
}

std::shared_ptr<KvSession> SessionStore::Find(absl::string_view session_id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = sessions_.find(session_id);
  return it == sessions_.end() ? nullptr : it->second;
}

absl::StatusOr<std::shared_ptr<KvSession>> SessionStore::FindWithToken(absl::string_view session_id,
                                                                       absl::string_view token) const {
  std::shared_ptr<KvSession> session = Find(session_id);
  if (session == nullptr) return UnknownSession(session_id);
  HW_RETURN_IF_ERROR(session->CheckToken(token));
  return session;
}

absl::Status SessionStore::CheckNew(const v1::OpenSessionRequest& request) const {
  HW_RETURN_IF_ERROR(CheckName("session_id", request.session_id(), 1));
  HW_RETURN_IF_ERROR(CheckName("session_token", request.session_token(), 1));
  HW_RETURN_IF_ERROR(CheckName("request_id", request.request_id(), 0));
  const std::string& model = request.layout().model_fingerprint();
  HW_RETURN_IF_ERROR(CheckName("model_fingerprint", model, 0));
  if (!options_.model_fingerprint.empty() && model != options_.model_fingerprint) {
    return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MODEL_MISMATCH,
                     absl::StrCat("the cache is of model \"", model, "\", this node serves \"",
                                  options_.model_fingerprint, "\""),
                     {{"asked", model}, {"serves", options_.model_fingerprint}});
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<KvReservation>> SessionStore::Reserve(const KvGeometry& geometry) {
  const uint64_t bytes = BytesOf(geometry);
  const std::string needs =
      sink() == KvSink::kVerify
          ? absl::StrCat("to verify a KV cache of ", geometry.num_blocks(), " blocks needs ", bytes, " bytes")
          : absl::StrCat("the KV cache needs ", bytes, " bytes");
  if (bytes > options_.budget_bytes) {
    return MakeError(
        absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_MEMORY_PLAN_TOO_LARGE,
        absl::StrCat(needs, ", this node's whole budget is ", options_.budget_bytes),
        {{"bytes_asked", absl::StrCat(bytes)}, {"bytes_available", absl::StrCat(options_.budget_bytes)}});
  }
  uint64_t available = 0;
  if (!budget_->Take(bytes, false, &available)) {
    return WithRetryAfter(
        MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL,
                  absl::StrCat(needs, ", ", available, " are free"),
                  {{"bytes_asked", absl::StrCat(bytes)}, {"bytes_available", absl::StrCat(available)}}),
        absl::Seconds(1));
  }
  return std::make_unique<KvReservation>(budget_, bytes);
}

absl::StatusOr<std::unique_ptr<SessionStorage>> SessionStore::MakeStorage(
    const v1::OpenSessionRequest& request, const KvGeometry& geometry) const {
  if (sink() == KvSink::kVerify) return SessionVerifier::Create(request, geometry);
  return SessionFiles::Create(options_.directory, request, geometry);
}

absl::StatusOr<uint64_t> SessionStore::OpenSession(const v1::OpenSessionRequest& request) {
  HW_RETURN_IF_ERROR(CheckNew(request));
  HW_ASSIGN_OR_RETURN(const KvGeometry geometry, KvGeometry::Create(request.layout()));
  if (const std::shared_ptr<KvSession> session = Find(request.session_id()); session != nullptr) {
    HW_RETURN_IF_ERROR(session->CheckToken(request.session_token()));
    HW_RETURN_IF_ERROR(session->OpenAgain(request));
    return BytesOf(geometry);
  }
  if (request.resume_layer() != 0) {
    // Nothing is here that could be gone on from; a session with a hole would be the result.
    return UnknownSession(request.session_id());
  }
  return Create(request, geometry);
}

absl::StatusOr<uint64_t> SessionStore::Create(const v1::OpenSessionRequest& request,
                                              const KvGeometry& geometry) {
  HW_ASSIGN_OR_RETURN(std::unique_ptr<KvReservation> reservation, Reserve(geometry));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (sessions_.count(request.session_id()) + busy_.count(request.session_id()) > 0) {
      return absl::UnavailableError("the session is being opened or freed by another call");
    }
    if (sessions_.size() + busy_.size() >= options_.max_sessions) {
      return WithRetryAfter(
          MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL,
                    absl::StrCat("all ", options_.max_sessions, " KV sessions of this node are in use"),
                    {{"max_sessions", absl::StrCat(options_.max_sessions)}}),
          absl::Seconds(1));
    }
    busy_.insert(request.session_id());
  }
  auto storage = MakeStorage(request, geometry);
  std::lock_guard<std::mutex> lock(mutex_);
  busy_.erase(request.session_id());
  HW_RETURN_IF_ERROR(storage.status());
  sessions_[request.session_id()] =
      std::make_shared<KvSession>(std::move(*storage), std::move(reservation), options_.clock);
  return BytesOf(geometry);
}

absl::StatusOr<v1::KvSessionState> SessionStore::Hello(const v1::KvHello& hello, KvGeometry* geometry) {
  const std::shared_ptr<KvSession> session = Find(hello.session_id());
  if (session == nullptr) return UnknownSession(hello.session_id());
  HW_ASSIGN_OR_RETURN(v1::KvSessionState state, session->Hello(hello));
  if (geometry != nullptr) *geometry = session->geometry();
  return state;
}

PutResult SessionStore::Put(absl::string_view session_id, const v1::KvBlock& block,
                            const std::vector<absl::string_view>& payload, uint64_t* block_index,
                            std::string* error) {
  const std::shared_ptr<KvSession> session = Find(session_id);
  if (session != nullptr) return session->Put(block, payload, block_index, error);
  *error = std::string(UnknownSession(session_id).message());
  return PutResult::kRefused;
}

absl::StatusOr<v1::CommitSessionResponse> SessionStore::Commit(const v1::CommitSessionRequest& request) {
  HW_ASSIGN_OR_RETURN(const auto session, FindWithToken(request.session_id(), request.session_token()));
  return session->Commit(request);
}

// Removes a session's storage before its name is free for another.
uint64_t SessionStore::Drop(absl::string_view session_id, const std::shared_ptr<KvSession>& session) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = sessions_.find(session_id);
    if (it == sessions_.end() || it->second != session) return 0;
    sessions_.erase(it);
    busy_.insert(std::string(session_id));
  }
  session->Close();
  std::lock_guard<std::mutex> lock(mutex_);
  busy_.erase(busy_.find(session_id));
  return BytesOf(session->geometry());
}

absl::StatusOr<uint64_t> SessionStore::Abort(const v1::AbortSessionRequest& request) {
  const std::shared_ptr<KvSession> session = Find(request.session_id());
  if (session == nullptr) return 0;
  HW_RETURN_IF_ERROR(session->CheckToken(request.session_token()));
  if (session->committed()) {
    return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_BAD_FIELD,
                     "the session is committed; Release frees it");
  }
  return Drop(request.session_id(), session);
}

absl::StatusOr<std::shared_ptr<const CommittedKv>> SessionStore::Acquire(absl::string_view session_id) {
  const std::shared_ptr<KvSession> session = Find(session_id);
  if (session == nullptr) return UnknownSession(session_id);
  return session->Acquire();
}

uint64_t SessionStore::Release(absl::string_view session_id) {
  const std::shared_ptr<KvSession> session = Find(session_id);
  return session == nullptr ? 0 : Drop(session_id, session);
}

int SessionStore::ExpireLeases() {
  std::vector<std::pair<std::string, std::shared_ptr<KvSession>>> sessions;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    sessions.assign(sessions_.begin(), sessions_.end());
  }
  int freed = 0;
  for (const auto& [id, session] : sessions) {
    const bool committed = session->committed();
    if (!session->Expired(options_.lease) || Drop(id, session) == 0) continue;
    ++freed;
    HW_LOG(INFO).Field("request_id", session->request_id())
        << "freed " << (committed ? "a committed" : "an uncommitted") << " KV session: unused for "
        << absl::FormatDuration(options_.lease);
  }
  return freed;
}

KvStore::Usage SessionStore::usage() const {
  Usage usage;
  usage.bytes = budget_->used();
  std::lock_guard<std::mutex> lock(mutex_);
  usage.sessions = static_cast<uint32_t>(sessions_.size());
  for (const auto& [id, session] : sessions_) {
    if (!session->committed()) continue;
    ++usage.committed;
    usage.committed_bytes += BytesOf(session->geometry());
  }
  return usage;
}

}  // namespace

absl::StatusOr<std::unique_ptr<KvStore>> KvStore::Open(const KvStoreOptions& options) {
  auto store = std::make_unique<SessionStore>(options);
  HW_RETURN_IF_ERROR(store->Start());
  return std::unique_ptr<KvStore>(std::move(store));
}

}  // namespace headwater
