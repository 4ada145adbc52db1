#include "worker/link_probe.h"

#include <algorithm>
#include <memory>

#include "absl/types/span.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {
namespace {

constexpr int kRepeats = 3;
constexpr double kLongEnough = 20e-3;  // seconds: latency and the clock no longer show
constexpr double kShortest = 1e-9;
constexpr double kStalledShare = 0.05, kWaitedShare = 0.5;
constexpr uint64_t kLeastEgressBytes = uint64_t{8} << 20;

// Seconds of one message to the right neighbour and one from the left.
absl::StatusOr<double> TimeMessage(Collectives* collectives, absl::Span<const char> out,
                                   absl::Span<char> in) {
  const int world = collectives->world_size();
  const int right = (collectives->rank() + 1) % world;
  const int left = (collectives->rank() + world - 1) % world;
  const absl::Time start = Clock::Real()->Now();
  HW_RETURN_IF_ERROR(collectives->StartExchange(right, out, left, in)->Wait());
  return std::max(kShortest, absl::ToDoubleSeconds(Clock::Real()->Now() - start));
}

// The longest of all ranks' times. Every rank has begun when it returns.
absl::StatusOr<double> Longest(Collectives* collectives, double seconds) {
  std::vector<double> all(static_cast<size_t>(collectives->world_size()));
  HW_RETURN_IF_ERROR(collectives->AllGather(&seconds, sizeof(seconds), all.data()));
  return *std::max_element(all.begin(), all.end());
}

}  // namespace

absl::StatusOr<double> MeasureLink(Collectives* collectives) {
  HW_CHECK(collectives->world_size() > 1);
  const std::vector<char> out(kMostProbeBytes, 'h');
  std::vector<char> in(kMostProbeBytes);
  // Ranks come from forming the group at different times: the first message would count the difference.
  HW_RETURN_IF_ERROR(Longest(collectives, 0).status());
  for (uint64_t bytes = kLeastProbeBytes;; bytes *= 4) {
    double best = 0;
    for (int i = 0; i < kRepeats; ++i) {
      HW_ASSIGN_OR_RETURN(const double mine, TimeMessage(collectives, absl::MakeSpan(out).first(bytes),
                                                         absl::MakeSpan(in).first(bytes)));
      HW_ASSIGN_OR_RETURN(const double slowest, Longest(collectives, mine));
      best = i == 0 ? slowest : std::min(best, slowest);
    }
    if (best >= kLongEnough || bytes >= kMostProbeBytes) return static_cast<double>(bytes) / best;
  }
}

EgressRate MeasureEgress(uint64_t bytes, const std::vector<KvLayerTimes>& layers, absl::Duration stall,
                         absl::Duration tail, absl::Duration total) {
  KvLayerTimes all;
  for (const KvLayerTimes& layer : layers) {
    all.first_submitted = std::min(all.first_submitted, layer.first_submitted);
    all.last_acked = std::max(all.last_acked, layer.last_acked);
  }
  const absl::Duration span = all.last_acked - all.first_submitted;
  EgressRate rate;
  if (bytes < kLeastEgressBytes || span <= absl::ZeroDuration()) return rate;
  rate.bytes_per_s = static_cast<double>(bytes) / absl::ToDoubleSeconds(span);
  rate.waited = stall >= kStalledShare * total || stall + tail >= kWaitedShare * span;
  return rate;
}

}  // namespace headwater
