#include "base/rpc/epoch_token.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include "base/log.h"

namespace headwater {

std::string EpochToken(absl::string_view session_token, absl::string_view session_id, uint32_t epoch) {
  // The epoch first: whatever the session is called, no two pairs are alike.
  const std::string text = absl::StrCat("headwater.v1 epoch ", epoch, " of ", session_id);
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  HW_CHECK(HMAC(EVP_sha256(), session_token.data(), static_cast<int>(session_token.size()),
                reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest, &size) != nullptr);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), size));
}

}  // namespace headwater
