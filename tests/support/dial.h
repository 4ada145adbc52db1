// Channels of tests that need no certificates.
#ifndef HW_TESTS_SUPPORT_DIAL_H_
#define HW_TESTS_SUPPORT_DIAL_H_

#include <memory>
#include <string>

#include "base/rpc/server.h"

namespace headwater {

inline std::shared_ptr<grpc::Channel> DialPlaintext(const std::string& address) {
  return DialPrivate(address, nullptr, Role::kCoordinator);
}

}  // namespace headwater

#endif  // HW_TESTS_SUPPORT_DIAL_H_
