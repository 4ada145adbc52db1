#include "model/safetensors.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/model/checkpoint_files.h"

namespace headwater {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::RawSafetensors;

absl::StatusOr<TensorMap> Parse(const std::string& file) {
  return ParseSafetensors(reinterpret_cast<const uint8_t*>(file.data()), file.size());
}

std::string Entry(absl::string_view dtype, absl::string_view shape, absl::string_view offsets) {
  return absl::StrCat("{\"dtype\":\"", dtype, "\",\"shape\":", shape, ",\"data_offsets\":", offsets, "}");
}

std::string Length(uint64_t length) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>((length >> (8 * i)) & 0xff);
  return bytes;
}

const std::string kData8(8, 'x');

TEST(ParseSafetensors, ReadsTensorsOfEveryFloatTypeAndMetadata) {
  const std::string file = RawSafetensors(
      absl::StrCat("{\"__metadata__\":{\"format\":\"pt\"},\"b\":", Entry("BF16", "[2,3]", "[4,16]"),
                   ",\"a\":", Entry("F32", "[]", "[0,4]"), ",\"c\":", Entry("F16", "[2]", "[16,20]"),
                   ",\"empty\":", Entry("F32", "[0,9]", "[16,16]"), "}   "),
      std::string(20, 'x'));
  const auto tensors = Parse(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 4u);
  const Tensor& b = tensors->at("b");
  EXPECT_EQ(b.element, kernels::DType::kBF16);
  EXPECT_THAT(b.shape, ElementsAre(2, 3));
  EXPECT_EQ(b.bytes, 12u);
  EXPECT_EQ(reinterpret_cast<const char*>(b.data), file.data() + file.size() - 16);
  EXPECT_TRUE(tensors->at("a").shape.empty());
  EXPECT_EQ(tensors->at("empty").bytes, 0u);
}

TEST(ParseSafetensors, LeavesDtypesThatItDoesNotKnowToTheirUser) {
  const auto tensors = Parse(RawSafetensors(
      absl::StrCat("{\"a\":", Entry("F4", "[8]", "[0,4]"), ",\"b\":", Entry("I32", "[1]", "[4,8]"), "}"),
      kData8));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_FALSE(tensors->at("a").element.has_value());
  EXPECT_EQ(tensors->at("a").dtype, "F4");
  EXPECT_FALSE(tensors->at("b").element.has_value());
}

TEST(ParseSafetensors, TakesAHeaderWithoutTensors) { EXPECT_TRUE(Parse(RawSafetensors("{}", "")).ok()); }

struct HostileFile {
  std::string label;
  std::string file;
  std::string message;
};

void PrintTo(const HostileFile& hostile, std::ostream* out) { *out << hostile.label; }

std::string One(absl::string_view dtype, absl::string_view shape, absl::string_view offsets) {
  return RawSafetensors(absl::StrCat("{\"a\":", Entry(dtype, shape, offsets), "}"), kData8);
}

std::string Two(absl::string_view first, absl::string_view second) {
  return RawSafetensors(
      absl::StrCat("{\"a\":", Entry("U8", "[4]", first), ",\"b\":", Entry("U8", "[4]", second), "}"), kData8);
}

std::string TooManyTensors() {
  std::vector<std::string> entries;
  for (size_t i = 0; i <= kMaxSafetensorsTensors; ++i) {
    entries.push_back(absl::StrCat("\"", i, "\":", Entry("U8", "[0]", "[0,0]")));
  }
  return RawSafetensors(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), "");
}

class HostileSafetensors : public ::testing::TestWithParam<HostileFile> {};

