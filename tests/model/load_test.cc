// Model::Load on checkpoints made from the golden ones.
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "model/model.h"
#include "model/weights.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"

namespace headwater {
namespace {

using kernels::DType;
using ::testing::ElementsAre;
using testing::Golden;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using testing::OwnedTensor;
using testing::OwnedTensors;
using testing::ReadGolden;
using testing::TempDir;
using testing::WriteFile;

constexpr char kModelFile[] = "model.safetensors";

// A golden checkpoint in memory, to be changed and written.
struct Source {
  std::string config;
  OwnedTensors tensors;
};

Source ReadSource(const std::string& name) {
  const std::string directory = ReadGolden(name).directory;
  return {testing::ReadWholeFile(directory + "/config.json"),
          testing::ReadTensors(directory + "/model.safetensors")};
}

void WriteSource(const TempDir& dir, const Source& source) {
  WriteFile(dir.File("config.json"), source.config);
  WriteFile(dir.File(kModelFile), testing::Serialize(source.tensors));
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

absl::StatusOr<std::unique_ptr<Model>> LoadFrom(const TempDir& dir, DType compute = DType::kF32,
                                                uint64_t budget = 0) {
  return Model::Load({dir.path(), compute, budget});
}

void ExpectRefused(const Source& source, absl::StatusCode code, const std::vector<std::string>& parts) {
  TempDir dir;
  WriteSource(dir, source);
  const auto model = LoadFrom(dir);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), code) << model.status();
  for (const std::string& part : parts) EXPECT_THAT(std::string(model.status().message()), HasSubstr(part));
}

TEST(ModelLoad, TellsWhatItLoaded) {
  const Golden golden = ReadGolden("qwen3");
  const auto model = Model::Load({golden.directory, DType::kF32, 0});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->config().num_layers, 3);
  EXPECT_EQ((*model)->compute(), DType::kF32);
  EXPECT_EQ((*model)->attention_shape().num_q_heads, 4);
  EXPECT_EQ((*model)->attention_shape().num_kv_heads, 2);
  EXPECT_EQ((*model)->attention_shape().head_dim, 32);
  EXPECT_FLOAT_EQ((*model)->attention_shape().softmax_scale, 0.17677669f);
  EXPECT_GE((*model)->weight_bytes(), PlannedWeightBytes((*model)->config(), DType::kF32));
  EXPECT_THAT((*model)->fingerprint(), MatchesRegex("[0-9a-f]{16}"));
  EXPECT_GT((*model)->scratch_bytes(), 0u);
}

TEST(ModelLoad, RefusesWeightsOverTheBudgetWithBothNumbers) {
  const Golden golden = ReadGolden("llama");
  const auto config = ReadModelConfig(golden.directory);
  ASSERT_TRUE(config.ok());
  const uint64_t planned = PlannedWeightBytes(*config, DType::kF32);
  // The head; per layer QKV and output, gate, up and down, and 400 biases; 7 norms. Not the embedding.
  EXPECT_EQ(planned, 4u * (256 * 64 + 3 * ((128 + 64) * 64 + 3 * 72 * 64 + 400) + 7 * 64));
  const auto refused = Model::Load({golden.directory, DType::kF32, planned - 1});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(absl::StrCat(planned)));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(absl::StrCat(planned - 1)));
  EXPECT_TRUE(Model::Load({golden.directory, DType::kF32, 2 * planned}).ok());
  // Half as much in bf16.
  EXPECT_LT(PlannedWeightBytes(*config, DType::kBF16), planned * 51 / 100);
}

