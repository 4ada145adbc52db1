#include "worker/gloo_collectives.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gloo/transport/context.h"
#include "gloo/transport/tcp/address.h"
#include "gloo/transport/tcp/device.h"
#include "gloo/transport/unbound_buffer.h"

#include "base/clock.h"
#include "base/status_macros.h"
#include "worker/gloo_peer_name.h"
#include "worker/ring.h"

namespace headwater {
namespace {

using gloo::transport::UnboundBuffer;

// How often a wait looks at its connection.
constexpr absl::Duration kLinkCheck = absl::Milliseconds(100);
// Of messages that nobody sends.
constexpr uint64_t kSilentSlot = std::numeric_limits<uint64_t>::max();

// Gloo takes 0 as "no limit".
std::chrono::milliseconds GlooTimeout(absl::Duration timeout) {
  return std::chrono::milliseconds(std::max<int64_t>(1, absl::ToInt64Milliseconds(timeout)));
}

// Runs `call`, which throws on errors.
template <typename Call>
absl::Status Guard(absl::string_view what, const Call& call) {
  try {
    call();
    return absl::OkStatus();
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat(what, ": ", e.what()));
  }
}

class Gloo;

class GlooExchange final : public PendingExchange {
 public:
  GlooExchange(Gloo* group, int to, absl::Span<const char> send, int from, absl::Span<char> receive)
      : group_(group), to_(to), from_(from), send_(send), receive_(receive) {}
  ~GlooExchange() override;
  absl::Status Wait() override;

  // The status is kept for Wait().
  void Start(uint64_t slot);
  void Interrupt();
  absl::Status* status() { return &status_; }

 private:
  absl::Status WaitFor(bool receiving, absl::Time deadline);
  std::string Describe(absl::string_view what) const;

  Gloo* const group_;
  const int to_;
  const int from_;
  const absl::Span<const char> send_;
  const absl::Span<char> receive_;
  std::unique_ptr<UnboundBuffer> send_buffer_;
  std::unique_ptr<UnboundBuffer> receive_buffer_;
  absl::Status status_;
  bool waited_ = false;
};

class Gloo final : public GlooCollectives {
 public:
  Gloo(const GlooOptions& options, std::shared_ptr<gloo::transport::Device> device)
      : options_(options),
        device_(std::move(device)),
        buffers_(device_->createContext(options.rank, options.world_size)) {}
  ~Gloo() override {
    {
      // Not by Fail(): Gloo's close() resets connections. Destroying the pairs closes them in order: a peer
      // still reads what was sent, and its event thread survives a connection that it has not looked at yet.
      absl::MutexLock lock(&mutex_);
      if (error_.ok()) error_ = absl::CancelledError("the group was destroyed");
    }
    // Pairs unregister from the device's thread; the device must go last.
    transport_.reset();
  }

  int rank() const override { return options_.rank; }
  int world_size() const override { return options_.world_size; }
  // Of an operation; while the group is being formed, what is left for that.
  absl::Duration timeout() const { return operation_timeout_; }

  absl::Status Connect(RendezvousClient* rendezvous) override;
  std::unique_ptr<PendingExchange> StartExchange(int to, absl::Span<const char> send, int from,
                                                 absl::Span<char> receive) override;
  absl::Status AllGather(const void* in, uint64_t bytes, void* out) override {
    return RingAllGather(this, in, bytes, out);
  }
  void Abort() override;

  // Ends the group with `why` (the first one stays) and returns the error that stands. Closing the pairs
  // tells the peers, and stops the transport from touching the buffers of pending operations.
  absl::Status Fail(absl::Status why);
  absl::Status error() const {
    absl::MutexLock lock(&mutex_);
    return error_;
  }
  // Gloo fails every pair of a buffer's context when a wait times out. These are of a context without pairs,
  // so that a wait may be cut into slices.
  std::unique_ptr<UnboundBuffer> MakeBuffer(const void* data, size_t bytes) const {
    return buffers_->createUnboundBuffer(const_cast<void*>(data), bytes);
  }
  gloo::transport::Pair* pair(int peer) const { return transport_->getPair(peer).get(); }
  // Throws what broke the connection to `peer`, if it is broken.
  void CheckLink(int peer) const {
    // An aborted wait ends at once.
    links_[peer]->abortWaitRecv();
    links_[peer]->waitRecv(nullptr, GlooTimeout(kLinkCheck));
  }
  void Forget(GlooExchange* exchange) {
    absl::MutexLock lock(&mutex_);
    pending_.erase(std::remove(pending_.begin(), pending_.end(), exchange), pending_.end());
  }

