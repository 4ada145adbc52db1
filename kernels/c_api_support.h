// What the files of the C interface share.
#ifndef HW_KERNELS_C_API_SUPPORT_H_
#define HW_KERNELS_C_API_SUPPORT_H_

#include <cstddef>
#include <cstring>
#include <string>

#include "kernels/headwater_kernels.h"
#include "kernels/status.h"

namespace headwater::kernels::capi {

// Of the calling thread.
inline std::string& LastError() {
  thread_local std::string text;
  return text;
}

inline hw_status Report(const Status& status) {
  if (status.ok()) return HW_OK;
  LastError() = status.message();
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
      return HW_INVALID_ARGUMENT;
    case StatusCode::kUnimplemented:
      return HW_UNIMPLEMENTED;
    case StatusCode::kResourceExhausted:
      return HW_RESOURCE_EXHAUSTED;
    default:
      return HW_INTERNAL;
  }
}

// The caller's structure in this library's size: missing fields are 0. False: no structure, or one that is
// larger than this library knows and uses what it does not know.
template <typename Args>
bool Read(const Args* caller, Args* args) {
  std::memset(args, 0, sizeof *args);
  if (caller == nullptr || caller->struct_size < sizeof caller->struct_size) return false;
  const auto* bytes = reinterpret_cast<const unsigned char*>(caller);
  for (size_t i = sizeof *args; i < caller->struct_size; ++i) {
    if (bytes[i] != 0) return false;
  }
  std::memcpy(args, caller, caller->struct_size < sizeof *args ? caller->struct_size : sizeof *args);
  return true;
}

inline Status BadStructure() {
  return InvalidArgument("the argument structure is null, has no size, or is of a later version");
}

}  // namespace headwater::kernels::capi

#endif  // HW_KERNELS_C_API_SUPPORT_H_
