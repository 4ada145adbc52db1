#include "worker/inprocess_collectives.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "base/clock.h"
#include "worker/ring.h"

namespace headwater {
namespace {

enum class SendState { kPosted, kCopying, kDone };

struct Posted {
  absl::Span<const char> data;
  SendState state = SendState::kPosted;
};

// One direction between two ranks. Tickets count the transfers at either end, so that they pair in order.
struct Link {
  uint64_t next_send = 0;
  uint64_t next_receive = 0;
  std::map<uint64_t, Posted*> posted;
};

struct Group {
  Group(int size, absl::Duration limit)
      : world_size(size), timeout(limit), links(static_cast<size_t>(size) * size), errors(size) {}

  Link& link(int from, int to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    return links[static_cast<size_t>(from) * world_size + to];
  }
  // Ends rank `rank`'s part in the group; the first error stays.
  void Fail(int rank, absl::Status why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (errors[rank].ok()) errors[rank] = std::move(why);
    changed.SignalAll();
  }

  const int world_size;
  const absl::Duration timeout;
  absl::Mutex mutex;
  absl::CondVar changed;
  std::vector<Link> links ABSL_GUARDED_BY(mutex);
  // Not OK: the rank has left the group.
  std::vector<absl::Status> errors ABSL_GUARDED_BY(mutex);
};

struct Transfer {
  int to = 0;
  absl::Span<const char> send;
  int from = 0;
  absl::Span<char> receive;
};

class Exchange final : public PendingExchange {
 public:
  Exchange(std::shared_ptr<Group> group, int rank, const Transfer& transfer)
      : group_(std::move(group)), rank_(rank), transfer_(transfer) {
    absl::MutexLock lock(&group_->mutex);
    send_done_ = transfer.send.empty();
    receive_done_ = transfer.receive.empty();
    if (!send_done_) {
      posted_.data = transfer.send;
      Link& link = group_->link(rank, transfer.to);
      send_ticket_ = link.next_send++;
      link.posted[send_ticket_] = &posted_;
      group_->changed.SignalAll();
    }
    if (!receive_done_) receive_ticket_ = group_->link(transfer.from, rank).next_receive++;
  }

  ~Exchange() override {
    absl::MutexLock lock(&group_->mutex);
    if (!waited_) group_->Fail(rank_, absl::CancelledError(Describe("was given up")));
    Withdraw();
  }

  absl::Status Wait() override {
    const absl::Time deadline = SteadyNow() + group_->timeout;
    absl::MutexLock lock(&group_->mutex);
    waited_ = true;
    absl::Status status = Progress(deadline);
    if (!status.ok()) group_->Fail(rank_, status);
    Withdraw();
    return status;
  }

 private:
  absl::Status Progress(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(group_->mutex) {
    while (true) {
      if (!group_->errors[rank_].ok()) return group_->errors[rank_];
      if (!receive_done_) {
        absl::Status status = TryReceive();
        if (!status.ok()) return status;
      }
      send_done_ = send_done_ || posted_.state == SendState::kDone;
      if (send_done_ && receive_done_) return absl::OkStatus();
      const int peer = receive_done_ ? transfer_.to : transfer_.from;
      if (!group_->errors[peer].ok() && (receive_done_ ? posted_.state == SendState::kPosted : true)) {
        return absl::UnavailableError(Describe(absl::StrCat("failed: rank ", peer, " has left the group")));
      }
      if (group_->changed.WaitWithTimeout(&group_->mutex, deadline - SteadyNow()) &&
          SteadyNow() >= deadline) {
        return absl::DeadlineExceededError(
            Describe(absl::StrCat("waited ", absl::FormatDuration(group_->timeout), " for rank ", peer)));
      }
    }
  }

  absl::Status TryReceive() ABSL_EXCLUSIVE_LOCKS_REQUIRED(group_->mutex) {
    Link& link = group_->link(transfer_.from, rank_);
    const auto it = link.posted.find(receive_ticket_);
    if (it == link.posted.end()) return absl::OkStatus();
    Posted* const posted = it->second;
    if (posted->data.size() != transfer_.receive.size()) {
      return absl::InternalError(Describe(absl::StrCat("expected ", transfer_.receive.size(), " bytes, rank ",
                                                       transfer_.from, " sends ", posted->data.size())));
    }
    posted->state = SendState::kCopying;
    group_->mutex.Unlock();
    std::memcpy(transfer_.receive.data(), posted->data.data(), posted->data.size());
    group_->mutex.Lock();
    posted->state = SendState::kDone;
    receive_done_ = true;
    group_->changed.SignalAll();
    return absl::OkStatus();
  }

  // The caller's buffer is its own again after this.
  void Withdraw() ABSL_EXCLUSIVE_LOCKS_REQUIRED(group_->mutex) {
    if (transfer_.send.empty()) return;
    while (posted_.state == SendState::kCopying) group_->changed.Wait(&group_->mutex);
    Link& link = group_->link(rank_, transfer_.to);
    const auto it = link.posted.find(send_ticket_);
    if (it != link.posted.end() && it->second == &posted_) link.posted.erase(it);
  }

  std::string Describe(absl::string_view what) const {
    return absl::StrCat("exchange of rank ", rank_, " (to ", transfer_.to, ", from ", transfer_.from, ") ",
                        what);
  }

  const std::shared_ptr<Group> group_;
  const int rank_;
  const Transfer transfer_;
  Posted posted_ ABSL_GUARDED_BY(group_->mutex);
  uint64_t send_ticket_ = 0;
  uint64_t receive_ticket_ = 0;
  bool send_done_ = false;
  bool receive_done_ = false;
  bool waited_ = false;
};

class FailedExchange final : public PendingExchange {
 public:
  explicit FailedExchange(absl::Status status) : status_(std::move(status)) {}
  absl::Status Wait() override { return status_; }

 private:
  const absl::Status status_;
};

class Endpoint final : public Collectives {
 public:
  Endpoint(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}
  ~Endpoint() override {
    absl::MutexLock lock(&group_->mutex);
    group_->Fail(rank_, absl::CancelledError(absl::StrCat("rank ", rank_, " has left the group")));
  }

  int rank() const override { return rank_; }
  int world_size() const override { return group_->world_size; }

  std::unique_ptr<PendingExchange> StartExchange(int to, absl::Span<const char> send, int from,
                                                 absl::Span<char> receive) override {
    if (to < 0 || to >= world_size() || from < 0 || from >= world_size()) {
      return std::make_unique<FailedExchange>(absl::InvalidArgumentError(
          absl::StrCat("exchange to ", to, ", from ", from, ": world size is ", world_size())));
    }
    return std::make_unique<Exchange>(group_, rank_, Transfer{to, send, from, receive});
  }

  absl::Status AllGather(const void* in, uint64_t bytes, void* out) override {
    return RingAllGather(this, in, bytes, out);
  }

  void Abort() override {
    absl::MutexLock lock(&group_->mutex);
    group_->Fail(rank_, absl::CancelledError(absl::StrCat("rank ", rank_, " aborted its collectives")));
  }

 private:
  const std::shared_ptr<Group> group_;
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Collectives>> MakeInProcessGroup(int world_size, absl::Duration timeout) {
  const auto group = std::make_shared<Group>(world_size, timeout);
  std::vector<std::unique_ptr<Collectives>> endpoints;
  for (int rank = 0; rank < world_size; ++rank) endpoints.push_back(std::make_unique<Endpoint>(group, rank));
  return endpoints;
}

}  // namespace headwater
