#include "kvtransfer/session_files.h"

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include <fcntl.h>
#include <openssl/sha.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr char kMagic[8] = {'H', 'W', 'K', 'V', 'M', 'E', 'T', 'A'};
constexpr uint32_t kFormatVersion = 1;
constexpr uint64_t kPage = 4096;
constexpr uint64_t kTableOffset = 2 * kPage;
constexpr uint64_t kStateOpen = 1;
constexpr uint64_t kStateCommitted = 2;
// What stays in the second-level cache between the copy and the CRC.
constexpr uint64_t kCopyChunk = 64 << 10;

struct FixedPart {
  char magic[8];
  uint32_t version;
  uint32_t request_bytes;
  uint32_t request_crc;
  uint32_t reserved;
};

class ScopedFd {
 public:
  explicit ScopedFd(int fd) : fd_(fd) {}
  ~ScopedFd() {
    if (fd_ >= 0) close(fd_);
  }
  ScopedFd(const ScopedFd&) = delete;
  ScopedFd& operator=(const ScopedFd&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

uint64_t RoundUp(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

uint64_t PromptOffset(const KvGeometry& geometry) {
  return kTableOffset + RoundUp(geometry.num_blocks() * sizeof(uint64_t));
}

uint64_t MetaBytes(const KvGeometry& geometry) {
  return PromptOffset(geometry) + RoundUp(geometry.layout().num_tokens() * sizeof(uint32_t));
}

absl::Status SystemError(int error, absl::string_view what, const std::string& path, uint64_t bytes) {
  const std::string message = absl::StrCat(what, " ", path, " (", bytes, " bytes): ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == ENOMEM || error == EFBIG) {
    return MakeError(absl::StatusCode::kResourceExhausted, v1::ERROR_REASON_KV_MEMORY_FULL, message,
                     {{"bytes_asked", absl::StrCat(bytes)}});
  }
  return absl::UnavailableError(message);
}

absl::Status Corrupt(const std::string& path, absl::string_view what) {
  return MakeError(absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT, absl::StrCat(path, ": ", what));
}

// posix_fallocate rather than ftruncate: a full file system is then an error here, not a SIGBUS later.
absl::Status Allocate(int fd, uint64_t bytes, const std::string& path) {
  int error = EINTR;
  for (int i = 0; i < 100 && error == EINTR; ++i) error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  if (error != 0) return SystemError(error, "cannot allocate", path, bytes);
  return absl::OkStatus();
}

absl::Status CheckSize(int fd, uint64_t bytes, const std::string& path) {
  struct stat info = {};
  if (fstat(fd, &info) != 0) return SystemError(errno, "cannot stat", path, bytes);
  if (!S_ISREG(info.st_mode) || static_cast<uint64_t>(info.st_size) != bytes) {
    return Corrupt(path, absl::StrCat("it has ", info.st_size, " bytes, its layout needs ", bytes));
  }
  return absl::OkStatus();
}

absl::Status ReadFixedPart(int fd, const std::string& path, v1::OpenSessionRequest* request) {
  std::array<char, kPage> page;
  const ssize_t got = pread(fd, page.data(), page.size(), 0);
  if (got != static_cast<ssize_t>(page.size())) return Corrupt(path, "it is shorter than its fixed part");
  FixedPart fixed;
  std::memcpy(&fixed, page.data(), sizeof(fixed));
  if (std::memcmp(fixed.magic, kMagic, sizeof(kMagic)) != 0) return Corrupt(path, "its magic is wrong");
  if (fixed.version != kFormatVersion) {
    return Corrupt(path, absl::StrCat("its version is ", fixed.version, ", not ", kFormatVersion));
  }
  if (fixed.request_bytes > kPage - sizeof(fixed)) {
    return Corrupt(path, absl::StrCat("its request has ", fixed.request_bytes, " bytes, more than a page"));
  }
  const char* body = page.data() + sizeof(fixed);
  if (Crc32c(body, fixed.request_bytes) != fixed.request_crc)
    return Corrupt(path, "its request's CRC differs");
  if (!request->ParseFromArray(body, static_cast<int>(fixed.request_bytes))) {
    return Corrupt(path, "its request does not parse");
  }
  return absl::OkStatus();
}

// Copies the pieces to `to` and returns the CRC of what lies there.
uint32_t CopyAndChecksum(const std::vector<absl::string_view>& pieces, char* to) {
  uint32_t crc = 0;
  for (absl::string_view piece : pieces) {
    while (!piece.empty()) {
      const absl::string_view chunk = piece.substr(0, kCopyChunk);
      std::memcpy(to, chunk.data(), chunk.size());
      crc = ExtendCrc32c(crc, to, chunk.size());
      to += chunk.size();
      piece.remove_prefix(chunk.size());
    }
  }
  return crc;
}

uint32_t CommitCrc(const KvDigest& digest, uint32_t first_token, float gap, const uint32_t* prompt,
                   uint64_t tokens) {
  const std::string bytes = digest.Bytes();
  uint32_t crc = Crc32c(bytes.data(), bytes.size());
  crc = ExtendCrc32c(crc, &first_token, sizeof(first_token));
  crc = ExtendCrc32c(crc, &gap, sizeof(gap));
  return ExtendCrc32c(crc, prompt, tokens * sizeof(uint32_t));
}

}  // namespace

// At kPage. `epoch` and `state` are read and written atomically.
struct SessionFiles::MutablePart {
  uint64_t epoch;
  uint64_t state;
  char digest[16];
  uint32_t first_token;
  float first_top2_gap;
  uint32_t commit_crc;
};

FileMapping::~FileMapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

absl::Status FileMapping::Map(int fd, uint64_t bytes, const std::string& path) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return SystemError(errno, "cannot map", path, bytes);
  data_ = static_cast<char*>(at);
  bytes_ = bytes;
  return absl::OkStatus();
}

absl::Status FileMapping::Populate(uint64_t offset, uint64_t bytes) {
#ifdef MADV_POPULATE_WRITE
  const uint64_t begin = offset / kPage * kPage;
  if (madvise(data_ + begin, offset + bytes - begin, MADV_POPULATE_WRITE) != 0 && errno != EINVAL &&
      errno != EINTR) {
    return absl::UnavailableError(
        absl::StrCat("the KV store's memory cannot be written: ", std::strerror(errno)));
  }
#endif
  return absl::OkStatus();
}

absl::Status FileMapping::SetWritable(bool writable) {
  if (mprotect(data_, bytes_, writable ? PROT_READ | PROT_WRITE : PROT_READ) != 0) {
    return SystemError(errno, "cannot protect the mapping", "", bytes_);
  }
  return absl::OkStatus();
}

SessionFiles::SessionFiles(const std::string& directory, const std::string& name,
                           const v1::OpenSessionRequest& request, const KvGeometry& geometry)
    : SessionStorage(request, geometry),
      meta_path_(absl::StrCat(directory, "/", name, ".meta")),
      payload_path_(absl::StrCat(directory, "/", name, ".kv")) {}

std::string SessionFiles::NameOf(absl::string_view session_id) {
  std::array<unsigned char, SHA256_DIGEST_LENGTH> hash;
  SHA256(reinterpret_cast<const unsigned char*>(session_id.data()), session_id.size(), hash.data());
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(hash.data()), 16));
}

