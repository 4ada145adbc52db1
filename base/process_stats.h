// ProcessStats: this process's CPU time, memory, threads and file descriptors, as Prometheus's own clients
// name them.
#ifndef HW_BASE_PROCESS_STATS_H_
#define HW_BASE_PROCESS_STATS_H_

#include <vector>

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

namespace headwater {

// Read from /proc when it is collected; what cannot be read is left out.
class ProcessStats final : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace headwater

#endif  // HW_BASE_PROCESS_STATS_H_
