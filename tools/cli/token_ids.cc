#include "tools/cli/token_ids.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

#include "base/status_macros.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

constexpr size_t kMaxShownWord = 40;

bool IsSeparator(char c) { return c == ',' || absl::ascii_isspace(static_cast<unsigned char>(c)); }

}  // namespace

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text) {
  std::vector<uint32_t> ids;
  for (size_t begin = 0; begin < text.size();) {
    if (IsSeparator(text[begin])) {
      ++begin;
      continue;
    }
    size_t end = begin;
    while (end < text.size() && !IsSeparator(text[end])) ++end;
    const absl::string_view word = text.substr(begin, end - begin);
    uint32_t id = 0;
    const bool digits = std::all_of(word.begin(), word.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || !absl::SimpleAtoi(word, &id)) {
      return absl::InvalidArgumentError(absl::StrCat("token id ", ids.size() + 1, " is '",
                                                     Printable(word.substr(0, kMaxShownWord)),
                                                     "', not a whole number from 0 to 4294967295"));
    }
    if (ids.size() == kMaxTokenIds) {
      return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxTokenIds, " token ids"));
    }
    ids.push_back(id);
    begin = end;
  }
  if (ids.empty()) return absl::InvalidArgumentError("no token ids");
  return ids;
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path, std::istream& standard_in,
                                         uint64_t max_bytes) {
  std::ifstream file;
  if (path != "-") {
    file.open(path, std::ios::binary);
    if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  std::istream& in = path == "-" ? standard_in : file;
  std::string text;
  std::vector<char> piece(1 << 16);
  while (in.read(piece.data(), static_cast<std::streamsize>(piece.size())) || in.gcount() > 0) {
    text.append(piece.data(), static_cast<size_t>(in.gcount()));
    if (text.size() > max_bytes) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": more than ", max_bytes, " bytes"));
    }
  }
  if (in.bad()) return absl::NotFoundError(absl::StrCat(path, ": cannot be read (a directory?)"));
  return text;
}

absl::StatusOr<std::vector<uint32_t>> ReadTokenFile(const std::string& path, std::istream& standard_in,
                                                    uint64_t max_bytes) {
  HW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, standard_in, max_bytes));
  absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(text);
  if (!ids.ok()) return absl::InvalidArgumentError(absl::StrCat(path, ": ", ids.status().message()));
  return ids;
}

}  // namespace headwater
