#include "base/rpc/reset_limit.h"

#include <string>

#include "gtest/gtest.h"

namespace headwater {
namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

std::string Frame(char type, const std::string& payload) {
  std::string frame(9, '\0');
  frame[0] = static_cast<char>(payload.size() >> 16);
  frame[1] = static_cast<char>(payload.size() >> 8);
  frame[2] = static_cast<char>(payload.size());
  frame[3] = type;
  frame[8] = 1;
  return frame + payload;
}
// A reset's bytes within the payload are none.
const std::string& Headers() {
  static const std::string headers = Frame(1, std::string("\0\0\4\3\0\0\0\0\1\0\0\0\x08", 13));
  return headers;
}
const std::string& Reset() {
  static const std::string reset = Frame(3, std::string("\0\0\0\x08", 4));
  return reset;
}

bool Admit(ResetMeter* meter, const std::string& bytes, int64_t now, ResetBudget* budget) {
  return meter->Admit(bytes.data(), bytes.size(), now, budget);
}

// How many of `count` calls that are reset at once pass.
int Pass(ResetMeter* meter, int count, int64_t now, ResetBudget* budget) {
  for (int i = 0; i < count; ++i) {
    if (!Admit(meter, Headers() + Reset(), now, budget)) return i;
  }
  return count;
}

TEST(ResetMeterTest, AThousandAtOnceAndFiveHundredASecond) {
  ResetBudget budget;
  ResetMeter meter;
  ASSERT_TRUE(Admit(&meter, kPreface, kSecond, &budget));
  EXPECT_EQ(Pass(&meter, 1000, kSecond, &budget), 1000);
  EXPECT_EQ(Pass(&meter, 500, 2 * kSecond, &budget), 500);
  EXPECT_EQ(Pass(&meter, 500, 3 * kSecond, &budget), 500);
  EXPECT_EQ(Pass(&meter, 600, 4 * kSecond, &budget), 500);
  EXPECT_TRUE(meter.over());
  EXPECT_FALSE(Admit(&meter, "x", 100 * kSecond, &budget)) << "for good";
}

TEST(ResetMeterTest, WhereTheProcessHasNoneLeftSixteenAreAConnectionsOwn) {
  ResetBudget budget;
  for (int i = 0; i < 4; ++i) {
    ResetMeter meter;
    ASSERT_TRUE(Admit(&meter, kPreface, kSecond, &budget));
    EXPECT_EQ(Pass(&meter, 1000, kSecond, &budget), 1000);
  }
  ResetMeter late, calm;
  ASSERT_TRUE(Admit(&late, kPreface, kSecond, &budget) && Admit(&calm, kPreface, kSecond, &budget));
  EXPECT_EQ(Pass(&late, 1000, kSecond, &budget), 16);
  EXPECT_EQ(Pass(&calm, 16, kSecond, &budget), 16);
  EXPECT_FALSE(calm.over());
  // Two thousand come back in a second.
  ResetMeter next;
  ASSERT_TRUE(Admit(&next, kPreface, 2 * kSecond, &budget));
  EXPECT_EQ(Pass(&next, 1000, 2 * kSecond, &budget), 1000);
  EXPECT_EQ(Pass(&calm, 500, 2 * kSecond, &budget), 500);
}

TEST(ResetMeterTest, CutsOfTheBytesDoNotMatter) {
  std::string bytes = kPreface;
  for (int i = 0; i < 1001; ++i) bytes += Headers() + Reset();
  for (const size_t step : {1, 2, 7, 9, 13, 4096}) {
    ResetBudget budget;
    ResetMeter meter;
    size_t at = 0;
    while (at < bytes.size() && Admit(&meter, bytes.substr(at, step), kSecond, &budget)) at += step;
    // In the last piece that has a whole header of a reset.
    EXPECT_LT(at, bytes.size()) << step;
    EXPECT_GE(at + step, bytes.size() - 4) << step;
  }
}

TEST(ResetMeterTest, OtherFramesAreNone) {
  ResetBudget budget;
  ResetMeter meter;
  ASSERT_TRUE(Admit(&meter, kPreface, kSecond, &budget));
  for (int i = 0; i < 5000; ++i) {
    ASSERT_TRUE(Admit(&meter, Headers() + Frame(0, std::string(100, '\3')) + Frame(4, ""), kSecond, &budget));
  }
}

TEST(ResetMeterTest, WhatIsNoHttp2Passes) {
  ResetBudget budget;
  for (const std::string& first :
       {std::string("\x16\x03\x01", 3), std::string("PRI * HTTP/1.1\r\n"), Reset()}) {
    ResetMeter meter;
    ASSERT_TRUE(Admit(&meter, first, kSecond, &budget));
    EXPECT_EQ(Pass(&meter, 5000, kSecond, &budget), 5000);
  }
}

TEST(ResetMeterTest, AMeterThatHasSeenNothingHasAllItsTokens) {
  ResetBudget budget;
  ResetMeter meter;
  EXPECT_TRUE(Admit(&meter, "", 0, &budget));
  EXPECT_TRUE(Admit(&meter, kPreface, 0, &budget));
  EXPECT_EQ(Pass(&meter, 1001, 0, &budget), 1000);
}

}  // namespace
}  // namespace headwater