TEST_P(HostileSafetensors, IsRefusedWithTheRuleThatItBreaks) {
  const auto tensors = Parse(GetParam().file);
  ASSERT_FALSE(tensors.ok());
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Header, HostileSafetensors,
    ::testing::Values(
        HostileFile{"no_bytes", "", "0 bytes"}, HostileFile{"seven_bytes", "1234567", "7 bytes"},
        HostileFile{"length_zero", Length(0), "not JSON"},
        HostileFile{"length_beyond_file", Length(100) + "{}", "header length is 100"},
        HostileFile{"length_one_beyond", Length(3) + "{}", "header length is 3"},
        HostileFile{"length_over_limit", Length((32u << 20) + 1) + "{}", "at most 33554432"},
        HostileFile{"length_2_64", Length(~uint64_t{0}) + "{}", "18446744073709551615"},
        HostileFile{"length_2_63", Length(uint64_t{1} << 63) + "{}", "9223372036854775808"},
        HostileFile{"not_json", RawSafetensors("hello", ""), "not JSON"},
        HostileFile{"cut_json", RawSafetensors("{\"a\":{\"dtype\":", ""), "not JSON"},
        HostileFile{"text_after", RawSafetensors("{} {}", ""), "not JSON"},
        HostileFile{"a_list", RawSafetensors("[1]", ""), "must be an object"},
        HostileFile{"a_number", RawSafetensors("1", ""), "must be an object"},
        HostileFile{"deep", RawSafetensors("{\"a\":" + std::string(1 << 20, '['), ""),
                    "nested deeper than 4"},
        HostileFile{"deep_objects", RawSafetensors("{\"a\":{\"b\":{\"c\":{\"d\":{}}}}}", ""),
                    "nested deeper"},
        HostileFile{"not_utf8", RawSafetensors("{\"\xc3\x28\":{}}", ""), "not JSON"},
        HostileFile{"nul_bytes", RawSafetensors(std::string(64, '\0'), ""), "not JSON"},
        HostileFile{"many_values", RawSafetensors("{\"a\":[" + std::string(4 << 20, '0') + "]}", ""),
                    "not JSON"},
        HostileFile{"many_small_values",
                    RawSafetensors(absl::StrCat("{\"a\":[0",
                                                absl::StrJoin(std::vector<std::string>(1 << 20), ",0"), "]}"),
                                   ""),
                    "more than"},
        HostileFile{"many_tensors", TooManyTensors(), "more than 65536 tensors"},
        HostileFile{"metadata_list", RawSafetensors("{\"__metadata__\":[]}", ""), "__metadata__"},
        HostileFile{"metadata_number", RawSafetensors("{\"__metadata__\":{\"a\":1}}", ""), "__metadata__"}),
    [](const auto& row) { return row.param.label; });

INSTANTIATE_TEST_SUITE_P(
    Entries, HostileSafetensors,
    ::testing::Values(
        HostileFile{"same_name_twice",
                    RawSafetensors(absl::StrCat("{\"a\":", Entry("U8", "[4]", "[0,4]"),
                                                ",\"a\":", Entry("U8", "[4]", "[4,8]"), "}"),
                                   kData8),
                    "\"a\" appears twice"},
        HostileFile{"same_name_escaped",
                    RawSafetensors(absl::StrCat("{\"a\":", Entry("U8", "[4]", "[0,4]"),
                                                ",\"\\u0061\":", Entry("U8", "[4]", "[4,8]"), "}"),
                                   kData8),
                    "\"a\" appears twice"},
        HostileFile{
            "same_field_twice",
            RawSafetensors("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}",
                           kData8),
            "\"dtype\" appears twice"},
        HostileFile{"long_name",
                    RawSafetensors(absl::StrCat("{\"", std::string(513, 'n'),
                                                "\":", Entry("U8", "[8]", "[0,8]"), "}"),
                                   kData8),
                    "513 bytes; at most 512"},
        HostileFile{"entry_number", RawSafetensors("{\"a\":7}", kData8), "must be an object"},
        HostileFile{"no_dtype", RawSafetensors("{\"a\":{\"shape\":[8],\"data_offsets\":[0,8]}}", kData8),
                    "dtype is absent"},
        HostileFile{"dtype_number", RawSafetensors("{\"a\":{\"dtype\":32}}", kData8), "dtype is 32"},
        HostileFile{"no_shape", RawSafetensors("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,8]}}", kData8),
                    "shape is absent"},
        HostileFile{"no_offsets", RawSafetensors("{\"a\":{\"dtype\":\"U8\",\"shape\":[8]}}", kData8),
                    "data_offsets is absent"},
        HostileFile{"shape_number", One("U8", "8", "[0,8]"), "shape is 8"},
        HostileFile{"shape_negative", One("U8", "[-8]", "[0,8]"), "shape is [-8]"},
        HostileFile{"shape_float", One("U8", "[8.0]", "[0,8]"), "shape is [8.0]"},
        HostileFile{"shape_2_63", One("U8", "[9223372036854775808]", "[0,8]"), "9223372036854775808"},
        HostileFile{"shape_2_64", One("U8", "[18446744073709551616]", "[0,8]"), "shape is"},
        HostileFile{"rank_9", One("U8", "[1,1,1,1,1,1,1,1,8]", "[0,8]"), "at most 8 sizes"},
        HostileFile{"product_overflows", One("F32", "[4294967296,4294967296]", "[0,8]"), "more than 2^64"},
        // 2^62 * 4 bytes * 2 = 2^65, which is 0 mod 2^64; and one that wraps to exactly 8.
        HostileFile{"product_wraps_to_zero", One("F32", "[4611686018427387904,2]", "[0,0]"),
                    "more than 2^64"},
        HostileFile{"product_wraps_to_size", One("F64", "[2305843009213693953]", "[0,8]"), "more than 2^64"},
        HostileFile{"size_short", One("F32", "[1]", "[0,8]"), "take 4 bytes, data_offsets hold 8"},
        HostileFile{"size_long", One("BF16", "[5]", "[0,8]"), "take 10 bytes, data_offsets hold 8"}),
    [](const auto& row) { return row.param.label; });

