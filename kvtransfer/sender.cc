#include "kvtransfer/sender.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "base/rpc/grpc_status.h"
#include "kvtransfer/send_ledger.h"
#include "kvtransfer/sender_channel.h"

namespace headwater {
namespace {

constexpr int kMostChannels = 64;

KvSenderOptions Bounded(KvSenderOptions options) {
  options.num_channels = std::clamp(options.num_channels, 1, kMostChannels);
  return options;
}

absl::Status Cancelled(absl::string_view why) {
  return MakeError(absl::StatusCode::kCancelled, v1::ERROR_REASON_CANCELLED, why);
}

class GrpcKvSender final : public KvSender {
 public:
  GrpcKvSender(const KvSenderOptions& options, const KvGeometry& geometry)
      : ledger_(
            std::make_shared<SendLedger>(options, geometry, Clock::Real(), [this](bool all) { Wake(all); })) {
    for (int i = 0; i < options.num_channels; ++i) {
      channels_.push_back(std::make_unique<SenderChannel>(options, geometry, i, ledger_));
    }
    for (const auto& channel : channels_) channel->Start();
    completions_ = std::thread([ledger = ledger_] { ledger->RunCompletions(); });
  }

  ~GrpcKvSender() override {
    ledger_->Fail(Cancelled("the KV sender was destroyed"));
    for (const auto& channel : channels_) channel->Join();
    ledger_->Stop();
    completions_.join();
  }

  absl::Status Submit(const KvBlockId& block, const void* data, std::function<void()> done) override {
    return ledger_->Submit(block, data, std::move(done));
  }
  absl::Status Finish() override { return ledger_->Finish(); }
  void Cancel() override { ledger_->Fail(Cancelled("the KV transfer was cancelled")); }
  absl::Status status() const override { return ledger_->status(); }
  KvSenderStats Stats() const override { return ledger_->Stats(); }
  std::optional<KvShare> AckedBelow(uint32_t layer) const override { return ledger_->AckedBelow(layer); }
  std::vector<KvLayerTimes> LayerTimes() const override { return ledger_->LayerTimes(); }

 private:
  void Wake(bool all) {
    for (const auto& channel : channels_) channel->Wake(all);
  }

  const std::shared_ptr<SendLedger> ledger_;
  std::vector<std::unique_ptr<SenderChannel>> channels_;
  std::thread completions_;
};

}  // namespace

std::unique_ptr<KvSender> KvSender::Create(const KvSenderOptions& options, const KvGeometry& geometry) {
  return std::make_unique<GrpcKvSender>(Bounded(options), geometry);
}

}  // namespace headwater
