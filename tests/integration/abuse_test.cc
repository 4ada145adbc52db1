// Clients that abuse the connection rather than the API: floods of idle connections, streams that are reset
// at once, metadata and messages that are too large, handshakes that never end. Meanwhile health is answered
// in time and memory stays bounded; afterwards the whole service works within two seconds. reset_test.cc has
// the floods of resets.
#include "tests/integration/abuse.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/create_channel.h>

#include "tests/integration/raw_http2.h"

namespace headwater::testing {
namespace {

constexpr absl::Duration kHandshake = absl::Seconds(10);

TEST_F(AbuseTest, IdleConnectionsAreBoundedAndEnd) {
  Start();

  std::vector<RawConnection> silent, polite;
  for (int i = 0; i < Connections(); ++i) {
    std::vector<RawConnection>& kind = i % 2 == 0 ? silent : polite;
    kind.emplace_back(port_);
    if (i % 2 == 1 && kind.back().connected()) kind.back().Send(Preface());
  }
  // Those that said nothing are gone after the handshake's time.
  int gone = 0;
  const absl::Time end = absl::Now() + kHandshake + absl::Seconds(5);
  for (RawConnection& connection : silent) {
    gone +=
        !connection.connected() || connection.ClosedWithin(std::max(end - absl::Now(), absl::Milliseconds(1)))
            ? 1
            : 0;
  }
  EXPECT_EQ(gone, static_cast<int>(silent.size()));
  ExpectHealthy("idle connections");
  // Others may come while the polite ones stay.
  ExpectFullServiceToNewcomers();
  silent.clear();
  polite.clear();
  ExpectFullServiceToNewcomers();
}

TEST_F(AbuseTest, AFloodPastTheLimitOfOpenFilesDoesNotEndTheService) {
  Start();
  std::vector<RawConnection> flood;
  const int count = Full() ? 5500 : 900;
  for (int i = 0; i < count; ++i) {
    flood.emplace_back(port_);
    if (flood.back().connected()) flood.back().Send(Preface());
  }
  absl::SleepFor(absl::Seconds(3));
  int refused = 0;
  for (RawConnection& connection : flood) {
    refused += !connection.connected() || connection.Receive(absl::ZeroDuration()).empty() ? 1 : 0;
  }
  EXPECT_GE(refused, 100) << "the flood did not reach the limit";
  EXPECT_LT(refused, count) << "nobody was let in";
  EXPECT_GE(ReadMetric(cluster_->coordinator_metrics_port(), "headwater_connections_refused_total"), 100);
  ExpectHealthy("flood");
  ExpectFullService();  // on the connection that was there before
  flood.clear();
  ExpectFullServiceToNewcomers();
}

TEST_F(AbuseTest, AConnectionHasOnly128CallsAtOnce) {
  Start();
  RawConnection connection(port_);
  ASSERT_TRUE(connection.Send(Preface()));
  std::string bytes = connection.Receive(absl::Seconds(2));
  ASSERT_TRUE(connection.Send(SettingsAck()));
  // Never half-closed: each call waits for its request.
  constexpr int kCalls = 200;
  for (int i = 0; i < kCalls; ++i) {
    connection.Send(
        Encode({FrameType::kHeaders, kEndHeaders, static_cast<uint32_t>(2 * i + 1), CallHeaders(kPrefill)}));
  }
  bool told = false;
  int refused = 0;
  const absl::Time end = absl::Now() + absl::Seconds(5);
  bool closed = false;
  while (absl::Now() < end && !(told && (refused > 0 || closed))) {
    bytes += connection.Receive(absl::Milliseconds(200));
    for (const Http2Frame& frame : TakeFrames(&bytes)) {
      // SETTINGS_MAX_CONCURRENT_STREAMS = 128.
      told |= frame.type == FrameType::kSettings &&
              frame.payload.find(std::string("\0\x03\0\0\0\x80", 6)) != std::string::npos;
      refused += frame.type == FrameType::kReset ? 1 : 0;
      closed |= frame.type == FrameType::kGoaway;
    }
  }
  EXPECT_TRUE(told) << "the limit was not announced";
  EXPECT_TRUE(refused > 0 || closed) << "calls past the limit were taken";
  absl::SleepFor(absl::Seconds(1));
  ExpectHealthy("128 calls");
  ExpectFullServiceToNewcomers();
}

// What the server says of stream 1 until it ends it (true) or 5 s have passed.
bool EndsStream(RawConnection* connection) {
  std::string bytes;
  const absl::Time end = absl::Now() + absl::Seconds(5);
  while (absl::Now() < end) {
    bytes += connection->Receive(absl::Milliseconds(100));
    for (const Http2Frame& frame : TakeFrames(&bytes)) {
      if (frame.type == FrameType::kSettings && frame.flags == 0) connection->Send(SettingsAck());
      if (frame.type == FrameType::kReset || frame.type == FrameType::kGoaway) return true;
      if (frame.type == FrameType::kHeaders && (frame.flags & kEndStream) != 0) return true;
    }
  }
  return false;
}

TEST_F(AbuseTest, AMebibyteOfMetadataIsRefused) {
  Start();
  constexpr size_t kMetadata = 1 << 20, kPiece = 16 << 10;
  for (int i = 0; i < (Full() ? 200 : 20); ++i) {
    RawConnection connection(port_);
    ASSERT_TRUE(connection.Send(Preface()));
    connection.Receive(absl::Seconds(2));
    ASSERT_TRUE(connection.Send(SettingsAck()));
    const std::string block = CallHeaders(kPrefill, {{"x-large", std::string(kMetadata, 'a')}});
    bool alive = true;
    for (size_t at = 0; at < block.size() && alive; at += kPiece) {
      const bool last = at + kPiece >= block.size();
      alive = connection.Send(Encode({at == 0 ? FrameType::kHeaders : FrameType::kContinuation,
                                      last ? kEndHeaders : uint8_t{0}, 1, block.substr(at, kPiece)}));
    }
    ASSERT_TRUE(!alive || EndsStream(&connection)) << "a call with 1 MiB of metadata goes on";
  }
  // A client of gRPC's is told why.
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  context.AddMetadata("x-large", std::string(kMetadata, 'a'));
  v1::ListWorkersResponse workers;
  const grpc::Status status = cluster_->admin().ListWorkers(&context, {}, &workers);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  absl::SleepFor(absl::Seconds(1));
  ExpectHealthy("1 MiB metadata");
  ExpectFullServiceToNewcomers();
}

TEST_F(AbuseTest, AMessageOverTheLimitIsRefused) {
  Start();
  grpc::ChannelArguments arguments;
  arguments.SetMaxSendMessageSize(-1);
  const auto stub = v1::PrefillService::NewStub(grpc::CreateCustomChannel(
      cluster_->coordinator_address(), grpc::InsecureChannelCredentials(), arguments));
  for (int i = 0; i < 3; ++i) {
    v1::PrefillRequest request;
    request.set_model(std::string((64 << 20) + 1, 'm'));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    const auto reader = stub->Prefill(&context, request);
    v1::PrefillResponse event;
    EXPECT_FALSE(reader->Read(&event));
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
  absl::SleepFor(absl::Seconds(1));
  ExpectHealthy("oversize messages");
  ExpectFullServiceToNewcomers();
}

// Sends a message of 4 GiB as fast as the server lets it, and counts what the server took.
class EndlessMessage {
 public:
  explicit EndlessMessage(int port) : connection_(port) {
    connection_.Send(Preface());
    Listen(absl::Seconds(2));
    connection_.Send(Encode({FrameType::kHeaders, kEndHeaders, 1, CallHeaders(kPrefill)}));
  }

  // True: the server has ended it.
  bool Send(uint64_t most) {
    std::string prefix("\0\xff\xff\xff\xff", 5);
    const absl::Time end = absl::Now() + absl::Seconds(30);
    while (!ended_ && sent_ < most && absl::Now() < end) {
      const int64_t room = std::min({connection_window_, stream_window_, int64_t{16 << 10}});
      if (room < 8) {
        Listen(absl::Milliseconds(200));
        continue;
      }
      const std::string payload = prefix + std::string(static_cast<size_t>(room) - prefix.size(), 'x');
      prefix.clear();
      ended_ |= !connection_.Send(Encode({FrameType::kData, 0, 1, payload}));
      sent_ += payload.size();
      connection_window_ -= room;
      stream_window_ -= room;
      if (sent_ % (1 << 20) < payload.size()) Listen(absl::ZeroDuration());
    }
    return ended_;
  }
  uint64_t sent() const { return sent_; }

 private:
  void Listen(absl::Duration limit) {
    bytes_ += connection_.Receive(limit);
    for (const Http2Frame& frame : TakeFrames(&bytes_)) {
      const auto number = [&frame](size_t at) {
        int64_t value = 0;
        for (size_t i = at; i < at + 4; ++i)
          value = value << 8 | static_cast<unsigned char>(frame.payload[i]);
        return value;
      };
      if (frame.type == FrameType::kWindow) {
        (frame.stream == 0 ? connection_window_ : stream_window_) += number(0);
      } else if (frame.type == FrameType::kSettings && frame.flags == 0) {
        for (size_t at = 0; at + 6 <= frame.payload.size(); at += 6) {
          if (frame.payload[at + 1] != 4) continue;  // SETTINGS_INITIAL_WINDOW_SIZE
          stream_window_ += number(at + 2) - initial_window_;
          initial_window_ = number(at + 2);
        }
        connection_.Send(SettingsAck());
      }
      ended_ |= frame.type == FrameType::kReset || frame.type == FrameType::kGoaway;
    }
  }

  RawConnection connection_;
  std::string bytes_;
  int64_t connection_window_ = 65535, stream_window_ = 65535, initial_window_ = 65535;
  uint64_t sent_ = 0;
  bool ended_ = false;
};

TEST_F(AbuseTest, AMessageOfFourGibibytesIsCutOff) {
  Start();
  EndlessMessage message(port_);
  EXPECT_TRUE(message.Send(uint64_t{2} << 30)) << "the server took " << message.sent() << " bytes";
  EXPECT_GT(message.sent(), uint64_t{64} << 20) << "smaller ones are allowed";
  EXPECT_LE(PeakRssMiB(cluster_->coordinator()) - rss_before_, kRssCapMiB);
  absl::SleepFor(absl::Seconds(1));
  ExpectHealthy("a message of 4 GiB");
  ExpectFullServiceToNewcomers();
}

TEST_F(AbuseTest, HandshakesThatDoNotEndAreCutOff) {
  StartPrivate();

  // The beginning of a ClientHello of 512 bytes, and then a byte now and then.
  std::vector<RawConnection> slow;
  for (int i = 0; i < (Full() ? 2000 : 200); ++i) {
    slow.emplace_back(port_);
    if (slow.back().connected()) slow.back().Send(std::string("\x16\x03\x01\x02\x00\x01", 6));
  }
  const absl::Time end = absl::Now() + kHandshake + absl::Seconds(5);
  for (int i = 0; i < 8; ++i) {
    for (RawConnection& connection : slow) connection.Send("x");
    absl::SleepFor(absl::Seconds(1));
  }
  ExpectHealthy("slow handshakes");
  ExpectFullService();
  int cut = 0;
  for (RawConnection& connection : slow) {
    cut +=
        !connection.connected() || connection.ClosedWithin(std::max(end - absl::Now(), absl::Milliseconds(1)))
            ? 1
            : 0;
  }
  EXPECT_EQ(cut, static_cast<int>(slow.size()));
}

}  // namespace
}  // namespace headwater::testing
