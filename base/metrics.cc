#include "base/metrics.h"

#include <iterator>
#include <utility>

#include <prometheus/text_serializer.h>

#include "base/http_server.h"
#include "base/process_stats.h"
#include "base/status_macros.h"
#include "base/version.h"

namespace headwater {
namespace {

const prometheus::Histogram::BucketBoundaries& SecondsBuckets() {
  static const auto* const buckets = new prometheus::Histogram::BucketBoundaries{
      .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560};
  return *buckets;
}

}  // namespace

Metrics::Metrics(absl::string_view component) : registry_(std::make_shared<prometheus::Registry>()) {
  Gauge("headwater_build_info", "Always 1; the labels tell the build.",
        {{"version", kVersion}, {"component", std::string(component)}})
      .Set(1);
}

Metrics::~Metrics() = default;

prometheus::Counter& Metrics::Counter(const std::string& name, const std::string& help,
                                      const MetricLabels& labels) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(*registry_).Add(labels);
}

prometheus::Gauge& Metrics::Gauge(const std::string& name, const std::string& help,
                                  const MetricLabels& labels) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(*registry_).Add(labels);
}

prometheus::Histogram& Metrics::Seconds(const std::string& name, const std::string& help,
                                        const MetricLabels& labels) {
  return Histogram(name, help, SecondsBuckets(), labels);
}

prometheus::Histogram& Metrics::Histogram(const std::string& name, const std::string& help,
                                          const prometheus::Histogram::BucketBoundaries& buckets,
                                          const MetricLabels& labels) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry_).Add(labels, buckets);
}

void Metrics::AddConfig(const std::string& sha256) {
  if (sha256.empty()) return;
  Gauge("headwater_config_info",
        "Always 1; the label tells which configuration, but for what names the process.",
        {{"sha256", sha256}})
      .Set(1);
}

void Metrics::Add(std::shared_ptr<prometheus::Collectable> collectable) {
  collectables_.push_back(std::move(collectable));
}

absl::Status Metrics::Serve(const std::string& address) {
  if (address.empty()) return absl::OkStatus();
  Add(registry_);
  Add(std::make_shared<ProcessStats>());
  HW_ASSIGN_OR_RETURN(
      server_, HttpServer::Start(address, {.what = "metrics", .handler = [this](const HttpRequest& request) {
                                             return Answer(request);
                                           }}));
  return absl::OkStatus();
}

HttpAnswer Metrics::Answer(const HttpRequest& request) const {
  if (request.path != "/metrics") return {.status = 404};
  std::vector<prometheus::MetricFamily> families;
  for (const auto& collectable : collectables_) {
    std::vector<prometheus::MetricFamily> part = collectable->Collect();
    std::move(part.begin(), part.end(), std::back_inserter(families));
  }
  return {.type = "text/plain; version=0.0.4", .body = prometheus::TextSerializer().Serialize(families)};
}

}  // namespace headwater
