// A KvSender that sends nothing, where compute alone is timed.
#ifndef HW_KVTRANSFER_DISCARDING_SENDER_H_
#define HW_KVTRANSFER_DISCARDING_SENDER_H_

#include <cstdint>
#include <functional>
#include <optional>

#include "absl/status/status.h"

#include "kvtransfer/sender.h"

namespace headwater {

// Drops blocks as soon as they are handed over; none is ever acknowledged.
class DiscardingSender : public KvSender {
 public:
  absl::Status Submit(const KvBlockId&, const void*, std::function<void()> done) override {
    done();
    return absl::OkStatus();
  }
  absl::Status Finish() override { return absl::OkStatus(); }
  void Cancel() override {}
  absl::Status status() const override { return absl::OkStatus(); }
  KvSenderStats Stats() const override { return {}; }
  std::optional<KvShare> AckedBelow(uint32_t) const override { return std::nullopt; }
  std::vector<KvLayerTimes> LayerTimes() const override { return {}; }
};

}  // namespace headwater

#endif  // HW_KVTRANSFER_DISCARDING_SENDER_H_