 private:
  absl::Status ConnectAll(RendezvousClient* rendezvous, absl::Time deadline);
  absl::Status WaitForAll(absl::Time deadline);
  absl::Status Publish(RendezvousClient* rendezvous, absl::Time deadline, size_t* address_bytes);
  absl::Status ConnectPeer(RendezvousClient* rendezvous, int peer, size_t address_bytes, absl::Time deadline);
  std::string Key(int rank) const { return absl::StrCat(options_.group_name, "/", rank); }

  const GlooOptions options_;
  const std::shared_ptr<gloo::transport::Device> device_;
  const std::shared_ptr<gloo::transport::Context> buffers_;
  std::shared_ptr<gloo::transport::Context> transport_;
  // For each peer, a receive that never completes: a pair that breaks tells it.
  std::vector<std::unique_ptr<UnboundBuffer>> links_;
  uint64_t next_slot_ = 0;
  absl::Duration operation_timeout_;
  mutable absl::Mutex mutex_;
  absl::Status error_ ABSL_GUARDED_BY(mutex_) = absl::OkStatus();
  // All pairs are connected; of this rank, and of all.
  bool connected_ ABSL_GUARDED_BY(mutex_) = false;
  bool formed_ ABSL_GUARDED_BY(mutex_) = false;
  int connecting_ ABSL_GUARDED_BY(mutex_) = -1;  // the peer that Connect() waits for
  RendezvousClient* rendezvous_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::vector<GlooExchange*> pending_ ABSL_GUARDED_BY(mutex_);
};

GlooExchange::~GlooExchange() {
  if (!waited_) group_->Fail(absl::CancelledError(Describe("was given up"))).IgnoreError();
  group_->Forget(this);
}

void GlooExchange::Start(uint64_t slot) {
  status_.Update(Guard(Describe("failed"), [&] {
    // The receive first, so that a peer's send finds it.
    if (!receive_.empty()) {
      receive_buffer_ = group_->MakeBuffer(receive_.data(), receive_.size());
      group_->pair(from_)->recv(receive_buffer_.get(), slot, 0, receive_.size());
    }
    if (!send_.empty()) {
      send_buffer_ = group_->MakeBuffer(send_.data(), send_.size());
      group_->pair(to_)->send(send_buffer_.get(), slot, 0, send_.size());
    }
  }));
}

void GlooExchange::Interrupt() {
  if (receive_buffer_ != nullptr) receive_buffer_->abortWaitRecv();
  if (send_buffer_ != nullptr) send_buffer_->abortWaitSend();
}

absl::Status GlooExchange::Wait() {
  waited_ = true;
  const absl::Time deadline = SteadyNow() + group_->timeout();
  if (status_.ok()) status_ = group_->error();
  if (status_.ok() && receive_buffer_ != nullptr) status_ = WaitFor(true, deadline);
  if (status_.ok() && send_buffer_ != nullptr) status_ = WaitFor(false, deadline);
  if (!status_.ok()) status_ = group_->Fail(status_);
  // From here on Abort() must not reach the buffers.
  group_->Forget(this);
  receive_buffer_.reset();
  send_buffer_.reset();
  return status_;
}

// A pair that breaks tells the buffers that wait for their turn, not the one that it was writing or reading:
// hence a wait in slices, with a look at the pair after each.
absl::Status GlooExchange::WaitFor(bool receiving, absl::Time deadline) {
  UnboundBuffer* const buffer = receiving ? receive_buffer_.get() : send_buffer_.get();
  const int peer = receiving ? from_ : to_;
  absl::Status link;
  while (true) {
    const std::chrono::milliseconds slice = GlooTimeout(std::min(deadline - SteadyNow(), kLinkCheck));
    bool completed = false;
    const absl::Status waited = Guard("wait", [&] {
      completed = receiving ? buffer->waitRecv(nullptr, slice) : buffer->waitSend(nullptr, slice);
    });
    if (waited.ok()) return completed ? waited : absl::CancelledError(Describe("was interrupted"));
    if (!link.ok()) return link;
    // What completed before the pair broke shows in one more wait.
    link = Guard(Describe(absl::StrCat("failed with rank ", peer)), [&] { group_->CheckLink(peer); });
    if (link.ok() && SteadyNow() >= deadline) break;
  }
  return absl::DeadlineExceededError(
      Describe(absl::StrCat("waited ", absl::FormatDuration(group_->timeout()), " for rank ", peer)));
}

std::string GlooExchange::Describe(absl::string_view what) const {
  return absl::StrCat("exchange of rank ", group_->rank(), " (to ", to_, ", from ", from_, ") ", what);
}

absl::Status Gloo::Fail(absl::Status why) {
  absl::MutexLock lock(&mutex_);
  if (!error_.ok()) return error_;
  error_ = std::move(why);
  if (rendezvous_ != nullptr) rendezvous_->Abort();
  for (int peer = 0; peer < world_size(); ++peer) {
    // A reset before a peer's event thread has looked at the connection throws there, where nothing catches
    // it: before the group is formed, only what Connect() waits for is closed at once.
    if (peer == rank() || !(formed_ || peer == connecting_)) continue;
    Guard("close", [&] { pair(peer)->close(); }).IgnoreError();
  }
  for (GlooExchange* exchange : pending_) exchange->Interrupt();
  return error_;
}

void Gloo::Abort() {
  Fail(absl::CancelledError(absl::StrCat("rank ", rank(), " aborted its collectives"))).IgnoreError();
}

absl::Status Gloo::Connect(RendezvousClient* rendezvous) {
  {
    absl::MutexLock lock(&mutex_);
    if (!error_.ok()) return error_;
    rendezvous_ = rendezvous;
  }
  const absl::Time deadline = SteadyNow() + options_.connect_timeout;
  absl::Status status = ConnectAll(rendezvous, deadline);
  if (status.ok()) status = WaitForAll(deadline);
  operation_timeout_ = options_.timeout;
  absl::MutexLock lock(&mutex_);
  rendezvous_ = nullptr;
  // An Abort() shows as whatever it broke.
  if (!error_.ok() && absl::IsCancelled(error_)) return error_;
  if (status.ok()) {
    formed_ = true;
    return status;
  }
  if (SteadyNow() >= deadline || absl::IsDeadlineExceeded(status)) {
    status = absl::DeadlineExceededError(
        absl::StrCat("rank ", rank(), " of ", world_size(), " formed no group within ",
                     absl::FormatDuration(options_.connect_timeout), ": ", status.message()));
  }
  error_ = status;
  return status;
}

// Nobody may be done and gone while another rank still connects to it.
absl::Status Gloo::WaitForAll(absl::Time deadline) {
  {
    absl::MutexLock lock(&mutex_);
    connected_ = true;
  }
  operation_timeout_ = deadline - SteadyNow();
  const char here = 1;
  std::vector<char> all(static_cast<size_t>(world_size()));
  return AllGather(&here, 1, all.data());
}

absl::Status Gloo::ConnectAll(RendezvousClient* rendezvous, absl::Time deadline) {
  size_t address_bytes = 0;
  HW_RETURN_IF_ERROR(Publish(rendezvous, deadline, &address_bytes));
  for (int peer = 0; peer < world_size(); ++peer) {
    if (peer == rank()) continue;
    HW_RETURN_IF_ERROR(ConnectPeer(rendezvous, peer, address_bytes, deadline));
  }
  return absl::OkStatus();
}

// One listening socket for each peer; their addresses, in the peers' order, are this rank's value.
absl::Status Gloo::Publish(RendezvousClient* rendezvous, absl::Time deadline, size_t* address_bytes) {
  std::string addresses;
  HW_RETURN_IF_ERROR(Guard(absl::StrCat("sockets of rank ", rank(), " on ", options_.host), [&] {
    transport_ = device_->createContext(rank(), world_size());
    links_.resize(static_cast<size_t>(world_size()));
    // Connecting a pair takes up to five times the context's timeout.
    transport_->setTimeout(GlooTimeout(options_.connect_timeout / 5));
    for (int peer = 0; peer < world_size(); ++peer) {
      if (peer == rank()) continue;
      const std::vector<char> bytes = transport_->createPair(peer)->address().bytes();
      *address_bytes = bytes.size();
      addresses.append(bytes.data(), bytes.size());
    }
  }));
  if (world_size() == 1) return absl::OkStatus();
  return rendezvous->Put(Key(rank()), addresses, deadline - SteadyNow());
}

absl::Status Gloo::ConnectPeer(RendezvousClient* rendezvous, int peer, size_t address_bytes,
                               absl::Time deadline) {
  HW_ASSIGN_OR_RETURN(const std::string addresses, rendezvous->Get(Key(peer), deadline - SteadyNow()));
  if (addresses.size() != address_bytes * static_cast<size_t>(world_size() - 1)) {
    return absl::InternalError(absl::StrCat("rank ", peer, " published ", addresses.size(),
                                            " bytes of addresses; expected are ", world_size() - 1, " of ",
                                            address_bytes));
  }
  const size_t index = static_cast<size_t>(rank() < peer ? rank() : rank() - 1);
  const char* const begin = addresses.data() + index * address_bytes;
  const std::vector<char> bytes(begin, begin + address_bytes);
  {
    absl::MutexLock lock(&mutex_);
    if (!error_.ok()) return error_;
    connecting_ = peer;
  }
  const absl::Status status = Guard(absl::StrCat("connection of rank ", rank(), " to rank ", peer), [&] {
    const int family = gloo::transport::tcp::Address(bytes).getSockaddr().ss_family;
    if (family != AF_INET && family != AF_INET6) {
      throw std::runtime_error(absl::StrCat("address family ", family));
    }
    pair(peer)->connect(bytes);
    links_[peer] = MakeBuffer(nullptr, 0);
    pair(peer)->recv(links_[peer].get(), kSilentSlot, 0, 0);
  });
  absl::MutexLock lock(&mutex_);
  connecting_ = -1;
  return status;
}

// Nothing is under way: a copy within the rank, or an error.
class SettledExchange final : public PendingExchange {
 public:
  explicit SettledExchange(absl::Status status) : status_(std::move(status)) {}
  absl::Status Wait() override { return status_; }