absl::StatusOr<std::unique_ptr<SessionFiles>> SessionFiles::Create(const std::string& directory,
                                                                   const v1::OpenSessionRequest& request,
                                                                   const KvGeometry& geometry) {
  std::unique_ptr<SessionFiles> files(
      new SessionFiles(directory, NameOf(request.session_id()), request, geometry));
  // The payload first and the metadata by rename, so that a session is there whole or not at all.
  const std::string temporary = files->meta_path_ + ".tmp";
  const auto make = [&]() -> absl::Status {
    const int flags = O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC;
    const ScopedFd payload(open(files->payload_path_.c_str(), flags, 0600));
    if (payload.get() < 0) return SystemError(errno, "cannot make", files->payload_path_, 0);
    const ScopedFd meta(open(temporary.c_str(), flags, 0600));
    if (meta.get() < 0) return SystemError(errno, "cannot make", temporary, 0);
    HW_RETURN_IF_ERROR(Allocate(payload.get(), geometry.total_bytes(), files->payload_path_));
    HW_RETURN_IF_ERROR(Allocate(meta.get(), MetaBytes(geometry), temporary));
    HW_RETURN_IF_ERROR(files->payload_.Map(payload.get(), geometry.total_bytes(), files->payload_path_));
    HW_RETURN_IF_ERROR(files->meta_.Map(meta.get(), MetaBytes(geometry), temporary));
    files->SetTable(files->TableInMeta());
    const std::string bytes = request.SerializeAsString();
    FixedPart fixed = {};
    if (bytes.size() > kPage - sizeof(fixed))
      return absl::InvalidArgumentError("the session's request is too large");
    std::memcpy(fixed.magic, kMagic, sizeof(kMagic));
    fixed.version = kFormatVersion;
    fixed.request_bytes = static_cast<uint32_t>(bytes.size());
    fixed.request_crc = Crc32c(bytes.data(), bytes.size());
    std::memcpy(files->meta_.data(), &fixed, sizeof(fixed));
    std::memcpy(files->meta_.data() + sizeof(fixed), bytes.data(), bytes.size());
    files->Mutable()->epoch = request.epoch();
    files->Mutable()->state = kStateOpen;
    if (rename(temporary.c_str(), files->meta_path_.c_str()) != 0) {
      return SystemError(errno, "cannot rename", temporary, 0);
    }
    return absl::OkStatus();
  };
  const absl::Status made = make();
  if (!made.ok()) {
    unlink(temporary.c_str());
    files->Unlink();
    return made;
  }
  return files;
}

