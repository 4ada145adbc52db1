#include "worker/group_report.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"

namespace headwater {
namespace {

std::string NoteOf(v1::AttentionFallback fallback, bool over_bound) {
  switch (fallback) {
    case v1::ATTENTION_FALLBACK_DENSE_RECALL:
      return "recall stayed under min_recall";
    case v1::ATTENTION_FALLBACK_DENSE_BY_POLICY:
      return "the policy reads everything here";
    case v1::ATTENTION_FALLBACK_DENSITY_BOUND:
      return over_bound
                 ? absl::StrCat("the policy asked for more than the bound, and after ",
                                RecallContract::kMostRounds, " more selections the layer is still over it")
                 : "the policy asked for more than the bound";
    case v1::ATTENTION_FALLBACK_DENSITY_FLOOR:
      return "what is always read is over the bound";
    default:
      return "";
  }
}

// Those that are dense for want of room, or the most that can be.
uint32_t NoRoomTiles(const GroupTiles& tiles) {
  const uint32_t usual = tiles.usual == GroupTiles::kUnknown ? 0 : std::min(tiles.dense, tiles.usual);
  return std::min(tiles.dense - usual, tiles.overflows);
}

void ReportNoRoom(const GroupTiles& tiles, v1::AttentionGroup* group) {
  const uint32_t no_room = NoRoomTiles(tiles);
  if (no_room == 0) return;
  group->set_no_room_tiles(no_room);
  if (group->fallback() == v1::ATTENTION_FALLBACK_UNSPECIFIED) {
    group->set_fallback(v1::ATTENTION_FALLBACK_DENSE_NO_ROOM);
  }
  absl::StrAppend(group->mutable_note(), group->note().empty() ? "" : "; ", tiles.dense,
                  " dense tiles; lists of ", tiles.overflows, " tiles of the layer found no room");
}

}  // namespace

void ReportLists(const GroupOutcome* outcome, const GroupTiles& tiles, v1::AttentionGroup* group) {
  bool dense = false;
  if (outcome != nullptr) {
    dense = outcome->forced_density == 0 && outcome->setting.threshold == 0;
    if (outcome->forced_density > 0) {
      group->set_forced_density(outcome->forced_density);
    } else {
      group->set_threshold(static_cast<double>(outcome->setting.threshold));
    }
    group->set_window_blocks(static_cast<uint32_t>(outcome->setting.window_blocks));
    group->set_rounds(outcome->rounds);
    group->set_fallback(outcome->fallback);
  }
  if (dense && group->fallback() == v1::ATTENTION_FALLBACK_UNSPECIFIED) {
    group->set_fallback(v1::ATTENTION_FALLBACK_DENSE_BY_POLICY);
  }
  group->set_note(NoteOf(group->fallback(), outcome != nullptr && outcome->over_bound));
  if (!dense) ReportNoRoom(tiles, group);
}

void ReportDense(v1::AttentionGroup* group) {
  group->set_fallback(v1::ATTENTION_FALLBACK_DENSE_BY_POLICY);
  group->set_note(NoteOf(group->fallback(), false));
}

void ReportRanges(uint32_t overflows, v1::AttentionGroup* group) {
  if (overflows == 0) return;
  group->set_no_room_tiles(overflows);
  group->set_fallback(v1::ATTENTION_FALLBACK_DENSE_NO_ROOM);
  group->set_note(absl::StrCat("the ranges of ", overflows, " tiles found no room"));
}

}  // namespace headwater