 private:
  const absl::Status status_;
};

std::unique_ptr<PendingExchange> Gloo::StartExchange(int to, absl::Span<const char> send, int from,
                                                     absl::Span<char> receive) {
  const uint64_t slot = next_slot_++;
  if (to < 0 || to >= world_size() || from < 0 || from >= world_size() ||
      (to == rank()) != (from == rank()) || (to == rank() && send.size() != receive.size())) {
    return std::make_unique<SettledExchange>(absl::InvalidArgumentError(
        absl::StrCat("exchange of rank ", rank(), " to ", to, " (", send.size(), " bytes), from ", from, " (",
                     receive.size(), " bytes): not possible with ", world_size(), " ranks")));
  }
  if (to == rank()) {
    if (!send.empty()) std::memcpy(receive.data(), send.data(), send.size());
    return std::make_unique<SettledExchange>(error());
  }
  auto exchange = std::make_unique<GlooExchange>(this, to, send, from, receive);
  absl::MutexLock lock(&mutex_);
  *exchange->status() = error_;
  if (error_.ok() && !connected_)
    *exchange->status() = absl::FailedPreconditionError("the group is not formed");
  if (exchange->status()->ok()) {
    exchange->Start(slot);
    pending_.push_back(exchange.get());
  }
  return exchange;
}

}  // namespace

absl::StatusOr<std::unique_ptr<GlooCollectives>> GlooCollectives::Create(const GlooOptions& options) {
  if (options.world_size < 1 || options.rank < 0 || options.rank >= options.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", options.rank, " of ", options.world_size, " is not possible"));
  }
  static const bool tolerant = GlooToleratesLostPeers();
  if (!tolerant) return absl::InternalError("Gloo was linked so that a lost peer would end this process");
  std::shared_ptr<gloo::transport::Device> device;
  HW_RETURN_IF_ERROR(Guard(absl::StrCat("collectives on host ", options.host), [&] {
    gloo::transport::tcp::attr attributes;
    attributes.hostname = options.host;
    device = gloo::transport::tcp::CreateDevice(attributes);
  }));
  return std::make_unique<Gloo>(options, std::move(device));
}

}  // namespace headwater
