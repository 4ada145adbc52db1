// Roles: which certificate may call which method.
#ifndef HW_BASE_RPC_ROLES_H_
#define HW_BASE_RPC_ROLES_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

#include "headwater/v1/roles.pb.h"

namespace headwater {

class Roles {
 public:
  // Protobuf text of a RolePolicy. INVALID_ARGUMENT, with line and column where the text is wrong: an unknown
  // field; a rule without principals or methods; a '*' in the middle; no rule at all.
  static absl::StatusOr<Roles> Parse(const std::string& text);

  bool Allows(absl::string_view spiffe_id, absl::string_view method) const;

 private:
  explicit Roles(v1::RolePolicy policy);

  v1::RolePolicy policy_;
};

// For a policy file to start from: clients may prefill and read tokens, admins that and the administration;
// workers, decode nodes and coordinators what they need of each other.
std::string DefaultRoles();

// The policy of a file that may change. Thread-safe.
class RolesFile {
 public:
  // path: empty is DefaultRoles(). INVALID_ARGUMENT names --roles, the file, and Parse()'s error.
  static absl::StatusOr<std::unique_ptr<RolesFile>> Open(const std::string& path, absl::Duration refresh);
  virtual ~RolesFile() = default;

  // By the file as it was at most `refresh` before this call. A file that has become wrong or is gone is
  // logged, and what was read last stays in force.
  virtual bool Allows(absl::string_view spiffe_id, absl::string_view method) = 0;
};

}  // namespace headwater

#endif  // HW_BASE_RPC_ROLES_H_
