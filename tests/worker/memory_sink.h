// MemorySink: a KvSender that keeps the blocks in memory, for tests of the prefill loop.
#ifndef HW_TESTS_WORKER_MEMORY_SINK_H_
#define HW_TESTS_WORKER_MEMORY_SINK_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "kvtransfer/sender.h"

namespace headwater::testing {

// The cache as ranks write it: one byte string per layer and kind, and how often each byte's block came.
class KvCapture {
 public:
  explicit KvCapture(const KvGeometry& geometry)
      : geometry_(geometry), bytes_(geometry.total_bytes(), '\0'), times_(geometry.num_blocks(), 0) {}

  void Store(const KvBlockId& id, const void* data);
  const KvGeometry& geometry() const { return geometry_; }
  // All tensors, one behind the other. Call when the ranks are done.
  const std::string& bytes() const { return bytes_; }
  // One layer's K or V as f32.
  std::vector<float> Tensor(uint32_t layer, KvKind kind) const;
  // How often each block was stored.
  const std::vector<int>& times() const { return times_; }

 private:
  const KvGeometry geometry_;
  absl::Mutex mutex_;
  std::string bytes_;
  std::vector<int> times_;
};

class MemorySink final : public KvSender {
 public:
  enum class Mode {
    kAcknowledge,  // a thread stores and acknowledges; the data is read as late as possible
    kHold,         // nothing is acknowledged before Cancel()
  };
  MemorySink(KvCapture* capture, Mode mode);
  ~MemorySink() override;

  absl::Status Submit(const KvBlockId& block, const void* data, std::function<void()> done) override;
  absl::Status Finish() override;
  void Cancel() override;
  absl::Status status() const override;
  KvSenderStats Stats() const override;
  std::optional<KvShare> AckedBelow(uint32_t layer) const override;
  std::vector<KvLayerTimes> LayerTimes() const override { return {}; }

  // Most blocks that were submitted and not acknowledged.
  uint64_t most_outstanding() const;
  // Waits for `count` submitted blocks.
  void WaitSubmitted(uint64_t count) const;

 private:
  struct Item {
    KvBlockId id;
    const void* data;
    uint32_t crc32c;
    std::function<void()> done;
  };
  void Deliver();

  KvCapture* const capture_;
  const Mode mode_;
  mutable absl::Mutex mutex_;
  std::deque<Item> items_ ABSL_GUARDED_BY(mutex_);
  uint64_t submitted_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t acked_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t most_ ABSL_GUARDED_BY(mutex_) = 0;
  KvSenderStats stats_ ABSL_GUARDED_BY(mutex_);
  LayerShares shares_ ABSL_GUARDED_BY(mutex_);
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_MEMORY_SINK_H_
