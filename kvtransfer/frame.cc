#include "kvtransfer/frame.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

#include "base/rpc/grpc_status.h"
#include "base/status_macros.h"
#include "kvtransfer/digest.h"

namespace headwater {
namespace {

constexpr absl::string_view kMagic = "HWKV";
constexpr uint32_t kFrameVersion = 1;

void StoreLittle(uint32_t value, int bytes, char* out) {
  for (int i = 0; i < bytes; ++i) out[i] = static_cast<char>(value >> (8 * i));
}

uint32_t LoadLittle(const char* in, int bytes) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= uint32_t{static_cast<unsigned char>(in[i])} << (8 * i);
  return value;
}

absl::Status BadFrame(absl::string_view what) {
  return MakeError(absl::StatusCode::kDataLoss, v1::ERROR_REASON_KV_CORRUPT,
                   absl::StrCat("KV frame: ", what));
}

grpc::Slice PrefixAndHeader(const v1::KvFrameHeader& header) {
  std::string bytes(kFramePrefixBytes, '\0');
  header.AppendToString(&bytes);
  const char* body = bytes.data() + kFramePrefixBytes;
  const uint64_t header_bytes = bytes.size() - kFramePrefixBytes;
  std::memcpy(bytes.data(), kMagic.data(), kMagic.size());
  StoreLittle(kFrameVersion, 2, bytes.data() + 4);
  StoreLittle(static_cast<uint32_t>(header_bytes), 4, bytes.data() + 8);
  StoreLittle(Crc32c(body, header_bytes), 4, bytes.data() + 12);
  return grpc::Slice(bytes);
}

struct Prefix {
  uint32_t header_bytes = 0;
  uint32_t header_crc = 0;
};

absl::Status ParsePrefix(const char* bytes, Prefix* prefix) {
  const absl::string_view magic(bytes, kMagic.size());
  if (magic != kMagic) return BadFrame(absl::StrCat("magic is \"", absl::CHexEscape(magic), "\", not HWKV"));
  if (const uint32_t version = LoadLittle(bytes + 4, 2); version != kFrameVersion) {
    return BadFrame(absl::StrCat("version is ", version, ", not ", kFrameVersion));
  }
  if (const uint32_t reserved = LoadLittle(bytes + 6, 2); reserved != 0) {
    return BadFrame(absl::StrCat("the reserved field is ", reserved, ", not 0"));
  }
  prefix->header_bytes = LoadLittle(bytes + 8, 4);
  prefix->header_crc = LoadLittle(bytes + 12, 4);
  return absl::OkStatus();
}

// Reads a run of slices from the front.
class Cursor {
 public:
  explicit Cursor(const std::vector<grpc::Slice>& slices) : slices_(slices) {}

  // The next `bytes`, which must be there; in `scratch` if they lie in more than one slice.
  absl::string_view Take(uint64_t bytes, std::string* scratch) {
    SkipEmpty();
    if (bytes == 0) return absl::string_view();
    const absl::string_view first = Rest();
    if (first.size() >= bytes) {
      offset_ += bytes;
      return first.substr(0, bytes);
    }
    scratch->clear();
    scratch->reserve(bytes);
    while (scratch->size() < bytes) {
      SkipEmpty();
      const absl::string_view piece = Rest().substr(0, bytes - scratch->size());
      scratch->append(piece.data(), piece.size());
      offset_ += piece.size();
    }
    return *scratch;
  }

  void TakeRest(std::vector<absl::string_view>* pieces) {
    for (SkipEmpty(); index_ < slices_.size(); SkipEmpty()) {
      pieces->push_back(Rest());
      offset_ += Rest().size();
    }
  }

 private:
  absl::string_view Rest() const {
    const grpc::Slice& slice = slices_[index_];
    return absl::string_view(reinterpret_cast<const char*>(slice.begin()) + offset_, slice.size() - offset_);
  }
  void SkipEmpty() {
    while (index_ < slices_.size() && offset_ == slices_[index_].size()) {
      ++index_;
      offset_ = 0;
    }
  }

  const std::vector<grpc::Slice>& slices_;
  size_t index_ = 0;
  uint64_t offset_ = 0;
};

}  // namespace

grpc::ByteBuffer EncodeFrame(const v1::KvFrameHeader& header) {
  const grpc::Slice slice = PrefixAndHeader(header);
  return grpc::ByteBuffer(&slice, 1);
}

grpc::ByteBuffer EncodeFrame(const v1::KvFrameHeader& header, grpc::Slice payload) {
  const grpc::Slice slices[2] = {PrefixAndHeader(header), std::move(payload)};
  return grpc::ByteBuffer(slices, 2);
}

absl::Status DecodedFrame::Decode(const grpc::ByteBuffer& message, uint64_t max_header_bytes) {
  payload_.clear();
  payload_bytes_ = 0;
  header_.Clear();
  slices_.clear();
  if (!message.Valid() || !message.Dump(&slices_).ok()) return BadFrame("the message has no bytes");
  uint64_t total = 0;
  for (const grpc::Slice& slice : slices_) total += slice.size();
  if (total < kFramePrefixBytes) {
    return BadFrame(
        absl::StrCat("the message has ", total, " bytes, less than a prefix of ", kFramePrefixBytes));
  }
  Cursor cursor(slices_);
  std::string scratch;
  Prefix prefix;
  HW_RETURN_IF_ERROR(ParsePrefix(cursor.Take(kFramePrefixBytes, &scratch).data(), &prefix));
  const uint64_t limit = std::min(max_header_bytes, total - kFramePrefixBytes);
  if (prefix.header_bytes > limit) {
    return BadFrame(absl::StrCat("header_bytes is ", prefix.header_bytes, ", the limit ", max_header_bytes,
                                 ", the message ", total));
  }
  const absl::string_view header = cursor.Take(prefix.header_bytes, &scratch);
  if (Crc32c(header.data(), header.size()) != prefix.header_crc)
    return BadFrame("the header's checksum differs");
  if (!header_.ParseFromArray(header.data(), static_cast<int>(header.size()))) {
    return BadFrame("the header does not parse");
  }
  if (header_.frame_case() == v1::KvFrameHeader::FRAME_NOT_SET) return BadFrame("the header names no frame");
  payload_bytes_ = total - kFramePrefixBytes - prefix.header_bytes;
  if (payload_bytes_ != 0 && !header_.has_block()) {
    return BadFrame(absl::StrCat(payload_bytes_, " payload bytes follow a frame that has none"));
  }
  cursor.TakeRest(&payload_);
  return absl::OkStatus();
}

}  // namespace headwater