TEST(ModelLoad, RefusesOnThePlanBeforeItLooksAtATensor) {
  Source source = ReadSource("llama");
  source.tensors.clear();
  TempDir dir;
  WriteSource(dir, source);
  EXPECT_EQ(LoadFrom(dir, DType::kF32, 1000).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(ModelLoad, RefusesAMissingDirectoryAndComputeTypes) {
  EXPECT_EQ(Model::Load({"/nonexistent/model", DType::kF32, 0}).status().code(), absl::StatusCode::kNotFound);
  const auto f16 = Model::Load({ReadGolden("llama").directory, DType::kF16, 0});
  EXPECT_EQ(f16.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(f16.status().message()), HasSubstr("f16"));
}

TEST(ModelLoad, NamesATensorThatIsMissing) {
  for (const char* name : {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
                           "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"}) {
    Source source = ReadSource("llama");
    ASSERT_EQ(source.tensors.erase(name), 1u);
    ExpectRefused(source, absl::StatusCode::kInvalidArgument, {"lacks", name});
  }
  Source qwen2 = ReadSource("qwen2");
  qwen2.tensors.erase("model.layers.1.self_attn.v_proj.bias");
  ExpectRefused(qwen2, absl::StatusCode::kInvalidArgument, {"model.layers.1.self_attn.v_proj.bias", "[32]"});
  Source qwen3 = ReadSource("qwen3");
  qwen3.tensors.erase("model.layers.1.self_attn.k_norm.weight");
  ExpectRefused(qwen3, absl::StatusCode::kInvalidArgument,
                {"model.layers.1.self_attn.k_norm.weight", "[32]"});
}

TEST(ModelLoad, NamesATensorOfAnotherShape) {
  Source source = ReadSource("llama");
  OwnedTensor& down = source.tensors["model.layers.1.mlp.down_proj.weight"];
  down.shape = {72, 64};  // transposed
  ExpectRefused(source, absl::StatusCode::kInvalidArgument,
                {"model.layers.1.mlp.down_proj.weight", "[72, 64]", "[64, 72]"});
  source = ReadSource("llama");
  source.tensors["model.norm.weight"].shape = {1, 64};
  ExpectRefused(source, absl::StatusCode::kInvalidArgument, {"model.norm.weight", "[1, 64]", "[64]"});
}

TEST(ModelLoad, NamesATensorOfAnotherType) {
  for (const char* dtype : {"I32", "F8_E4M3", "F4", "BF17"}) {
    Source source = ReadSource("llama");
    OwnedTensor& norm = source.tensors["model.norm.weight"];
    norm.dtype = dtype;
    norm.bytes.resize(std::string(dtype) == "F8_E4M3" ? 64 : 256);
    ExpectRefused(source, absl::StatusCode::kInvalidArgument,
                  {"model.norm.weight", dtype, "F32, F16 or BF16"});
  }
}

TEST(ModelLoad, IgnoresTensorsThatTheConfigDoesNotUse) {
  Source source = ReadSource("llama");
  source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {8}, std::string(32, 'x')};
  source.tensors["something.else"] = {"I64", {1}, std::string(8, 'x')};
  TempDir dir;
  WriteSource(dir, source);
  const auto model = LoadFrom(dir);
  ASSERT_TRUE(model.ok()) << model.status();
  const auto plain = Model::Load({ReadGolden("llama").directory, DType::kF32, 0});
  EXPECT_EQ((*model)->fingerprint(), (*plain)->fingerprint());
}

TEST(ModelLoad, TakesACopyOfTheTiedHeadButNotAnotherHead) {
  Source source = ReadSource("qwen2");
  source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"];
  TempDir dir;
  WriteSource(dir, source);
  EXPECT_TRUE(LoadFrom(dir).ok());
  source.tensors["lm_head.weight"].bytes[5] ^= 1;
  ExpectRefused(source, absl::StatusCode::kInvalidArgument,
                {"tie_word_embeddings", "lm_head.weight", "differ"});
}

TEST(ModelLoad, ReadsEndTokensOfTheGenerationConfig) {
  TempDir dir;
  WriteSource(dir, ReadSource("llama"));
  EXPECT_THAT((*LoadFrom(dir))->config().eos_token_ids, ElementsAre(2));
  WriteFile(dir.File("generation_config.json"), R"({"eos_token_id": [7, 8]})");
  EXPECT_THAT((*LoadFrom(dir))->config().eos_token_ids, ElementsAre(7, 8));
  WriteFile(dir.File("generation_config.json"), R"({"max_length": 20})");
  EXPECT_THAT((*LoadFrom(dir))->config().eos_token_ids, ElementsAre(2));
  WriteFile(dir.File("generation_config.json"), R"({"eos_token_id": 256})");
  EXPECT_THAT(std::string(LoadFrom(dir).status().message()),
              HasSubstr("generation_config.json: eos_token_id is 256"));
}

TEST(ModelLoad, GivesTheSameModelFromShards) {
  const Golden golden = ReadGolden("llama");
  const Source source = ReadSource("llama");
  TempDir dir;
  WriteFile(dir.File("config.json"), source.config);
  std::vector<OwnedTensors> shards(3);
  std::vector<std::string> map;
  for (const auto& [name, tensor] : source.tensors) {
    const size_t shard = map.size() % shards.size();
    shards[shard][name] = tensor;
    map.push_back(absl::StrCat("\"", name, "\":\"part-", shard, ".safetensors\""));
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    WriteFile(dir.File(absl::StrCat("part-", i, ".safetensors")), testing::Serialize(shards[i]));
  }
  WriteFile(dir.File("model.safetensors.index.json"),
            absl::StrCat("{\"weight_map\":{", absl::StrJoin(map, ","), "}}"));

  const auto single = Model::Load({golden.directory, DType::kF32, 0});
  const auto sharded = LoadFrom(dir);
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ((*sharded)->fingerprint(), (*single)->fingerprint());
  const auto a = testing::ForwardDense(**single, golden.tokens);
  const auto b = testing::ForwardDense(**sharded, golden.tokens);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(a->logits, b->logits);
  EXPECT_EQ(a->k, b->k);
}

// The weights are rounded to bf16 first; f16 and f32 then hold them exactly, but for what is below f16's
// range.
TEST(ModelLoad, GivesTheSameValuesFromFilesOfEveryType) {
  const Golden golden = ReadGolden("qwen3");
  Source source = ReadSource("qwen3");
  OwnedTensors rounded = testing::ConvertTensors(source.tensors, DType::kBF16);
  for (auto& [name, tensor] : rounded) {
    OwnedTensor& wide = source.tensors[name];
    kernels::Convert(tensor.bytes.data(), DType::kBF16, wide.bytes.data(), DType::kF32,
                     tensor.bytes.size() / 2);
  }
  std::vector<testing::DenseResult> results;
  std::vector<std::string> fingerprints;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    TempDir dir;
    WriteSource(dir, {source.config, testing::ConvertTensors(source.tensors, dtype)});
    const auto model = LoadFrom(dir);
    ASSERT_TRUE(model.ok()) << model.status();
    auto result = testing::ForwardDense(**model, golden.tokens);
    ASSERT_TRUE(result.ok()) << result.status();
    results.push_back(*std::move(result));
    fingerprints.push_back((*model)->fingerprint());
  }
  EXPECT_EQ(results[0].logits, results[1].logits);
  EXPECT_EQ(results[0].k, results[1].k);
  EXPECT_LE(testing::RelativeError(results[2].logits, results[0].logits), 1e-5);
  EXPECT_LE(testing::RelativeError(results[2].v.back(), results[0].v.back()), 1e-5);
  // A fingerprint is of the stored bytes.
  EXPECT_NE(fingerprints[0], fingerprints[1]);
  EXPECT_NE(fingerprints[1], fingerprints[2]);
}

