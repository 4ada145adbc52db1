// What became of the lists of one KV head in one layer, as the report says it. Pure.
#ifndef HW_WORKER_GROUP_REPORT_H_
#define HW_WORKER_GROUP_REPORT_H_

#include <cstdint>

#include "headwater/v1/types.pb.h"
#include "worker/recall_contract.h"

namespace headwater {

// Query tiles of a group.
struct GroupTiles {
  static constexpr uint32_t kUnknown = UINT32_MAX;

  uint32_t dense = 0;         // in all its lists
  uint32_t usual = kUnknown;  // that are dense where all lists find room
  uint32_t overflows = 0;     // of the whole layer: lists that found none
};

// Sets what the group's lists were made with, its fallback, note and no_room_tiles. outcome: null where the
// policy has no settings.
void ReportLists(const GroupOutcome* outcome, const GroupTiles& tiles, v1::AttentionGroup* group);

// Likewise of a group whose layer is dense as a whole, by the policy's rule.
void ReportDense(v1::AttentionGroup* group);

// Likewise of key ranges, of which those of `overflows` tiles found no room.
void ReportRanges(uint32_t overflows, v1::AttentionGroup* group);

}  // namespace headwater

#endif  // HW_WORKER_GROUP_REPORT_H_
