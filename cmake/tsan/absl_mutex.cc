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

}  // namespace

// Defines a member that takes the lock, that gives it up, or that does both while it waits.
#define HW_CALL(Result, mangled, Types, values) \
  static std::atomic<void*> real{nullptr};      \
  IgnoreReads ignore;                           \
  return Real<Result(*) Types>(mangled, &real) values

namespace absl {
ABSL_NAMESPACE_BEGIN

namespace {

struct AcquireAtEnd {
  ~AcquireAtEnd() { __tsan_acquire(lock); }
  void* lock;
};

}  // namespace

void Mutex::Lock() {
  AcquireAtEnd acquire{this};
  HW_CALL(void, "5Mutex4LockEv", (Mutex*), (this));
}

void Mutex::ReaderLock() {
  AcquireAtEnd acquire{this};
  HW_CALL(void, "5Mutex10ReaderLockEv", (Mutex*), (this));
}

bool Mutex::TryLock() {
  AcquireAtEnd acquire{this};
  HW_CALL(bool, "5Mutex7TryLockEv", (Mutex*), (this));
}

void Mutex::Unlock() {
  __tsan_release(this);
  HW_CALL(void, "5Mutex6UnlockEv", (Mutex*), (this));
}

void Mutex::ReaderUnlock() {
  __tsan_release(this);
  HW_CALL(void, "5Mutex12ReaderUnlockEv", (Mutex*), (this));
}

void Mutex::LockWhen(const Condition& condition) {
  AcquireAtEnd acquire{this};
  HW_CALL(void, "5Mutex8LockWhenERKNS0_9ConditionE", (Mutex*, const Condition&), (this, condition));
}

bool Mutex::LockWhenWithTimeout(const Condition& condition, absl::Duration timeout) {
  AcquireAtEnd acquire{this};
  HW_CALL(bool, "5Mutex19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE",
          (Mutex*, const Condition&, absl::Duration), (this, condition, timeout));
}

bool Mutex::LockWhenWithDeadline(const Condition& condition, absl::Time deadline) {
  AcquireAtEnd acquire{this};
  HW_CALL(bool, "5Mutex20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE",
          (Mutex*, const Condition&, absl::Time), (this, condition, deadline));
}

void Mutex::Await(const Condition& condition) {
  __tsan_release(this);
  AcquireAtEnd acquire{this};
  HW_CALL(void, "5Mutex5AwaitERKNS0_9ConditionE", (Mutex*, const Condition&), (this, condition));
}

bool Mutex::AwaitWithTimeout(const Condition& condition, absl::Duration timeout) {
  __tsan_release(this);
  AcquireAtEnd acquire{this};
  HW_CALL(bool, "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE",
          (Mutex*, const Condition&, absl::Duration), (this, condition, timeout));
}

bool Mutex::AwaitWithDeadline(const Condition& condition, absl::Time deadline) {
  __tsan_release(this);
  AcquireAtEnd acquire{this};
  HW_CALL(bool, "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE",
          (Mutex*, const Condition&, absl::Time), (this, condition, deadline));
}

void CondVar::Wait(Mutex* mutex) {
  __tsan_release(mutex);
  AcquireAtEnd acquire{mutex};
  HW_CALL(void, "7CondVar4WaitEPNS0_5MutexE", (CondVar*, Mutex*), (this, mutex));
}

bool CondVar::WaitWithTimeout(Mutex* mutex, absl::Duration timeout) {
  __tsan_release(mutex);
  AcquireAtEnd acquire{mutex};
  HW_CALL(bool, "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE", (CondVar*, Mutex*, absl::Duration),
          (this, mutex, timeout));
}

bool CondVar::WaitWithDeadline(Mutex* mutex, absl::Time deadline) {
  __tsan_release(mutex);
  AcquireAtEnd acquire{mutex};
  HW_CALL(bool, "7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE", (CondVar*, Mutex*, absl::Time),
          (this, mutex, deadline));
}

ABSL_NAMESPACE_END
}  // namespace absl
