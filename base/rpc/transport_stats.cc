#include "base/rpc/transport_stats.h"

#include "absl/time/time.h"

#include "base/rpc/accept_limit.h"
#include "base/rpc/reset_limit.h"

namespace headwater {
namespace {

constexpr char kRefusedName[] = "headwater_connections_refused_total";
constexpr char kCutName[] = "headwater_connections_cut_total";
constexpr char kExpiryName[] = "headwater_tls_certificate_expiry_seconds";
constexpr char kFailuresName[] = "headwater_tls_reload_failures_total";

prometheus::MetricFamily Family(const char* name, const char* help, prometheus::MetricType type) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  family.metric.emplace_back();
  return family;
}

}  // namespace

std::vector<prometheus::MetricFamily> TransportStats::Collect() const {
  prometheus::MetricFamily refused =
      Family(kRefusedName, "Connections closed at once because too many descriptors were open.",
             prometheus::MetricType::Counter);
  refused.metric[0].counter.value = static_cast<double>(NumRefusedConnections());
  prometheus::MetricFamily cut =
      Family(kCutName, "Connections closed because their clients reset calls faster than the limit.",
             prometheus::MetricType::Counter);
  cut.metric[0].counter.value = static_cast<double>(NumCutConnections());
  if (transport_ == nullptr) return {refused, cut};
  prometheus::MetricFamily expiry =
      Family(kExpiryName, "Unix time at which the certificate in use ends, with --tls_cert.",
             prometheus::MetricType::Gauge);
  expiry.metric[0].gauge.value = static_cast<double>(absl::ToUnixSeconds(transport_->identity().not_after));
  prometheus::MetricFamily failures = Family(
      kFailuresName,
      "Looks at --tls_cert, --tls_key and --tls_ca that found what cannot be used; what was there before "
      "stays in use.",
      prometheus::MetricType::Counter);
  failures.metric[0].counter.value = static_cast<double>(transport_->reload_failures());
  return {refused, cut, expiry, failures};
}

}  // namespace headwater
