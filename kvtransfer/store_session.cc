#include "kvtransfer/store_session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include <openssl/crypto.h>

#include "base/rpc/epoch_token.h"
#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

// A copy takes milliseconds; only a storage that hangs makes it longer.
constexpr std::chrono::seconds kCopyDeadline(10);

absl::Status StaleEpoch(uint32_t got, uint32_t current) {
  return MakeError(absl::StatusCode::kAborted, v1::ERROR_REASON_STALE_EPOCH,
                   absl::StrCat("epoch ", got, " is over: the session is in epoch ", current),
                   {{"epoch", absl::StrCat(got)}, {"current", absl::StrCat(current)}});
}

absl::Status BadField(absl::string_view field, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, v1::ERROR_REASON_BAD_FIELD, message,
                   {{"field", std::string(field)}});
}

absl::Status CheckEqual(absl::string_view token, absl::string_view wanted) {
  if (token.size() == wanted.size() && CRYPTO_memcmp(token.data(), wanted.data(), wanted.size()) == 0) {
    return absl::OkStatus();
  }
  return MakeError(absl::StatusCode::kPermissionDenied, v1::ERROR_REASON_BAD_FIELD,
                   "session_token is not this session's", {{"field", "session_token"}});
}

bool ParseBlock(const v1::KvBlock& block, const KvGeometry& geometry, uint64_t payload_bytes, KvBlockId* id,
                std::string* error) {
  id->layer = block.layer();
  id->kind = block.kind() == v1::KV_KIND_V ? KvKind::kV : KvKind::kK;
  id->token_begin = block.token_begin();
  id->token_end = block.token_end();
  const v1::KvLayout& layout = geometry.layout();
  if (block.kind() != v1::KV_KIND_K && block.kind() != v1::KV_KIND_V) {
    *error = absl::StrCat("block kind ", static_cast<int>(block.kind()), " is neither K nor V");
  } else if (block.head_begin() != 0 || block.head_end() != layout.num_kv_heads()) {
    *error = absl::StrCat("heads [", block.head_begin(), ", ", block.head_end(),
                          ") are not the session's [0, ", layout.num_kv_heads(), ")");
  } else if (!geometry.Contains(*id)) {
    *error = absl::StrCat(BlockName(*id), " is no block of a cache of ", layout.num_layers(), " layers, ",
                          layout.num_tokens(), " tokens in blocks of ", layout.block_tokens());
  } else if (payload_bytes != geometry.BytesOf(*id)) {
    *error =
        absl::StrCat(BlockName(*id), " came with ", payload_bytes, " bytes, needs ", geometry.BytesOf(*id));
  } else {
    return true;
  }
  return false;
}

// Difference of the two best log-probabilities; 0: fewer than two, or not finite.
float Top2Gap(const v1::CommitSessionRequest& request) {
  std::vector<float> best;
  for (const v1::TokenLogprob& candidate : request.top_logprobs()) {
    if (!std::isfinite(candidate.logprob())) return 0;
    best.push_back(candidate.logprob());
  }
  if (best.size() < 2) return 0;
  std::partial_sort(best.begin(), best.begin() + 2, best.end(), std::greater<float>());
  return best[0] - best[1];
}

absl::StatusOr<CommitRecord> ParseCommit(const v1::CommitSessionRequest& request,
                                         const KvGeometry& geometry) {
  CommitRecord record;
  if (!KvDigest::FromBytes(request.kv_digest(), &record.digest)) {
    return BadField("kv_digest",
                    absl::StrCat("kv_digest has ", request.kv_digest().size(), " bytes, not 16"));
  }
  const uint64_t tokens = geometry.layout().num_tokens();
  if (static_cast<uint64_t>(request.token_ids_size()) != tokens) {
    return BadField("token_ids", absl::StrCat("the commit has ", request.token_ids_size(),
                                              " token ids, the layout ", tokens));
  }
  if (request.first_token() > INT32_MAX) {
    return BadField("first_token",
                    absl::StrCat("first_token ", request.first_token(), " is over ", INT32_MAX));
  }
  record.prompt.reserve(tokens);
  for (const uint32_t token : request.token_ids()) {
    if (token > INT32_MAX) {
      return BadField("token_ids",
                      absl::StrCat("token id ", token, " at ", record.prompt.size(), " is over ", INT32_MAX));
    }
    record.prompt.push_back(static_cast<int32_t>(token));
  }
  record.first_token = static_cast<int32_t>(request.first_token());
  record.first_top2_gap = Top2Gap(request);
  return record;
}

}  // namespace

absl::Status UnknownSession(absl::string_view session_id) {
  return MakeError(absl::StatusCode::kNotFound, v1::ERROR_REASON_UNKNOWN_SESSION,
                   absl::StrCat("no KV session \"", session_id.substr(0, 128), "\" here"));
}

uint64_t KvBudget::used() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_;
}

bool KvBudget::Take(uint64_t bytes, bool force, uint64_t* available) {
  std::lock_guard<std::mutex> lock(mutex_);
  *available = limit_ - std::min(limit_, used_);
  if (bytes > *available && !force) return false;
  used_ += bytes;
  return true;
}

