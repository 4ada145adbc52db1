#include "kvtransfer/frame.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "kvtransfer/digest.h"

namespace headwater {
namespace {

constexpr char kPayload[] =
    "the payload of this block, long enough not to lie inside the slice object itself";

std::string Flatten(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(message.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices)
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return bytes;
}

std::string Flatten(const std::vector<absl::string_view>& pieces) {
  std::string bytes;
  for (const absl::string_view piece : pieces) bytes.append(piece.data(), piece.size());
  return bytes;
}

grpc::ByteBuffer OneSlice(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

v1::KvFrameHeader BlockHeader() {
  v1::KvFrameHeader header;
  header.mutable_block()->set_epoch(3);
  header.mutable_block()->set_layer(70'000);
  header.mutable_block()->set_kind(v1::KV_KIND_V);
  header.mutable_block()->set_token_end(1ull << 40);
  header.mutable_block()->set_crc32c(0xdeadbeef);
  return header;
}

std::string BlockFrame() { return Flatten(EncodeFrame(BlockHeader(), grpc::Slice(kPayload))); }

// A frame with a prefix of one's own making.
std::string RawFrame(const std::string& magic, uint16_t version, uint16_t reserved, uint32_t header_bytes,
                     const std::string& header) {
  std::string out = magic;
  const auto append = [&](uint32_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i));
  };
  append(version, 2);
  append(reserved, 2);
  append(header_bytes, 4);
  append(Crc32c(header.data(), header.size()), 4);
  return out + header;
}

void ExpectBad(const std::string& bytes, absl::string_view why) {
  DecodedFrame frame;
  const absl::Status status = frame.Decode(OneSlice(bytes), kMaxClientHeaderBytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << why;
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_KV_CORRUPT);
  EXPECT_NE(status.message().find(why), absl::string_view::npos) << status;
}

TEST(KvFrame, ComesBackAsItWasHoweverItIsSliced) {
  const std::string bytes = BlockFrame();
  std::mt19937 random(1);
  for (int run = 0; run < 2000; ++run) {
    std::vector<grpc::Slice> slices;
    size_t at = 0;
    while (at < bytes.size()) {
      const size_t size = std::min<size_t>(random() % (run % 40 + 2), bytes.size() - at);
      slices.emplace_back(bytes.substr(at, size));
      at += size;
    }
    DecodedFrame frame;
    const absl::Status status =
        frame.Decode(grpc::ByteBuffer(slices.data(), slices.size()), kMaxClientHeaderBytes);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(frame.header().SerializeAsString(), BlockHeader().SerializeAsString());
    EXPECT_EQ(Flatten(frame.payload()), kPayload);
    EXPECT_EQ(frame.payload_bytes(), sizeof(kPayload) - 1);
  }
}

TEST(KvFrame, SharesThePayloadInsteadOfCopyingIt) {
  std::string memory(100'000, 'x');
  const grpc::Slice slice(memory.data(), memory.size(), grpc::Slice::STATIC_SLICE);
  const grpc::ByteBuffer message = EncodeFrame(BlockHeader(), slice);
  DecodedFrame frame;
  ASSERT_TRUE(frame.Decode(message, kMaxClientHeaderBytes).ok());
  ASSERT_EQ(frame.payload().size(), 1u);
  EXPECT_EQ(frame.payload()[0].data(), memory.data());
}

TEST(KvFrame, CarriesAnEmptyPayload) {
  DecodedFrame frame;
  ASSERT_TRUE(frame.Decode(EncodeFrame(BlockHeader()), kMaxClientHeaderBytes).ok());
  EXPECT_EQ(frame.payload_bytes(), 0u);
}

TEST(KvFrame, IsRefusedWhenHostile) {
  const std::string header = BlockHeader().SerializeAsString();
  const uint32_t size = static_cast<uint32_t>(header.size());
  ExpectBad("", "less than a prefix");
  ExpectBad("HWKV", "less than a prefix");
  ExpectBad(RawFrame("HWKW", 1, 0, size, header), "magic is \"HWKW\"");
  ExpectBad(RawFrame("HWKV", 2, 0, size, header), "version is 2");
  ExpectBad(RawFrame("HWKV", 1, 9, size, header), "reserved field is 9");
  ExpectBad(RawFrame("HWKV", 1, 0, size + 1, header), "header_bytes is");
  ExpectBad(RawFrame("HWKV", 1, 0, UINT32_MAX, header), "header_bytes is 4294967295, the limit 65536");
  ExpectBad(RawFrame("HWKV", 1, 0, size - 1, header), "checksum");
  ExpectBad(RawFrame("HWKV", 1, 0, 0, ""), "names no frame");
  ExpectBad(RawFrame("HWKV", 1, 0, 3, "\xff\xff\xff"), "does not parse");
  v1::KvFrameHeader ack;
  ack.mutable_ack()->add_block_indices(1);
  const std::string ack_bytes = ack.SerializeAsString();
  ExpectBad(RawFrame("HWKV", 1, 0, static_cast<uint32_t>(ack_bytes.size()), ack_bytes) + "payload",
            "7 payload bytes follow");
  v1::KvFrameHeader large;
  large.mutable_state()->set_stored_blocks(std::string(kMaxClientHeaderBytes, 'x'));
  const std::string large_bytes = large.SerializeAsString();
  ExpectBad(RawFrame("HWKV", 1, 0, static_cast<uint32_t>(large_bytes.size()), large_bytes),
            "the limit 65536");
  DecodedFrame frame;
  EXPECT_TRUE(frame.Decode(EncodeFrame(large), kMaxServerHeaderBytes).ok());
  EXPECT_FALSE(frame.Decode(grpc::ByteBuffer(), kMaxServerHeaderBytes).ok());
}

TEST(KvFrame, AnySingleBitFlipIsFoundOrInThePayload) {
  const std::string bytes = BlockFrame();
  const size_t payload_begin = bytes.size() - (sizeof(kPayload) - 1);
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    DecodedFrame frame;
    const absl::Status status = frame.Decode(OneSlice(flipped), kMaxClientHeaderBytes);
    EXPECT_EQ(status.ok(), bit / 8 >= payload_begin) << "bit " << bit << ": " << status;
  }
}

TEST(KvFrame, SurvivesRandomMutations) {
  std::mt19937 random(11);
  int accepted = 0;
  for (int run = 0; run < 20'000; ++run) {
    std::string bytes = BlockFrame();
    for (uint32_t change = 0; change <= random() % 4; ++change) {
      const size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.resize(at + 1);
          break;
        case 2:
          bytes.insert(at, std::string(random() % 20, static_cast<char>(random())));
          break;
        default:
          bytes.erase(at, random() % 20);
          if (bytes.empty()) bytes = "H";
      }
    }
    DecodedFrame frame;
    const absl::Status status = frame.Decode(OneSlice(bytes), kMaxClientHeaderBytes);
    if (!status.ok()) continue;
    ++accepted;
    // The header's checksum held, so only the payload can have changed.
    EXPECT_EQ(frame.header().SerializeAsString(), BlockHeader().SerializeAsString());
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace headwater
