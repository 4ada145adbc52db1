// TransportStats: connections that were refused or cut, and a transport's certificate, as metrics.
#ifndef HW_BASE_RPC_TRANSPORT_STATS_H_
#define HW_BASE_RPC_TRANSPORT_STATS_H_

#include <memory>
#include <utility>
#include <vector>

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include "base/rpc/transport.h"

namespace headwater {

class TransportStats final : public prometheus::Collectable {
 public:
  // transport: null, which is plaintext, has no certificate.
  explicit TransportStats(std::shared_ptr<const Transport> transport) : transport_(std::move(transport)) {}

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::shared_ptr<const Transport> transport_;
};

}  // namespace headwater

#endif  // HW_BASE_RPC_TRANSPORT_STATS_H_