void KvBudget::Give(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  used_ -= bytes;
}

// Holds the session, and so its mapping.
class KvSession::Committed final : public CommittedKv {
 public:
  explicit Committed(std::shared_ptr<KvSession> session)
      : session_(std::move(session)), record_(session_->storage_->commit_record()) {}
  ~Committed() override {
    std::lock_guard<std::mutex> lock(session_->mutex_);
    --session_->readers_;
    session_->Touch();
  }
  const KvGeometry& geometry() const override { return session_->geometry(); }
  const void* Tensor(uint32_t layer, KvKind kind) const override {
    return session_->storage_->payload() + geometry().OffsetOf({layer, kind, 0, 0});
  }
  const std::vector<int32_t>& prompt() const override { return record_.prompt; }
  int32_t first_token() const override { return record_.first_token; }
  float first_top2_gap() const override { return record_.first_top2_gap; }

 private:
  const std::shared_ptr<KvSession> session_;
  const CommitRecord record_;
};

KvSession::KvSession(std::unique_ptr<SessionStorage> storage, std::unique_ptr<KvReservation> reservation,
                     const Clock* clock)
    : storage_(std::move(storage)),
      reservation_(std::move(reservation)),
      clock_(clock),
      last_used_(clock->Now()) {}

absl::Status KvSession::CheckToken(absl::string_view token) const {
  return CheckEqual(token, storage_->request().session_token());
}

absl::Status KvSession::CheckHelloToken(const v1::KvHello& hello) const {
  const v1::OpenSessionRequest& opened = storage_->request();
  // A session from before the node knew tokens of epochs has later epochs with them.
  if (!opened.epoch_tokens() && CheckToken(hello.session_token()).ok()) return absl::OkStatus();
  return CheckEqual(hello.session_token(),
                    EpochToken(opened.session_token(), opened.session_id(), hello.epoch()));
}

absl::Status KvSession::CheckEpoch(uint32_t epoch) const {
  const uint32_t current = storage_->epoch();
  if (epoch < current) return StaleEpoch(epoch, current);
  if (epoch > current) {
    return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_BAD_FIELD,
                     absl::StrCat("epoch ", epoch, " is not open: the session is in epoch ", current),
                     {{"field", "epoch"}, {"current", absl::StrCat(current)}});
  }
  return absl::OkStatus();
}

absl::Status KvSession::OpenAgain(const v1::OpenSessionRequest& request) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return UnknownSession(request.session_id());
  if (request.epoch() < storage_->epoch()) return StaleEpoch(request.epoch(), storage_->epoch());
  if (request.layout().SerializeAsString() != geometry().layout().SerializeAsString()) {
    return BadField("layout", "the layout is not the one that the session was opened with");
  }
  Touch();
  if (request.epoch() == storage_->epoch()) return absl::OkStatus();
  if (request.resume_layer() > geometry().layout().num_layers()) {
    return BadField("resume_layer", absl::StrCat("resume_layer ", request.resume_layer(),
                                                 " is over num_layers ", geometry().layout().num_layers()));
  }
  if (readers_ > 0) {
    return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_STALE_EPOCH,
                     "the session is committed and in use; it takes no new epoch");
  }
  if (changing_epoch_) return absl::UnavailableError("another epoch of the session is being opened");
  changing_epoch_ = true;
  const bool idle = changed_.wait_for(lock, kCopyDeadline, [&] { return writing_.empty(); });
  const absl::Status status = idle ? storage_->SetEpoch(request.epoch(), request.resume_layer())
                                   : absl::UnavailableError("blocks of the old epoch are still being copied");
  changing_epoch_ = false;
  changed_.notify_all();
  return status;
}

absl::StatusOr<v1::KvSessionState> KvSession::Hello(const v1::KvHello& hello) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return UnknownSession(hello.session_id());
  HW_RETURN_IF_ERROR(CheckHelloToken(hello));
  HW_RETURN_IF_ERROR(CheckEpoch(hello.epoch()));
  Touch();
  v1::KvSessionState state;
  state.set_epoch(storage_->epoch());
  std::string bits((geometry().num_blocks() + 7) / 8, '\0');
  bool any = false;
  for (uint64_t i = 0; i < geometry().num_blocks(); ++i) {
    if (!storage_->IsStored(i)) continue;
    bits[i / 8] = static_cast<char>(static_cast<unsigned char>(bits[i / 8]) | 1u << (i % 8));
    any = true;
  }
  if (any) state.set_stored_blocks(std::move(bits));
  return state;
}

