#include "worker/ring.h"

#include <cstring>
#include <utility>

#include "base/log.h"
#include "base/status_macros.h"

namespace headwater {

absl::Status RingAllGather(Collectives* group, const void* in, uint64_t bytes, void* out) {
  const int world = group->world_size();
  const int rank = group->rank();
  char* const rows = static_cast<char*>(out);
  const auto row = [&](int owner) { return rows + static_cast<uint64_t>(owner) * bytes; };
  std::memmove(row(rank), in, bytes);
  for (int step = 0; step + 1 < world; ++step) {
    const int sent = (rank - step + world) % world;
    const int received = (sent - 1 + world) % world;
    auto exchange = group->StartExchange((rank + 1) % world, absl::MakeConstSpan(row(sent), bytes),
                                         (rank - 1 + world) % world, absl::MakeSpan(row(received), bytes));
    HW_RETURN_IF_ERROR(exchange->Wait());
  }
  return absl::OkStatus();
}

std::vector<RankTokens> OnlyLastToken(const std::vector<RankTokens>& partition, int64_t num_tokens) {
  std::vector<RankTokens> queries(partition.size());
  for (size_t rank = 0; rank < partition.size(); ++rank) {
    const RankTokens& tokens = partition[rank];
    if (!tokens.empty() && tokens.back().end == num_tokens) queries[rank] = {{num_tokens - 1, num_tokens}};
  }
  return queries;
}

RingSchedule::RingSchedule(std::vector<RankTokens> keys, std::vector<RankTokens> queries)
    : keys_(std::move(keys)), queries_(std::move(queries)) {
  HW_CHECK(!keys_.empty() && keys_.size() == queries_.size());
}

bool RingSchedule::Needs(int rank, int owner) const {
  const RankTokens& keys = keys_[owner];
  const RankTokens& queries = queries_[rank];
  return !keys.empty() && !queries.empty() && keys.front().begin < queries.back().end;
}

bool RingSchedule::Sends(int rank, int step) const {
  const int owner = Owner(rank, step);
  // The chunk has still to reach the ranks after `rank` up to the one left of its owner.
  for (int hop = step + 1; hop < world_size(); ++hop) {
    if (Needs((owner + hop) % world_size(), owner)) return true;
  }
  return false;
}

bool RingSchedule::Receives(int rank, int step) const {
  return Sends((rank - 1 + world_size()) % world_size(), step);
}

}  // namespace headwater
