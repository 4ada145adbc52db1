#include "worker/memory_budget.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace headwater {
namespace {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

// The number that the file holds; kNoLimit: no file, "max", or no number.
uint64_t ReadNumber(const std::string& path) {
  uint64_t value = 0;
  return absl::SimpleAtoi(absl::StripAsciiWhitespace(ReadAll(path)), &value) ? value : kNoLimit;
}

// Page cache that the kernel gives back before it kills: "inactive_file" (v2) or "total_inactive_file" (v1).
uint64_t ReclaimableIn(const std::string& folder) {
  const std::string stat = ReadAll(absl::StrCat(folder, "/memory.stat"));
  const absl::string_view wanted =
      absl::StrContains(stat, "total_inactive_file") ? "total_inactive_file" : "inactive_file";
  for (const absl::string_view line : absl::StrSplit(stat, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
    uint64_t bytes = 0;
    if (words.size() == 2 && words[0] == wanted && absl::SimpleAtoi(words[1], &bytes)) {
      return bytes;
    }
  }
  return 0;
}

uint64_t LeftIn(const std::string& folder, const char* limit_file, const char* usage_file) {
  const uint64_t limit = ReadNumber(absl::StrCat(folder, "/", limit_file));
  // v1 says "no limit" with a huge number.
  if (limit >= uint64_t{1} << 60) return kNoLimit;
  uint64_t usage = ReadNumber(absl::StrCat(folder, "/", usage_file));
  if (usage == kNoLimit) return limit;
  usage -= std::min(usage, ReclaimableIn(folder));
  return limit > usage ? limit - usage : 0;
}

// Of the group and of all groups above it.
uint64_t LeftInGroups(const std::string& mount, absl::string_view group, const char* limit_file,
                      const char* usage_file) {
  uint64_t left = LeftIn(mount, limit_file, usage_file);
  std::string folder = mount;
  const std::vector<absl::string_view> parts = absl::StrSplit(group, '/', absl::SkipEmpty());
  for (const absl::string_view part : parts) {
    absl::StrAppend(&folder, "/", part);
    left = std::min(left, LeftIn(folder, limit_file, usage_file));
  }
  return left;
}

}  // namespace

absl::StatusOr<uint64_t> AvailableMemoryBytes(const std::string& root) {
  uint64_t available = kNoLimit;
  const std::string meminfo = ReadAll(absl::StrCat(root, "/proc/meminfo"));
  for (const absl::string_view line : absl::StrSplit(meminfo, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    uint64_t kib = 0;
    if (words.size() >= 2 && words[0] == "MemAvailable:" && absl::SimpleAtoi(words[1], &kib) &&
        kib < (kNoLimit >> 10)) {
      available = kib << 10;
    }
  }
  if (available == kNoLimit) {
    return absl::UnavailableError(absl::StrCat(root, "/proc/meminfo does not say MemAvailable"));
  }
  const std::string groups = ReadAll(absl::StrCat(root, "/proc/self/cgroup"));
  for (const absl::string_view line : absl::StrSplit(groups, '\n', absl::SkipEmpty())) {
    // hierarchy:controllers:path; v2 has hierarchy 0 and no controllers.
    const std::vector<absl::string_view> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (fields.size() != 3) continue;
    const std::vector<absl::string_view> controllers = absl::StrSplit(fields[1], ',');
    if (fields[1].empty()) {
      available = std::min(available, LeftInGroups(absl::StrCat(root, "/sys/fs/cgroup"), fields[2],
                                                   "memory.max", "memory.current"));
    } else if (std::find(controllers.begin(), controllers.end(), "memory") != controllers.end()) {
      available = std::min(available, LeftInGroups(absl::StrCat(root, "/sys/fs/cgroup/memory"), fields[2],
                                                   "memory.limit_in_bytes", "memory.usage_in_bytes"));
    }
  }
  return available;
}

}  // namespace headwater
