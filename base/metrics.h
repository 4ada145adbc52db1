// Prometheus metrics of one process. Names carry the prefix "headwater_", base units and, for counters,
// "_total".
#ifndef HW_BASE_METRICS_H_
#define HW_BASE_METRICS_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

namespace headwater {

class HttpServer;
struct HttpAnswer;
struct HttpRequest;

using MetricLabels = std::map<std::string, std::string>;

// Owns the registry and, once Serve() has been called, the /metrics listener. Thread-safe. Metrics returned
// live as long as this object. A label value set grows no further than the callers' closed sets: never label
// by what a client sends.
class Metrics {
 public:
  // Adds headwater_build_info{version, component}.
  explicit Metrics(absl::string_view component);
  ~Metrics();

  // Asking again for the same name and labels returns the same metric.
  prometheus::Counter& Counter(const std::string& name, const std::string& help,
                               const MetricLabels& labels = {});
  prometheus::Gauge& Gauge(const std::string& name, const std::string& help, const MetricLabels& labels = {});
  // Seconds, with buckets from 1 ms to 2560 s.
  prometheus::Histogram& Seconds(const std::string& name, const std::string& help,
                                 const MetricLabels& labels = {});
  prometheus::Histogram& Histogram(const std::string& name, const std::string& help,
                                   const prometheus::Histogram::BucketBoundaries& buckets,
                                   const MetricLabels& labels = {});

  // Adds headwater_config_info{sha256}; nothing where that is empty.
  void AddConfig(const std::string& sha256);
  // Of what is served beside the metrics here. Before Serve().
  void Add(std::shared_ptr<prometheus::Collectable> collectable);

  // Serves /metrics, with ProcessStats, by HTTP in plaintext on `address` (ADDRESS:PORT; empty: does
  // nothing); clients that are slow are dropped after 2 s. INVALID_ARGUMENT; UNAVAILABLE: the address cannot
  // be bound.
  absl::Status Serve(const std::string& address);

 private:
  HttpAnswer Answer(const HttpRequest& request) const;

  std::shared_ptr<prometheus::Registry> registry_;
  std::vector<std::shared_ptr<prometheus::Collectable>> collectables_;
  std::unique_ptr<HttpServer> server_;  // goes first: its threads collect
};

}  // namespace headwater

#endif  // HW_BASE_METRICS_H_
