// KV frames: the messages of KvTransferService.PushBlocks, written without putting payloads through protobuf.
//
// A frame is a prefix of kFramePrefixBytes (magic "HWKV", u16 version = 1, u16 zero, u32 header_bytes, u32
// CRC32C of the header; little endian), a serialized v1::KvFrameHeader of header_bytes, and the payload: the
// rest of the message. Only KvBlock frames have one. A flipped bit in the header is found by the header's
// checksum, one in the payload by the block's.
#ifndef HW_KVTRANSFER_FRAME_H_
#define HW_KVTRANSFER_FRAME_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include "headwater/v1/kv.pb.h"

namespace headwater {

inline constexpr uint64_t kFramePrefixBytes = 16;
// What a receiver accepts as header of a frame from a sender.
inline constexpr uint64_t kMaxClientHeaderBytes = 64 << 10;
// What a sender accepts from a receiver: the session state carries one bit for each of up to kMaxBlocks.
inline constexpr uint64_t kMaxServerHeaderBytes = 16 << 20;

// Path of the method for generic stubs.
inline constexpr char kPushBlocksMethod[] = "/headwater.v1.KvTransferService/PushBlocks";

// A frame without payload.
grpc::ByteBuffer EncodeFrame(const v1::KvFrameHeader& header);
// A frame whose payload is `payload`, which the buffer shares and does not copy.
grpc::ByteBuffer EncodeFrame(const v1::KvFrameHeader& header, grpc::Slice payload);

// A frame taken apart. The payload's pieces point into `slices` and live as long as this object stays where
// it is.
class DecodedFrame {
 public:
  DecodedFrame() = default;
  DecodedFrame(const DecodedFrame&) = delete;
  DecodedFrame& operator=(const DecodedFrame&) = delete;

  // DATA_LOSS, KV_CORRUPT: bad magic, version or checksum, a header that does not parse, is larger than
  // `max_header_bytes` or than the message, or names no frame; a payload where none belongs. The message
  // names the value and the limit. Never copies the payload.
  absl::Status Decode(const grpc::ByteBuffer& message, uint64_t max_header_bytes);

  const v1::KvFrameHeader& header() const { return header_; }
  const std::vector<absl::string_view>& payload() const { return payload_; }
  uint64_t payload_bytes() const { return payload_bytes_; }

 private:
  v1::KvFrameHeader header_;
  std::vector<grpc::Slice> slices_;
  std::vector<absl::string_view> payload_;
  uint64_t payload_bytes_ = 0;
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_FRAME_H_