INSTANTIATE_TEST_SUITE_P(
    Offsets, HostileSafetensors,
    ::testing::Values(
        HostileFile{"number", One("U8", "[8]", "8"), "data_offsets is 8"},
        HostileFile{"one", One("U8", "[8]", "[8]"), "data_offsets is [8]"},
        HostileFile{"three", One("U8", "[8]", "[0,4,8]"), "data_offsets is [0,4,8]"},
        HostileFile{"negative", One("U8", "[8]", "[-8,0]"), "data_offsets is [-8,0]"},
        HostileFile{"floats", One("U8", "[8]", "[0.0,8.0]"), "data_offsets is [0.0,8.0]"},
        HostileFile{"exponent", One("U8", "[8]", "[0,8e0]"), "data_offsets is"},
        HostileFile{"strings", One("U8", "[8]", "[\"0\",\"8\"]"), "data_offsets is"},
        HostileFile{"null_offset", One("U8", "[8]", "[null,8]"), "data_offsets is"},
        HostileFile{"crossed", One("U8", "[4]", "[8,4]"), "data_offsets is [8,4]"},
        HostileFile{"beyond_file", One("U8", "[9]", "[0,9]"), "8 data bytes"},
        HostileFile{"far_beyond", One("U8", "[8]", "[18446744073709551608,18446744073709551615]"),
                    "data_offsets"},
        HostileFile{"overlap", Two("[0,4]", "[3,7]"), "they overlap"},
        HostileFile{"same_range", Two("[0,4]", "[0,4]"), "they overlap"},
        HostileFile{"hole_between",
                    RawSafetensors(absl::StrCat("{\"a\":", Entry("U8", "[2]", "[0,2]"),
                                                ",\"b\":", Entry("U8", "[4]", "[4,8]"), "}"),
                                   kData8),
                    "a hole"},
        HostileFile{"hole_at_start", One("U8", "[4]", "[4,8]"), "a hole"},
        HostileFile{"rest_at_end", One("U8", "[4]", "[0,4]"), "take 4 data bytes, the file has 8"},
        HostileFile{"truncated",
                    RawSafetensors(absl::StrCat("{\"a\":", Entry("F32", "[1024]", "[0,4096]"), "}"), kData8),
                    "8 data bytes"}),
    [](const auto& row) { return row.param.label; });

}  // namespace
}  // namespace headwater
