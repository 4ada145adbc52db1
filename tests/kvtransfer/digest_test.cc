#include "kvtransfer/digest.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace headwater {
namespace {

TEST(Crc32c, GivesTheKnownAnswersOfRfc3720) {
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c("", 0), 0u);
  const std::string zeros(32, '\0');
  EXPECT_EQ(Crc32c(zeros.data(), 32), 0x8A9136AAu);
  const std::string ones(32, '\xff');
  EXPECT_EQ(Crc32c(ones.data(), 32), 0x62A8AB43u);
  std::string ascending(32, '\0');
  std::iota(ascending.begin(), ascending.end(), '\0');
  EXPECT_EQ(Crc32c(ascending.data(), 32), 0x46DD794Eu);
}

TEST(Crc32c, OfPiecesIsThatOfTheWhole) {
  std::mt19937 random(3);
  std::string text(10'000, '\0');
  for (char& c : text) c = static_cast<char>(random());
  const uint32_t whole = Crc32c(text.data(), text.size());
  for (int run = 0; run < 200; ++run) {
    const size_t cut = random() % (text.size() + 1);
    EXPECT_EQ(ExtendCrc32c(Crc32c(text.data(), cut), text.data() + cut, text.size() - cut), whole) << cut;
  }
}

TEST(KvDigest, GivesTheKnownAnswers) {
  KvDigest digest;
  EXPECT_EQ(digest.Hex(), std::string(32, '0'));
  digest.Add(0, 4096, 0xE3069283);
  EXPECT_EQ(digest.Hex(), "75e81f8cb5478d99799fe07d97f46371");
  digest.Add(1, 4096, 0x12345678);
  digest.Add((1ull << 40) + 3, 77, 0);
  digest.Add(5, 1, 0xffffffff);
  EXPECT_EQ(digest.Hex(), "49499afd3ecd905857db4a2f05416b3f");
}

TEST(KvDigest, IsTheSameInAnyOrderAndAnySharesOfTheBlocks) {
  std::mt19937 random(5);
  std::vector<uint64_t> blocks(500);
  std::iota(blocks.begin(), blocks.end(), 0);
  KvDigest expected;
  for (const uint64_t block : blocks) expected.Add(block, 100 + block, static_cast<uint32_t>(block * 7919));
  for (int run = 0; run < 50; ++run) {
    std::shuffle(blocks.begin(), blocks.end(), random);
    std::vector<KvDigest> shares(1 + random() % 5);
    for (const uint64_t block : blocks) {
      shares[random() % shares.size()].Add(block, 100 + block, static_cast<uint32_t>(block * 7919));
    }
    KvDigest sum;
    for (const KvDigest& share : shares) sum.Merge(share);
    EXPECT_EQ(sum, expected);
  }
}

TEST(KvDigest, ChangesWithEachPartOfABlock) {
  const auto digest = [](uint64_t index, uint64_t bytes, uint32_t crc) {
    KvDigest out;
    out.Add(index, bytes, crc);
    return out.Hex();
  };
  EXPECT_NE(digest(1, 2, 3), digest(2, 2, 3));
  EXPECT_NE(digest(1, 2, 3), digest(1, 3, 3));
  EXPECT_NE(digest(1, 2, 3), digest(1, 2, 4));
}

TEST(KvDigest, GoesThroughBytesAndRefusesOtherSizes) {
  KvDigest digest;
  digest.Add(9, 8, 7);
  KvDigest copy;
  ASSERT_TRUE(KvDigest::FromBytes(digest.Bytes(), &copy));
  EXPECT_EQ(copy, digest);
  for (const size_t size : {0u, 15u, 17u, 32u})
    EXPECT_FALSE(KvDigest::FromBytes(std::string(size, 'x'), &copy));
  EXPECT_EQ(copy, digest);
}

}  // namespace
}  // namespace headwater
