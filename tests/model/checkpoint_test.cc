// Checkpoint directories: single files, shards and their index.
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <sys/stat.h>

#include "model/safetensors.h"
#include "tests/model/checkpoint_files.h"

namespace headwater {
namespace {

using ::testing::HasSubstr;
using testing::TempDir;
using testing::WriteFile;

constexpr char kIndex[] = "model.safetensors.index.json";

std::string OneTensor(const std::string& name, char fill) {
  return testing::Serialize({{name, {"F32", {2}, std::string(8, fill)}}});
}

TEST(Checkpoint, ReadsASingleFile) {
  TempDir dir;
  WriteFile(dir.File("model.safetensors"), OneTensor("a", 'x'));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_NE((*checkpoint)->Find("a"), nullptr);
  EXPECT_EQ((*checkpoint)->Find("a")->data[7], 'x');
  EXPECT_EQ((*checkpoint)->Find("b"), nullptr);
}

TEST(Checkpoint, ReadsShardsAndTakesEachTensorFromItsOwn) {
  TempDir dir;
  WriteFile(dir.File("one.safetensors"),
            testing::Serialize({{"a", {"F32", {1}, "aaaa"}}, {"b", {"F32", {1}, "bbbb"}}}));
  WriteFile(dir.File("two.safetensors"),
            testing::Serialize({{"b", {"F32", {1}, "BBBB"}}, {"c", {"F32", {1}, "cccc"}}}));
  WriteFile(dir.File(kIndex), R"({"metadata": {"total_size": 16}, "weight_map":
      {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}})");
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->tensors().size(), 3u);
  EXPECT_EQ((*checkpoint)->Find("a")->data[0], 'a');
  EXPECT_EQ((*checkpoint)->Find("b")->data[0], 'B');
}

TEST(Checkpoint, NamesWhatIsMissing) {
  TempDir dir;
  const auto none = Checkpoint::Open(dir.path());
  EXPECT_EQ(none.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("model.safetensors.index.json"));
  EXPECT_EQ(Checkpoint::Open(dir.File("nowhere")).status().code(), absl::StatusCode::kNotFound);

  WriteFile(dir.File(kIndex), R"({"weight_map": {"a": "gone.safetensors"}})");
  const auto gone = Checkpoint::Open(dir.path());
  EXPECT_EQ(gone.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(gone.status().message()), HasSubstr("gone.safetensors"));
}

TEST(Checkpoint, RefusesWhatIsNotARegularFile) {
  TempDir dir;
  ASSERT_EQ(mkfifo(dir.File("model.safetensors").c_str(), 0600), 0);
  const auto fifo = Checkpoint::Open(dir.path());
  EXPECT_EQ(fifo.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(fifo.status().message()), HasSubstr("not a regular file"));

  TempDir empty;
  WriteFile(empty.File("model.safetensors"), "");
  EXPECT_EQ(Checkpoint::Open(empty.path()).status().code(), absl::StatusCode::kInvalidArgument);
}

struct HostileIndex {
  std::string label;
  std::string index;
  std::string message;
};

void PrintTo(const HostileIndex& hostile, std::ostream* out) { *out << hostile.label; }

std::string MapTo(absl::string_view shard) {
  return absl::StrCat(R"({"weight_map": {"a": ")", shard, R"("}})");
}

class HostileShardIndex : public ::testing::TestWithParam<HostileIndex> {};

TEST_P(HostileShardIndex, IsRefused) {
  TempDir outer;
  ASSERT_EQ(mkdir(outer.File("model").c_str(), 0700), 0);
  // What a traversal would reach.
  WriteFile(outer.File("secret.safetensors"), OneTensor("a", 's'));
  WriteFile(outer.File("model/good.safetensors"), OneTensor("a", 'g'));
  WriteFile(outer.File("model/bad.safetensors"), "not a header");
  WriteFile(absl::StrCat(outer.File("model/"), kIndex), GetParam().index);
  const auto checkpoint = Checkpoint::Open(outer.File("model"));
  ASSERT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kInvalidArgument) << checkpoint.status();
  EXPECT_THAT(std::string(checkpoint.status().message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, HostileShardIndex,
    ::testing::Values(
        HostileIndex{"parent", MapTo("../secret.safetensors"), "plain file name"},
        HostileIndex{"absolute", MapTo("/tmp/secret.safetensors"), "plain file name"},
        HostileIndex{"inside", MapTo("sub/good.safetensors"), "plain file name"},
        HostileIndex{"backslash", MapTo("..\\\\secret.safetensors"), "plain file name"},
        HostileIndex{"dots", MapTo(".."), "plain file name"},
        HostileIndex{"hidden", MapTo(".good.safetensors"), "plain file name"},
        HostileIndex{"nothing", MapTo(""), "plain file name"},
        HostileIndex{"nul", MapTo("good.safetensors\\u0000.safetensors"), "plain file name"},
        HostileIndex{"other_kind", MapTo("good.bin"), "plain file name"},
        HostileIndex{"long_name", MapTo(std::string(300, 'x') + ".safetensors"), "plain file name"},
        HostileIndex{"shard_number", R"({"weight_map": {"a": 1}})", "is 1; must be a file name"},
        HostileIndex{"no_map", R"({"metadata": {}})", "weight_map is absent"},
        HostileIndex{"map_list", R"({"weight_map": ["a"]})", "weight_map is"},
        HostileIndex{"twice", R"({"weight_map": {"a": "good.safetensors", "a": "good.safetensors"}})",
                     "appears twice"},
        HostileIndex{"not_json", "weight_map", "not JSON"},
        HostileIndex{"lacking", R"({"weight_map": {"b": "good.safetensors"}})", "lacks the tensor \"b\""},
        HostileIndex{"bad_shard", MapTo("bad.safetensors"), "\"bad.safetensors\": the header length"}),
    [](const auto& row) { return row.param.label; });

}  // namespace
}  // namespace headwater
