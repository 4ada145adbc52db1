// Working memory of model calls: at most one buffer per call in flight, and one kept while idle.
#ifndef HW_MODEL_SCRATCH_H_
#define HW_MODEL_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace headwater {

inline constexpr size_t kScratchAlignment = 64;

// Sizes of parts laid one after the other, each aligned.
constexpr uint64_t AlignedBytes(uint64_t bytes) {
  return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}

// Thread-safe.
class ScratchPool {
 public:
  struct Buffer {
    struct Free {
      void operator()(uint8_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint8_t, Free> memory;
    uint64_t bytes = 0;
  };

  // A buffer on loan; the destructor gives it back. Parts are handed out front to back and are not
  // initialised.
  class Loan {
   public:
    Loan(ScratchPool* pool, Buffer buffer) : pool_(pool), buffer_(std::move(buffer)) {}
    Loan(Loan&& other) noexcept : pool_(other.pool_), buffer_(std::move(other.buffer_)), used_(other.used_) {
      other.pool_ = nullptr;
    }
    Loan& operator=(Loan&&) = delete;
    ~Loan() {
      if (pool_ != nullptr) pool_->Return(std::move(buffer_));
    }

    // The next AlignedBytes(bytes); all parts together must fit what was acquired.
    void* Part(uint64_t bytes);

   private:
    ScratchPool* pool_;
    Buffer buffer_;
    uint64_t used_ = 0;
  };

  // RESOURCE_EXHAUSTED: no memory, with the bytes asked.
  absl::StatusOr<Loan> Acquire(uint64_t bytes);

 private:
  void Return(Buffer buffer);

  absl::Mutex mutex_;
  Buffer idle_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headwater

#endif  // HW_MODEL_SCRATCH_H_
