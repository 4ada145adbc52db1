// How many connections a process takes.
//
// gRPC 1.51 knows no such limit, and a listener of its that once ran out of descriptors never accepts again:
// whoever can open enough connections would end the service for good. accept_limit.cc takes the place of the
// C library's accept4() in every program that it is linked into. It refuses (closes) what is too much in
// those that ask for it: Headwater's own, and not engines that use the receiver library, which have
// descriptors of theirs. Descriptors are counted rather than connections, as the system hands out the lowest
// number that is free. Delete when gRPC's own listeners bound and survive it
// (grpc.max_allowed_incoming_connections, 1.57).
#ifndef HW_BASE_RPC_ACCEPT_LIMIT_H_
#define HW_BASE_RPC_ACCEPT_LIMIT_H_

#include <cstdint>

namespace headwater {

inline constexpr int kMaxConnections = 4096;

// Raises the process's limit of open files as far as it may be and as connections and files need; connections
// are refused from then on where fewer than kKeptDescriptors would stay free below the limit, and those that
// are taken are watched for resets (reset_limit.h). Thread-safe; later calls do nothing.
void LimitConnections();

// Connections refused so far; the first one is logged.
uint64_t NumRefusedConnections();

// For files, outgoing connections, and metrics, health and the page, which take connections by accept().
inline constexpr int kKeptDescriptors = 256;

}  // namespace headwater

#endif  // HW_BASE_RPC_ACCEPT_LIMIT_H_
