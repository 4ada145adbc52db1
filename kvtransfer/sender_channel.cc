#include "kvtransfer/sender_channel.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include <grpcpp/generic/generic_stub.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "base/trace_context.h"
#include "kvtransfer/frame.h"

namespace headwater {
namespace {

constexpr absl::Duration kTick = absl::Seconds(1);
// How long a finished stream may take to end by itself.
constexpr absl::Duration kCloseTimeout = absl::Seconds(1);
// After this long without an answer to what was sent the connection is closed. gRPC keeps a connection with
// an unfinished write open even when its channel is gone, so this also bounds how long the caller's memory
// stays in use after a cancellation.
constexpr absl::Duration kSilence = absl::Seconds(3);
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(50);
constexpr int kMostDoublings = 4;

// Keeps count of one slice; gRPC destroys it with the last reference.
struct SliceRef {
  std::shared_ptr<SendLedger> ledger;
  SendBlock* block;
};

void ReleaseSlice(void* ref) {
  const std::unique_ptr<SliceRef> owned(static_cast<SliceRef*>(ref));
  owned->ledger->SliceReleased(owned->block);
}

}  // namespace

struct SenderChannel::Stream {
  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call;
  grpc::ByteBuffer received;
  grpc::Status end;
  // Events to come.
  int pending = 0;
  // The receiver's state has come: blocks may be written.
  bool ready = false;
  bool writing = false;
  // No more reads: the stream has ended.
  bool read_closed = false;
  bool finishing = false;
  bool cancelled = false;
  bool writes_done = false;
  absl::Time close_deadline = absl::InfiniteFuture();
};

SenderChannel::SenderChannel(const KvSenderOptions& options, const KvGeometry& geometry, int index,
                             std::shared_ptr<SendLedger> ledger)
    : options_(options), geometry_(geometry), index_(index), ledger_(std::move(ledger)) {}

void SenderChannel::Join() {
  Wake(true);
  if (thread_.joinable()) thread_.join();
}

void SenderChannel::Start() {
  thread_ = std::thread([this] { Run(); });
}

void SenderChannel::Wake(bool always) {
  if (!idle_.exchange(false) && !always) return;
  std::lock_guard<std::mutex> lock(wake_mutex_);
  if (closed_ || alarm_pending_) return;
  alarm_pending_ = true;
  alarm_ = std::make_unique<grpc::Alarm>();
  alarm_->Set(&queue_, gpr_now(GPR_CLOCK_MONOTONIC), reinterpret_cast<void*>(Event::kWake));
}

bool SenderChannel::NextEvent(absl::Duration limit, Event* event, bool* ok) {
  void* tag = nullptr;
  const auto deadline = std::chrono::system_clock::now() + absl::ToChronoMicroseconds(limit);
  if (queue_.AsyncNext(&tag, ok, deadline) != grpc::CompletionQueue::GOT_EVENT) return false;
  *event = static_cast<Event>(reinterpret_cast<intptr_t>(tag));
  if (*event == Event::kWake) {
    std::lock_guard<std::mutex> lock(wake_mutex_);
    alarm_pending_ = false;
  }
  return true;
}

void SenderChannel::Run() {
  channel_ = DialPrivate(options_.address, options_.transport.get(), Role::kDecode, kSilence);
  while (ledger_->running()) {
    const absl::Status end = RunStream();
    ledger_->StreamLost(index_);
    if (!ledger_->running()) break;
    const absl::Status verdict = Judge(end);
    if (!verdict.ok()) {
      ledger_->Fail(verdict);
      break;
    }
    HW_LOG(WARNING)
            .Field("request_id", options_.request_id)
            .Field("rank", options_.rank)
            .Field("channel", index_)
        << "KV stream to " << options_.address << " broke and is resumed: " << end.message();
    BackOff();
  }
  // With the channel goes its connection, at the latest after kSilence, and with that whatever slices it
  // still had to write.
  channel_.reset();
  {
    std::lock_guard<std::mutex> lock(wake_mutex_);
    closed_ = true;
    if (alarm_ != nullptr) alarm_->Cancel();
  }
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

void SenderChannel::BackOff() {
  const absl::Duration wait = kFirstBackoff * (1 << std::min(failures_, kMostDoublings));
  ++failures_;
  const absl::Time until = Clock::Real()->Now() + wait;
  while (ledger_->running()) {
    const absl::Duration left = until - Clock::Real()->Now();
    if (left <= absl::ZeroDuration()) return;
    Event event;
    bool ok = false;
    NextEvent(left, &event, &ok);
  }
}

absl::Status SenderChannel::RunStream() {
  Stream stream;
  Begin(&stream);
  // Finish is the last event of every stream, and comes after all others are drained.
  while (!stream.finishing || stream.pending > 0) {
    Advance(&stream);
    Event event;
    bool ok = false;
    const absl::Duration to_close = stream.close_deadline - Clock::Real()->Now();
    if (!NextEvent(std::clamp(to_close, absl::ZeroDuration(), kTick), &event, &ok)) continue;
    if (event != Event::kWake) HandleEvent(&stream, event, ok);
  }
  return FromGrpcStatus(stream.end);
}

void SenderChannel::Begin(Stream* stream) {
  // The channel keeps trying to connect; the ledger's stall watch bounds it.
  stream->context.set_wait_for_ready(true);
  if (!options_.traceparent.empty()) stream->context.AddMetadata(kTraceparent, options_.traceparent);
  if (!options_.tracestate.empty()) stream->context.AddMetadata(kTracestate, options_.tracestate);
  grpc::GenericStub stub(channel_);
  stream->call = stub.PrepareCall(&stream->context, kPushBlocksMethod, &queue_);
  stream->call->StartCall(reinterpret_cast<void*>(Event::kStarted));
  ++stream->pending;
}

void SenderChannel::Advance(Stream* stream) {
  if (!ledger_->running() && !stream->cancelled) {
    const absl::Time now = Clock::Real()->Now();
    const bool graceful = ledger_->finished() && stream->ready && now < stream->close_deadline;
    if (!graceful) {
      stream->cancelled = true;
      stream->close_deadline = absl::InfiniteFuture();
      stream->context.TryCancel();
    } else if (!stream->writes_done && !stream->writing) {
      stream->writes_done = true;
      stream->close_deadline = now + kCloseTimeout;
      stream->call->WritesDone(reinterpret_cast<void*>(Event::kWritesDone));
      ++stream->pending;
    }
  }
  if (stream->read_closed) {
    if (!stream->finishing) {
      stream->finishing = true;
      stream->call->Finish(&stream->end, reinterpret_cast<void*>(Event::kFinished));
      ++stream->pending;
    }
    return;
  }
  if (stream->ready && !stream->writing && !stream->writes_done && !stream->cancelled) {
    stream->writing = WriteNext(stream);
    if (stream->writing) ++stream->pending;
  }
}

void SenderChannel::HandleEvent(Stream* stream, Event event, bool ok) {
  --stream->pending;
  switch (event) {
    case Event::kStarted: {
      if (!ok) {
        stream->read_closed = true;
        return;
      }
      v1::KvFrameHeader header;
      v1::KvHello* hello = header.mutable_hello();
      hello->set_session_id(options_.session_id);
      hello->set_session_token(options_.session_token);
      hello->set_epoch(options_.epoch);
      hello->set_rank(options_.rank);
      ledger_->HelloSent(index_);
      stream->writing = true;
      stream->call->Write(EncodeFrame(header), reinterpret_cast<void*>(Event::kWritten));
      stream->call->Read(&stream->received, reinterpret_cast<void*>(Event::kRead));
      stream->pending += 2;
      return;
    }
    case Event::kRead:
      if (!ok) {
        stream->read_closed = true;
        return;
      }
      HandleRead(stream);
      stream->received.Clear();
      stream->call->Read(&stream->received, reinterpret_cast<void*>(Event::kRead));
      ++stream->pending;
      return;
    case Event::kWritten:
      // A write that fails means that the stream is ending; the read says so too. `writing` stays, so that
      // nothing more is written.
      if (ok) stream->writing = false;
      return;
    default:
      return;
  }
}

void SenderChannel::HandleRead(Stream* stream) {
  DecodedFrame frame;
  absl::Status status = frame.Decode(stream->received, kMaxServerHeaderBytes);
  if (!status.ok()) {
    // Damaged on the way: this stream cannot be trusted any more, the next one can.
    HW_LOG(WARNING).Field("request_id", options_.request_id) << status.message();
    stream->cancelled = true;
    stream->context.TryCancel();
    return;
  }
  if (frame.header().has_state() && !stream->ready) {
    status = ledger_->Resume(index_, frame.header().state());
    stream->ready = status.ok();
  } else if (frame.header().has_ack() && stream->ready) {
    failures_ = 0;
    status = ledger_->Acknowledge(index_, frame.header().ack());
  } else {
    status = MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL,
                       absl::StrCat("KV receiver: frame ", static_cast<int>(frame.header().frame_case()),
                                    " is not expected here"));
  }
  if (!status.ok()) ledger_->Fail(status);
}

bool SenderChannel::WriteNext(Stream* stream) {
  idle_ = true;
  SendBlock* block = ledger_->Take(index_);
  if (block == nullptr) return false;
  idle_ = false;
  if (!block->has_crc) ledger_->SetCrc(block, Crc32c(block->data, block->bytes));
  v1::KvFrameHeader header;
  v1::KvBlock* out = header.mutable_block();
  out->set_epoch(options_.epoch);
  out->set_layer(block->id.layer);
  out->set_kind(block->id.kind == KvKind::kK ? v1::KV_KIND_K : v1::KV_KIND_V);
  out->set_head_begin(0);
  out->set_head_end(geometry_.layout().num_kv_heads());
  out->set_token_begin(block->id.token_begin);
  out->set_token_end(block->id.token_end);
  out->set_crc32c(block->crc32c);
  // gRPC only reads the memory.
  grpc::Slice payload(const_cast<void*>(block->data), block->bytes, ReleaseSlice,
                      new SliceRef{ledger_, block});
  stream->call->Write(EncodeFrame(header, std::move(payload)), reinterpret_cast<void*>(Event::kWritten));
  return true;
}

absl::Status SenderChannel::Judge(const absl::Status& end) {
  switch (ReasonOf(end)) {
    case v1::ERROR_REASON_UNSPECIFIED:
      // From the transport, or from a server that is not ours.
      if (absl::IsUnimplemented(end) || absl::IsPermissionDenied(end) || absl::IsUnauthenticated(end))
        return end;
      return absl::OkStatus();
    case v1::ERROR_REASON_UNKNOWN_SESSION:
      return MakeError(
          absl::StatusCode::kUnavailable, v1::ERROR_REASON_DECODE_LOST,
          absl::StrCat("the decode node at ", options_.address, " has lost the KV session: ", end.message()),
          {{"address", options_.address}});
    case v1::ERROR_REASON_KV_CORRUPT:
      if (++corrupt_streams_ <= options_.max_corrupt_retries) return absl::OkStatus();
      return end;
    default:
      if (absl::IsUnavailable(end) || absl::IsResourceExhausted(end) || absl::IsDeadlineExceeded(end)) {
        return absl::OkStatus();
      }
      if (!absl::IsInvalidArgument(end)) return end;
      // What this process sent made no sense to the receiver; nobody above can mend that.
      return MakeError(absl::StatusCode::kInternal, v1::ERROR_REASON_INTERNAL,
                       absl::StrCat("the KV receiver at ", options_.address, " refused: ", end.message()));
  }
}

}  // namespace headwater
