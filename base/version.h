#ifndef HW_BASE_VERSION_H_
#define HW_BASE_VERSION_H_

namespace headwater {

inline constexpr char kVersion[] = "0.1.0";
// Version of worker.proto, kv.proto and decode.proto's registry; peers of another one are refused.
inline constexpr unsigned kProtocolVersion = 1;

}  // namespace headwater

#endif  // HW_BASE_VERSION_H_
