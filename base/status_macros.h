// Propagation of absl::Status and absl::StatusOr. Names and meaning follow Abseil's own status_macros.h,
// which the packaged Abseil (20220623) does not have yet; delete this file when it does.
#ifndef HW_BASE_STATUS_MACROS_H_
#define HW_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define HW_STATUS_CONCAT_INNER_(a, b) a##b
#define HW_STATUS_CONCAT_(a, b) HW_STATUS_CONCAT_INNER_(a, b)

// Returns the status of `expr` from the enclosing function unless it is OK.
#define HW_RETURN_IF_ERROR(expr)             \
  do {                                       \
    absl::Status hw_status_ = (expr);        \
    if (!hw_status_.ok()) return hw_status_; \
  } while (0)

// Evaluates `expr` (a StatusOr); returns its status unless OK, else moves its value into `lhs`.
// NOLINTBEGIN(bugprone-macro-parentheses): `var` and `lhs` may be declarations.
#define HW_ASSIGN_OR_RETURN(lhs, expr) \
  HW_ASSIGN_OR_RETURN_IMPL_(HW_STATUS_CONCAT_(hw_statusor_, __LINE__), lhs, expr)
#define HW_ASSIGN_OR_RETURN_IMPL_(var, lhs, expr) \
  auto var = (expr);                              \
  if (!var.ok()) return std::move(var).status();  \
  lhs = std::move(var).value()
// NOLINTEND(bugprone-macro-parentheses)

#endif  // HW_BASE_STATUS_MACROS_H_
