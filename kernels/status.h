// Result of a kernel-library call. The library stands alone: no Abseil, no exceptions, no logging.
#ifndef HW_KERNELS_STATUS_H_
#define HW_KERNELS_STATUS_H_

#include <string>
#include <utility>

namespace headwater::kernels {

enum class StatusCode {
  kOk,
  kInvalidArgument,    // the arguments contradict each other or the documented ranges
  kUnimplemented,      // valid, but no kernel for it
  kResourceExhausted,  // an allocation failed
  kInternal,           // a library below failed, or a bug of ours
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status InvalidArgument(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

}  // namespace headwater::kernels

// Returns the status of `expr` from the enclosing function unless it is OK.
#define HW_KERNELS_RETURN_IF_ERROR(expr)                     \
  do {                                                       \
    ::headwater::kernels::Status hw_kernel_status_ = (expr); \
    if (!hw_kernel_status_.ok()) return hw_kernel_status_;   \
  } while (0)

#endif  // HW_KERNELS_STATUS_H_
