#include "base/rpc/epoch_token.h"

#include "gtest/gtest.h"

namespace headwater {
namespace {

TEST(EpochTokenTest, IsTheHmacThatTheProtocolNames) {
  // python3: hmac.new(b"secret", b"headwater.v1 epoch 7 of s-1", "sha256").hexdigest()
  EXPECT_EQ(EpochToken("secret", "s-1", 7),
            "1d7a2f75087692cfc47fa8192b31ac66839d40ab5a99deb0fbba1d74c57c9458");
}

TEST(EpochTokenTest, IsAnothersForEachSessionEpochAndSecret) {
  const std::string token = EpochToken("secret", "s-1", 7);
  EXPECT_NE(EpochToken("secret", "s-1", 8), token);
  EXPECT_NE(EpochToken("secret", "s-2", 7), token);
  EXPECT_NE(EpochToken("secreu", "s-1", 7), token);
  EXPECT_EQ(EpochToken("", "", 0).size(), 64u);
}

}  // namespace
}  // namespace headwater
