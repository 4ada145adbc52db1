// The edges of absl::Mutex and absl::CondVar. The packaged gRPC takes its locks through them, so without this
// every datum that such a lock guards would look raced for.
#include <cstring>

#include "absl/synchronization/mutex.h"

#include "cmake/tsan/next_definition.h"

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

#define HW_TEXT(x) #x
#define HW_TEXT_OF(x) HW_TEXT(x)

namespace {

// Abseil's definition of `member`, given in mangled form ("5Mutex4LockEv").
template <typename Function>
Function Real(const char* member, std::atomic<void*>* cache) {
  constexpr const char* kSpace = HW_TEXT_OF(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  char name[256];
  std::snprintf(name, sizeof name, "_ZN4absl%zu%s%s", std::strlen(kSpace), kSpace, member);
  return headwater::tsan::NextDefinition<Function>(name, cache);
}

// Conditions are evaluated inside Abseil, under the lock but outside the edges reported here; they only read.
class IgnoreReads {
 public:
  IgnoreReads() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~IgnoreReads() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

struct AcquireAtEnd {
  ~AcquireAtEnd() { __tsan_acquire(lock); }
  void* lock;
};

template <typename Result, typename... Types>
Result Call(const char* member, std::atomic<void*>* cache, Types... values) {
  const IgnoreReads ignore;
  return Real<Result (*)(Types...)>(member, cache)(values...);
}

}  // namespace

// Each member takes the lock, gives it up, or does both while it waits.
namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  Call<void, Mutex*>("5Mutex4LockEv", &cache, this);
}

void Mutex::ReaderLock() {
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  Call<void, Mutex*>("5Mutex10ReaderLockEv", &cache, this);
}

bool Mutex::TryLock() {
  static std::atomic<void*> cache{nullptr};
  const bool locked = Call<bool, Mutex*>("5Mutex7TryLockEv", &cache, this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::Unlock() {
  __tsan_release(this);
  static std::atomic<void*> cache{nullptr};
  Call<void, Mutex*>("5Mutex6UnlockEv", &cache, this);
}

void Mutex::ReaderUnlock() {
  __tsan_release(this);
  static std::atomic<void*> cache{nullptr};
  Call<void, Mutex*>("5Mutex12ReaderUnlockEv", &cache, this);
}

void Mutex::LockWhen(const Condition& condition) {
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  Call<void, Mutex*, const Condition&>("5Mutex8LockWhenERKNS0_9ConditionE", &cache, this, condition);
}

bool Mutex::LockWhenWithTimeout(const Condition& condition, absl::Duration timeout) {
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  return Call<bool, Mutex*, const Condition&, absl::Duration>(
      "5Mutex19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE", &cache, this, condition, timeout);
}

bool Mutex::LockWhenWithDeadline(const Condition& condition, absl::Time deadline) {
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  return Call<bool, Mutex*, const Condition&, absl::Time>(
      "5Mutex20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE", &cache, this, condition, deadline);
}

void Mutex::Await(const Condition& condition) {
  __tsan_release(this);
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  Call<void, Mutex*, const Condition&>("5Mutex5AwaitERKNS0_9ConditionE", &cache, this, condition);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, absl::Duration timeout) {
  __tsan_release(this);
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  return Call<bool, Mutex*, const Condition&, absl::Duration>(
      "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE", &cache, this, condition, timeout);
}

bool Mutex::AwaitWithDeadline(const Condition& condition, absl::Time deadline) {
  __tsan_release(this);
  const AcquireAtEnd acquire{this};
  static std::atomic<void*> cache{nullptr};
  return Call<bool, Mutex*, const Condition&, absl::Time>(
      "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE", &cache, this, condition, deadline);
}

void CondVar::Wait(Mutex* mutex) {
  __tsan_release(mutex);
  const AcquireAtEnd acquire{mutex};
  static std::atomic<void*> cache{nullptr};
  Call<void, CondVar*, Mutex*>("7CondVar4WaitEPNS0_5MutexE", &cache, this, mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, absl::Duration timeout) {
  __tsan_release(mutex);
  const AcquireAtEnd acquire{mutex};
  static std::atomic<void*> cache{nullptr};
  return Call<bool, CondVar*, Mutex*, absl::Duration>("7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE",
                                                      &cache, this, mutex, timeout);
}

bool CondVar::WaitWithDeadline(Mutex* mutex, absl::Time deadline) {
  __tsan_release(mutex);
  const AcquireAtEnd acquire{mutex};
  static std::atomic<void*> cache{nullptr};
  return Call<bool, CondVar*, Mutex*, absl::Time>("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE", &cache,
                                                  this, mutex, deadline);
}

ABSL_NAMESPACE_END
}  // namespace absl
