// Frames of the KV wire, taken apart and put together again.
#include <algorithm>
#include <string>

#include "base/rpc/grpc_status.h"
#include "kvtransfer/digest.h"
#include "kvtransfer/frame.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

std::string Bytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string out;
  if (!buffer.Dump(&slices).ok()) return out;
  for (const grpc::Slice& slice : slices)
    out.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return out;
}

// The message in pieces of `step` bytes, as a transport may deliver it.
grpc::ByteBuffer InPieces(absl::string_view message, size_t step) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < message.size(); at += step) {
    const absl::string_view piece = message.substr(at, step);
    slices.emplace_back(piece.data(), piece.size());
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

// First byte: bits 0 to 5, pieces of so many bytes; bit 6, the header's size and checksum are made right.
void Run(absl::string_view input) {
  if (input.empty()) return;
  const auto mode = static_cast<unsigned char>(input.front());
  std::string message(input.substr(1));
  if ((mode & 0x40) != 0 && message.size() >= kFramePrefixBytes) {
    const uint64_t room = message.size() - kFramePrefixBytes;
    const uint64_t header = std::min<uint64_t>(room, static_cast<unsigned char>(message[8]));
    for (int i = 0; i < 4; ++i) message[8 + i] = static_cast<char>(header >> (8 * i));
    const uint32_t crc = Crc32c(message.data() + kFramePrefixBytes, header);
    for (int i = 0; i < 4; ++i) message[12 + i] = static_cast<char>(crc >> (8 * i));
  }
  DecodedFrame frame;
  const absl::Status status =
      frame.Decode(InPieces(message, static_cast<size_t>(mode & 0x3f) + 1), kMaxClientHeaderBytes);
  if (!status.ok()) {
    ExpectRefusal(status, {absl::StatusCode::kDataLoss});
    return;
  }
  std::string payload;
  for (const absl::string_view piece : frame.payload()) payload.append(piece.data(), piece.size());
  FUZZ_EXPECT(payload.size() == frame.payload_bytes(), "a payload of the size that it says");
  FUZZ_EXPECT(payload.empty() || frame.header().has_block(), "a payload belongs to a block");
  FUZZ_EXPECT(absl::string_view(message).substr(message.size() - payload.size()) == payload,
              "the payload is the message's end");
  DecodedFrame again;
  const std::string encoded = Bytes(EncodeFrame(frame.header(), grpc::Slice(payload)));
  FUZZ_EXPECT(again.Decode(InPieces(encoded, 7), UINT32_MAX).ok() && again.payload_bytes() == payload.size(),
              "what was decoded can be sent on");
}

std::vector<std::string> Seeds() {
  v1::KvFrameHeader hello, block, ack, state;
  hello.mutable_hello()->set_session_id("s");
  hello.mutable_hello()->set_epoch(1);
  block.mutable_block()->set_kind(v1::KV_KIND_K);
  block.mutable_block()->set_token_end(16);
  block.mutable_block()->set_crc32c(7);
  ack.mutable_ack()->add_block_indices(3);
  state.mutable_state()->set_stored_blocks("\x01\x80");
  std::vector<std::string> seeds;
  for (const char mode : {'\x3f', '\x42'}) {
    seeds.push_back(mode + Bytes(EncodeFrame(hello)));
    seeds.push_back(mode + Bytes(EncodeFrame(block, grpc::Slice("payload of a block"))));
    seeds.push_back(mode + Bytes(EncodeFrame(ack)));
    seeds.push_back(mode + Bytes(EncodeFrame(state)));
  }
  return seeds;
}

const Registration kTarget({"kv_frame", Run, Seeds, nullptr});

}  // namespace
}  // namespace headwater::fuzz
