#include "coordinator/resume.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace headwater {

bool KeepCheckpoint(const v1::RankCheckpoint& report, uint32_t least_layer, uint32_t num_layers,
                    std::vector<Checkpoint>* kept) {
  constexpr size_t kMaxKept = 2;
  const uint32_t newest = kept->empty() ? 0 : kept->back().layer;
  if (report.layer() < std::max({least_layer, newest, 1u}) || report.layer() > num_layers) return false;
  if (report.kv_digest_share().size() != kDigestBytes) return false;
  if (report.layer() == newest) return true;
  if (kept->size() == kMaxKept) kept->erase(kept->begin());
  kept->push_back({report.layer(), {report.kv_digest_share(), report.kv_bytes(), report.kv_blocks()}});
  return true;
}

absl::StatusOr<std::vector<uint32_t>> FindProviders(const Resume& resume,
                                                    const absl::flat_hash_set<std::string>& living,
                                                    const v1::PrefillPlan& plan) {
  const auto& planned = plan.worker_ids();
  const size_t world_size = resume.holders.size();
  std::vector<uint32_t> providers;
  for (size_t rank = 0; rank < world_size; ++rank) {
    auto provider = planned.end();
    for (const size_t holder : {rank, (rank + 1) % world_size}) {
      const std::string& id = resume.holders[holder].worker_id;
      if (provider == planned.end() && living.contains(id)) {
        provider = std::find(planned.begin(), planned.end(), id);
      }
    }
    if (provider == planned.end()) {
      return absl::NotFoundError(absl::StrCat("neither worker ", resume.holders[rank].worker_id, " nor ",
                                              resume.holders[(rank + 1) % world_size].worker_id,
                                              " is there with the state of rank ", rank));
    }
    providers.push_back(static_cast<uint32_t>(provider - planned.begin()));
  }
  return providers;
}

}  // namespace headwater