TEST(ModelLoad, ReadsTensorsThatAreNotAligned) {
  const Golden golden = ReadGolden("qwen2");
  const Source source = ReadSource("qwen2");
  std::string file = testing::Serialize(source.tensors);
  // Spaces after the header move the data; one of four is aligned for f32.
  for (const size_t pad : {1, 2, 3, 4}) {
    const size_t header_bytes = static_cast<uint8_t>(file[0]) + 256 * static_cast<uint8_t>(file[1]);
    TempDir dir;
    WriteFile(dir.File("config.json"), source.config);
    WriteFile(dir.File(kModelFile),
              testing::RawSafetensors(file.substr(8, header_bytes) + std::string(pad, ' '),
                                      file.substr(8 + header_bytes)));
    const auto model = LoadFrom(dir);
    ASSERT_TRUE(model.ok()) << model.status();
    const auto result = testing::ForwardDense(**model, golden.tokens);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_LE(testing::RelativeError(result->logits, golden.expected.logits), 1e-4);
  }
}

TEST(Fingerprint, IsEqualForEqualCheckpointsWhateverTheComputeType) {
  const Golden golden = ReadGolden("llama");
  const auto f32 = Model::Load({golden.directory, DType::kF32, 0});
  const auto bf16 = Model::Load({golden.directory, DType::kBF16, 0});
  ASSERT_TRUE(f32.ok() && bf16.ok());
  EXPECT_EQ((*f32)->fingerprint(), (*bf16)->fingerprint());
  EXPECT_NE((*f32)->fingerprint(),
            (*Model::Load({ReadGolden("qwen2").directory, DType::kF32, 0}))->fingerprint());
}

