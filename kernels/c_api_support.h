// What the files of the C interface share.
#ifndef HW_KERNELS_C_API_SUPPORT_H_
#define HW_KERNELS_C_API_SUPPORT_H_

#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "kernels/headwater_kernels.h"
#include "kernels/status.h"

namespace headwater::kernels::capi {

// Of the calling thread.
inline std::string& LastError() {
  thread_local std::string text;
  return text;
}

inline hw_status CodeOf(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return HW_OK;
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

// Keeps the text, or as much of it as there is memory for.
inline hw_status Fail(hw_status code, const char* text) noexcept {
  std::string& error = LastError();
  try {
    error = text;
  } catch (const std::bad_alloc&) {
    error.assign(text, strnlen(text, error.capacity()));
  }
  return code;
}

inline hw_status Report(const Status& status) noexcept {
  if (status.ok()) return HW_OK;
  return Fail(CodeOf(status), status.message().c_str());
}

// What call() returns; exceptions end here.
template <typename Call>
hw_status Guarded(Call call) noexcept {
  try {
    return Report(call());
  } catch (const std::bad_alloc&) {
    return Fail(HW_RESOURCE_EXHAUSTED, "no memory");
  } catch (const std::exception& error) {
    return Fail(HW_INTERNAL, error.what());
  } catch (...) {
    return Fail(HW_INTERNAL, "an exception");
  }
}

// A number that call() returns; 0 where it throws.
template <typename Call>
auto Counted(Call call) noexcept -> decltype(call()) {
  try {
    return call();
  } catch (...) {
    return 0;
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

// Reads the structure and calls.
template <typename Args, typename Call>
hw_status WithArgs(const Args* caller, Call call) noexcept {
  return Guarded([&] {
    Args args;
    return Read(caller, &args) ? call(args) : BadStructure();
  });
}

}  // namespace headwater::kernels::capi

#endif  // HW_KERNELS_C_API_SUPPORT_H_
