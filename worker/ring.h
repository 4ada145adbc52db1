// What ranks that form a ring do with any Collectives, and which K/V chunks have to travel it.
#ifndef HW_WORKER_RING_H_
#define HW_WORKER_RING_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

#include "worker/collectives.h"
#include "worker/partition.h"

namespace headwater {

// Collectives::AllGather by world_size - 1 exchanges with the neighbours.
absl::Status RingAllGather(Collectives* group, const void* in, uint64_t bytes, void* out);

// Of the rank that holds the prompt's last token that token, of the others none: the queries of the last
// layer.
std::vector<RankTokens> OnlyLastToken(const std::vector<RankTokens>& partition, int64_t num_tokens);

// In step s (0 .. world_size - 2) of the ring, rank r sends the chunk of rank (r - s) mod world_size to its
// right neighbour r + 1. Pure, so that every rank knows what its neighbours do.
class RingSchedule {
 public:
  // keys[r]: tokens whose K/V rank r computes; queries[r]: tokens whose attention it computes. Both of one
  // size.
  RingSchedule(std::vector<RankTokens> keys, std::vector<RankTokens> queries);

  int world_size() const { return static_cast<int>(keys_.size()); }
  int Owner(int rank, int step) const { return (rank - step + world_size()) % world_size(); }
  // False: neither the receiver of that step nor a rank after it has a query that may see the chunk; nothing
  // is sent.
  bool Sends(int rank, int step) const;
  bool Receives(int rank, int step) const;
  // Any query of `rank` that may see a key of `owner`'s chunk?
  bool Needs(int rank, int owner) const;

 private:
  std::vector<RankTokens> keys_;
  std::vector<RankTokens> queries_;
};

}  // namespace headwater

#endif  // HW_WORKER_RING_H_