TEST(Fingerprint, ChangesWithOneBitOfAnyTensorAndWithTheConfig) {
  const Source source = ReadSource("llama");
  const std::string plain = (*Model::Load({ReadGolden("llama").directory, DType::kF32, 0}))->fingerprint();
  for (const char* name : {"model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight",
                           "model.layers.1.input_layernorm.weight", "lm_head.weight"}) {
    Source changed = source;
    changed.tensors[name].bytes[changed.tensors[name].bytes.size() / 2] ^= 1;
    TempDir dir;
    WriteSource(dir, changed);
    EXPECT_NE((*LoadFrom(dir))->fingerprint(), plain) << name;
  }
  const std::pair<const char*, const char*> edits[] = {
      {"\"rope_theta\": 10000.0", "\"rope_theta\": 10001.0"},
      {"\"factor\": 8.0", "\"factor\": 9.0"},
      {"\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-06"}};
  for (const auto& [from, to] : edits) {
    TempDir dir;
    WriteSource(dir, {Replaced(source.config, from, to), source.tensors});
    EXPECT_NE((*LoadFrom(dir))->fingerprint(), plain) << to;
  }
  TempDir dir;
  WriteSource(dir, {Replaced(source.config, "\"eos_token_id\": 2", "\"eos_token_id\": 3"), source.tensors});
  EXPECT_EQ((*LoadFrom(dir))->fingerprint(), plain);
}

TEST(Fingerprint, ChangesWithWhatScalesTheRotation) {
  const Source source = ReadSource("qwen3_yarn");
  const std::string plain =
      (*Model::Load({ReadGolden("qwen3_yarn").directory, DType::kF32, 0}))->fingerprint();
  const std::pair<const char*, const char*> edits[] = {
      {"\"factor\": 4.0", "\"factor\": 4.5"},
      {"\"factor\": 4.0", "\"factor\": 4.0, \"attention_factor\": 1.0"},
      {"\"beta_fast\": 4.0", "\"beta_fast\": 32.0"},
      {"\"original_max_position_embeddings\": 64", "\"original_max_position_embeddings\": 128"}};
  for (const auto& [from, to] : edits) {
    TempDir dir;
    WriteSource(dir, {Replaced(source.config, from, to), source.tensors});
    EXPECT_NE((*LoadFrom(dir))->fingerprint(), plain) << to;
  }
}

// RFC 3720, B.4.
TEST(Crc32c, AgreesWithTheStandard) {
  const std::vector<uint8_t> zeros(32, 0);
  const std::vector<uint8_t> ones(32, 0xff);
  EXPECT_EQ(Crc32c(zeros.data(), zeros.size()), 0x8a9136aau);
  EXPECT_EQ(Crc32c(ones.data(), ones.size()), 0x62a8ab43u);
  EXPECT_EQ(Crc32c(nullptr, 0), 0u);
}

}  // namespace
}  // namespace headwater
