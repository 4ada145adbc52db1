// MInference's vertical-slash pattern (Jiang et al., arXiv:2407.02490) in obvious loops
// and double precision, stage by stage as its official code has it. The last rows of a prompt are attended in
// full; the columns and the diagonals on which their attention sums highest are kept for all rows:
//
//   A = softmax(softmax_scale * Q[N - last_q : N] K^T, causal)
//   vertical[j] = sum_i A[i, j]        slash[delta] = sum_i A[i, i - delta]
//
// What 64 rows read is then ranges of keys, 64 wide for each diagonal, and single columns. Differences from
// the official code: it rounds logits to the model's type before the softmax; of equal sums its choice is
// unspecified, here the lower column and the smaller distance win; it fails on a prompt of one token.
#ifndef HW_KERNELS_REFERENCE_POLICIES_VERTICAL_SLASH_H_
#define HW_KERNELS_REFERENCE_POLICIES_VERTICAL_SLASH_H_

#include <cstdint>
#include <vector>

#include "kernels/attention/block_index.h"
#include "kernels/reference/policies/problem.h"
#include "kernels/status.h"

namespace headwater::kernels::reference {

inline constexpr int64_t kVerticalSlashRows = 64;  // rows that share ranges, and keys a diagonal adds

// Columns and diagonals of a head, forced ones included; each 1 to 2^22. The defaults are the official code's
// for a head without an entry in the model's file.
struct VerticalSlashBudget {
  int64_t n_vertical = 1000;
  int64_t n_slash = 6096;
};

struct VerticalSlashParameters {
  // One for all query heads or one for each.
  std::vector<VerticalSlashBudget> budgets = {{}};
  int64_t last_q = 64;  // rows that are attended in full, 1 to 2^22; fewer where the prompt has fewer
  int64_t forced_verticals = 30;  // columns from 0 that come first, 0 to 2^22
  int64_t forced_locals = 100;    // distances from 0 that come first, 1 to 2^22: each row sees itself
  int64_t least_verticals = 30;   // a smaller budget counts as this, 1 to 2^22; so does least_slashes
  int64_t least_slashes = 50;
};

struct KeyRange {
  int64_t begin, end;
  bool operator==(const KeyRange& other) const { return begin == other.begin && end == other.end; }
};

// What the rows [64 b, 64 b + 64) read, keys after the row excepted.
struct VerticalSlashRows {
  // Ascending and apart; lengths are multiples of 64, begins need not be. The last may pass the rows' own
  // keys and the prompt by up to 63.
  std::vector<KeyRange> ranges;
  std::vector<int64_t> columns;  // chosen ones outside the ranges, ascending, all before the first row
};

// The stages of one query head.
struct VerticalSlashHead {
  std::vector<double> vertical;         // [num_tokens] by column; sums of probabilities, before any is forced
  std::vector<double> slash;            // [num_tokens] by distance query - key
  std::vector<int64_t> columns;         // chosen, ascending
  std::vector<int64_t> distances;       // chosen, descending
  std::vector<VerticalSlashRows> rows;  // [ceil(num_tokens / 64)]
};

struct VerticalSlashTrace {
  int64_t num_tokens = 0;
  std::vector<VerticalSlashHead> heads;  // [num_q_heads]
};

// Fills both. The index has one list per query head; a tile of 128 rows lists every block of 128 keys of
// which one of its rows reads a key. So it is a superset of the pattern: VerticalSlashKeys() is the pattern
// itself. INVALID_ARGUMENT: a parameter or the problem is outside its range, or Q or K is not
// finite. Cost: last_q * num_tokens * head_dim per head, then per 64 rows the columns and distances.
Status SelectVerticalSlash(const PolicyProblem& problem, const VerticalSlashParameters& parameters,
                           VerticalSlashTrace* trace, BlockIndex* index);

// The step that makes ranges: `columns` ascending, `distances` descending, down to 0. Each distance under
// first_row + 64 asks for the 64 keys that end at e = max(first_row + 64 - distance, 64). They are taken by
// ascending e: where e is more than 64 past the end of the last range a new range starts, where it is past it
// by less the range grows by 64.
VerticalSlashRows MergeVerticalSlash(const std::vector<int64_t>& columns,
                                     const std::vector<int64_t>& distances, int64_t first_row);

// Keys that `query` reads, ascending: the exact pattern.
std::vector<int64_t> VerticalSlashKeys(const VerticalSlashHead& head, int64_t query);

// Attention over the exact pattern: [num_tokens, num_q_heads, head_dim]. problem.v is not null.
std::vector<double> VerticalSlashAttention(const PolicyProblem& problem, const VerticalSlashTrace& trace);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_POLICIES_VERTICAL_SLASH_H_