// Waits until the block may be copied and claims it. False: `result` says what to answer instead.
bool KvSession::BeginWrite(std::unique_lock<std::mutex>& lock, const v1::KvBlock& block, uint64_t index,
                           PutResult* result, std::string* error) {
  const auto free_to_look = [&] {
    return !changing_epoch_ && std::find(writing_.begin(), writing_.end(), index) == writing_.end();
  };
  if (!changed_.wait_for(lock, kCopyDeadline, free_to_look)) {
    *result = PutResult::kCorrupt;
    *error = "the block is still being copied by another stream";
    return false;
  }
  *result = PutResult::kRefused;
  if (closed_) {
    *error = "the session has ended";
    return false;
  }
  if (const absl::Status epoch = CheckEpoch(block.epoch()); !epoch.ok()) {
    if (block.epoch() < storage_->epoch()) *result = PutResult::kStaleEpoch;
    *error = std::string(epoch.message());
    return false;
  }
  Touch();
  uint32_t stored_crc = 0;
  if (storage_->BlockCrc(index, &stored_crc)) {
    if (stored_crc == block.crc32c()) {
      *result = PutResult::kAlreadyStored;
    } else {
      *error = absl::StrCat(BlockName(geometry().BlockAt(index)), " is stored with another CRC");
    }
    return false;
  }
  writing_.push_back(index);
  return true;
}

PutResult KvSession::Put(const v1::KvBlock& block, const std::vector<absl::string_view>& payload,
                         uint64_t* block_index, std::string* error) {
  uint64_t payload_bytes = 0;
  for (const absl::string_view piece : payload) payload_bytes += piece.size();
  KvBlockId id;
  std::unique_lock<std::mutex> lock(mutex_);
  // A late block of an epoch that is over is stale, whatever else is wrong with it.
  const bool stale = block.epoch() < storage_->epoch();
  if (!ParseBlock(block, geometry(), payload_bytes, &id, error)) return PutResult::kRefused;
  *block_index = geometry().IndexOf(id);
  PutResult result = PutResult::kRefused;
  if (stale || !BeginWrite(lock, block, *block_index, &result, error)) {
    if (!stale) return result;
    *error = std::string(CheckEpoch(block.epoch()).message());
    return PutResult::kStaleEpoch;
  }
  lock.unlock();
  const absl::StatusOr<uint32_t> crc = storage_->Take(id, payload);
  lock.lock();
  writing_.erase(std::find(writing_.begin(), writing_.end(), *block_index));
  changed_.notify_all();
  if (!crc.ok()) {
    *error = std::string(crc.status().message());
    return PutResult::kRefused;
  }
  result = *crc == block.crc32c() ? PutResult::kStored : PutResult::kCorrupt;
  if (result == PutResult::kStored) storage_->MarkStored(*block_index, *crc);
  return result;
}

absl::StatusOr<v1::CommitSessionResponse> KvSession::Commit(const v1::CommitSessionRequest& request) {
  HW_ASSIGN_OR_RETURN(const CommitRecord record, ParseCommit(request, geometry()));
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return UnknownSession(request.session_id());
  HW_RETURN_IF_ERROR(CheckEpoch(request.epoch()));
  if (changing_epoch_) return absl::UnavailableError("another epoch of the session is being opened");
  Touch();
  const uint64_t missing = geometry().num_blocks() - storage_->CountStored();
  if (missing > 0) {
    return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_SESSION_NOT_COMMITTED,
                     absl::StrCat(missing, " of ", geometry().num_blocks(), " blocks are missing"),
                     {{"missing", absl::StrCat(missing)}, {"blocks", absl::StrCat(geometry().num_blocks())}});
  }
  const KvDigest digest = storage_->Digest();
  if (!(digest == record.digest)) {
    return MakeError(
        absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT,
        absl::StrCat("the KV digest here is ", digest.Hex(), ", the sender's ", record.digest.Hex()),
        {{"stored", digest.Hex()}, {"sent", record.digest.Hex()}});
  }
  if (!storage_->committed()) HW_RETURN_IF_ERROR(storage_->Commit(record));
  v1::CommitSessionResponse response;
  response.set_blocks_verified(geometry().num_blocks());
  response.set_bytes_stored(storage_->payload() == nullptr ? 0 : geometry().total_bytes());
  return response;
}

absl::StatusOr<std::shared_ptr<const CommittedKv>> KvSession::Acquire() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return UnknownSession(storage_->request().session_id());
    if (changing_epoch_ || !storage_->committed()) {
      return MakeError(
          absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_SESSION_NOT_COMMITTED,
          absl::StrCat("KV session \"", storage_->request().session_id(), "\" is not committed"));
    }
    if (storage_->payload() == nullptr) {
      return MakeError(absl::StatusCode::kFailedPrecondition, v1::ERROR_REASON_BAD_FIELD,
                       absl::StrCat("KV session \"", storage_->request().session_id(),
                                    "\" was verified and its blocks dropped: this node has --sink=verify"),
                       {{"field", "session_id"}, {"sink", "verify"}});
    }
    ++readers_;
    Touch();
  }
  return std::shared_ptr<const CommittedKv>(new Committed(shared_from_this()));
}

bool KvSession::Expired(absl::Duration lease) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return readers_ == 0 && writing_.empty() && clock_->Now() - last_used_ > lease;
}

bool KvSession::Close() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return false;
  closed_ = true;
  // On a timeout the copy goes on into memory that this object still holds, and is refused at its end.
  changed_.wait_for(lock, kCopyDeadline, [&] { return writing_.empty() && !changing_epoch_; });
  storage_->Unlink();
  return true;
}

}  // namespace headwater