absl::StatusOr<std::unique_ptr<SessionFiles>> SessionFiles::Open(const std::string& directory,
                                                                 const std::string& name,
                                                                 uint64_t* blocks_dropped) {
  const std::string meta_path = absl::StrCat(directory, "/", name, ".meta");
  const std::string payload_path = absl::StrCat(directory, "/", name, ".kv");
  const ScopedFd meta(open(meta_path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (meta.get() < 0) return SystemError(errno, "cannot open", meta_path, 0);
  const ScopedFd payload(open(payload_path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (payload.get() < 0) return Corrupt(payload_path, std::strerror(errno));
  v1::OpenSessionRequest request;
  HW_RETURN_IF_ERROR(ReadFixedPart(meta.get(), meta_path, &request));
  if (NameOf(request.session_id()) != name) return Corrupt(meta_path, "it is another session's");
  auto geometry = KvGeometry::Create(request.layout());
  if (!geometry.ok()) return Corrupt(meta_path, geometry.status().message());
  HW_RETURN_IF_ERROR(CheckSize(meta.get(), MetaBytes(*geometry), meta_path));
  HW_RETURN_IF_ERROR(CheckSize(payload.get(), geometry->total_bytes(), payload_path));
  // A sparse file would raise SIGBUS on a full file system.
  HW_RETURN_IF_ERROR(Allocate(meta.get(), MetaBytes(*geometry), meta_path));
  HW_RETURN_IF_ERROR(Allocate(payload.get(), geometry->total_bytes(), payload_path));
  std::unique_ptr<SessionFiles> files(new SessionFiles(directory, name, request, *geometry));
  HW_RETURN_IF_ERROR(files->meta_.Map(meta.get(), MetaBytes(*geometry), meta_path));
  files->SetTable(files->TableInMeta());
  HW_RETURN_IF_ERROR(files->payload_.Map(payload.get(), geometry->total_bytes(), payload_path));
  const MutablePart& state = *files->Mutable();
  if (state.epoch > UINT32_MAX || (state.state != kStateOpen && state.state != kStateCommitted)) {
    return Corrupt(meta_path, absl::StrCat("its epoch is ", state.epoch, ", its state ", state.state));
  }
  HW_RETURN_IF_ERROR(files->VerifyBlocks(blocks_dropped));
  if (files->committed()) {
    HW_RETURN_IF_ERROR(files->VerifyCommit());
    HW_RETURN_IF_ERROR(files->payload_.SetWritable(false));
  }
  return files;
}

absl::Status SessionFiles::VerifyBlocks(uint64_t* blocks_dropped) {
  *blocks_dropped = 0;
  for (uint64_t i = 0; i < geometry().num_blocks(); ++i) {
    if (*Entry(i) == 0) continue;
    const KvBlockId id = geometry().BlockAt(i);
    uint32_t crc = 0;
    if (BlockCrc(i, &crc) && Crc32c(payload() + geometry().OffsetOf(id), geometry().BytesOf(id)) == crc)
      continue;
    *Entry(i) = 0;
    ++*blocks_dropped;
    if (committed())
      return Corrupt(payload_path_, absl::StrCat(BlockName(id), " of a committed session is damaged"));
  }
  return absl::OkStatus();
}

absl::Status SessionFiles::VerifyCommit() const {
  const MutablePart& state = *Mutable();
  KvDigest digest;
  KvDigest::FromBytes(absl::string_view(state.digest, sizeof(state.digest)), &digest);
  const uint64_t tokens = geometry().layout().num_tokens();
  if (CommitCrc(digest, state.first_token, state.first_top2_gap, PromptArea(), tokens) != state.commit_crc) {
    return Corrupt(meta_path_, "its commit record's CRC differs");
  }
  if (CountStored() != geometry().num_blocks() || !(Digest() == digest)) {
    return Corrupt(meta_path_, "it is committed, but its blocks are not those of the commit");
  }
  return absl::OkStatus();
}

uint64_t* SessionFiles::TableInMeta() const {
  return reinterpret_cast<uint64_t*>(meta_.data() + kTableOffset);
}

SessionFiles::MutablePart* SessionFiles::Mutable() const {
  return reinterpret_cast<MutablePart*>(meta_.data() + kPage);
}

uint32_t* SessionFiles::PromptArea() const {
  return reinterpret_cast<uint32_t*>(meta_.data() + PromptOffset(geometry()));
}

absl::StatusOr<uint32_t> SessionFiles::Take(const KvBlockId& block,
                                            const std::vector<absl::string_view>& payload) {
  const uint64_t offset = geometry().OffsetOf(block);
  HW_RETURN_IF_ERROR(payload_.Populate(offset, geometry().BytesOf(block)));
  return CopyAndChecksum(payload, payload_.data() + offset);
}

uint32_t SessionFiles::epoch() const {
  return static_cast<uint32_t>(std::atomic_ref(Mutable()->epoch).load(std::memory_order_acquire));
}

bool SessionFiles::committed() const {
  return std::atomic_ref(Mutable()->state).load(std::memory_order_acquire) == kStateCommitted;
}

absl::Status SessionFiles::SetEpoch(uint32_t epoch, uint32_t resume_layer) {
  HW_RETURN_IF_ERROR(payload_.SetWritable(true));
  std::atomic_ref(Mutable()->state).store(kStateOpen, std::memory_order_release);
  ClearFrom(resume_layer);
  std::atomic_ref(Mutable()->epoch).store(epoch, std::memory_order_release);
  return absl::OkStatus();
}

absl::Status SessionFiles::Commit(const CommitRecord& record) {
  const uint64_t tokens = geometry().layout().num_tokens();
  for (uint64_t i = 0; i < tokens; ++i) PromptArea()[i] = static_cast<uint32_t>(record.prompt[i]);
  MutablePart* state = Mutable();
  const std::string digest = record.digest.Bytes();
  std::memcpy(state->digest, digest.data(), sizeof(state->digest));
  state->first_token = static_cast<uint32_t>(record.first_token);
  state->first_top2_gap = record.first_top2_gap;
  state->commit_crc =
      CommitCrc(record.digest, state->first_token, state->first_top2_gap, PromptArea(), tokens);
  HW_RETURN_IF_ERROR(payload_.SetWritable(false));
  std::atomic_ref(state->state).store(kStateCommitted, std::memory_order_release);
  return absl::OkStatus();
}

CommitRecord SessionFiles::commit_record() const {
  const MutablePart& state = *Mutable();
  CommitRecord record;
  KvDigest::FromBytes(absl::string_view(state.digest, sizeof(state.digest)), &record.digest);
  record.first_token = static_cast<int32_t>(state.first_token);
  record.first_top2_gap = state.first_top2_gap;
  const uint32_t* prompt = PromptArea();
  record.prompt.assign(prompt, prompt + geometry().layout().num_tokens());
  return record;
}

void SessionFiles::Unlink() {
  unlink(meta_path_.c_str());
  unlink(payload_path_.c_str());
}

}  // namespace headwater
