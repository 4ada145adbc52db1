// Random damage: whatever comes, the reader answers with tensors that lie inside the file, or an error.
#include <random>
#include <string>

#include "gtest/gtest.h"

#include "model/config.h"
#include "model/safetensors.h"
#include "tests/model/checkpoint_files.h"

namespace headwater {
namespace {

constexpr int kRounds = 6000;

std::string SmallFile() {
  testing::OwnedTensors tensors;
  tensors["model.embed_tokens.weight"] = {"F32", {4, 2}, std::string(32, 'e')};
  tensors["model.layers.0.mlp.down_proj.weight"] = {"BF16", {3, 5}, std::string(30, 'd')};
  tensors["model.norm.weight"] = {"F16", {2}, std::string(4, 'n')};
  return testing::Serialize(tensors);
}

// A few edits: bits, bytes that JSON cares about, doubled or removed ranges, a cut tail.
std::string Mutate(std::string text, std::mt19937* random) {
  const std::string spice = "{}[],:\"0123456789-.eE\\u \x00\xff";
  const int edits = 1 + static_cast<int>((*random)() % 4);
  for (int i = 0; i < edits && !text.empty(); ++i) {
    const size_t at = (*random)() % text.size();
    const size_t length = (*random)() % 16;
    switch ((*random)() % 6) {
      case 0:
        text[at] = static_cast<char>(text[at] ^ (1 << ((*random)() % 8)));
        break;
      case 1:
        text[at] = spice[(*random)() % spice.size()];
        break;
      case 2:
        text.insert(at, text.substr((*random)() % text.size(), length));
        break;
      case 3:
        text.erase(at, length);
        break;
      case 4:
        text.insert(at, std::string(length, spice[(*random)() % spice.size()]));
        break;
      default:
        if ((*random)() % 4 == 0) text.resize(at);
    }
  }
  return text;
}

// Reads every byte, so that a sanitizer or the kernel objects to a range outside the file.
void Check(const std::string& file, int* accepted) {
  // Exactly as long as the file, to be seen when it is overrun.
  const std::vector<uint8_t> bytes(file.begin(), file.end());
  const auto tensors = ParseSafetensors(bytes.data(), bytes.size());
  if (!tensors.ok()) {
    EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_LT(tensors.status().message().size(), 1000u);
    return;
  }
  ++*accepted;
  unsigned sum = 0;
  for (const auto& [name, tensor] : *tensors) {
    ASSERT_GE(tensor.data, bytes.data());
    ASSERT_LE(tensor.data + tensor.bytes, bytes.data() + bytes.size());
    for (uint64_t i = 0; i < tensor.bytes; ++i) sum += tensor.data[i];
  }
  EXPECT_GE(sum, 0u);
}

TEST(ParseSafetensors, SurvivesMutatedFiles) {
  std::mt19937 random(1);
  const std::string file = SmallFile();
  int accepted = 0;
  for (int round = 0; round < kRounds; ++round) Check(Mutate(file, &random), &accepted);
  // Changes of names and data are legal; if all or none passed, the test would test nothing.
  EXPECT_GT(accepted, kRounds / 100);
  EXPECT_LT(accepted, kRounds * 9 / 10);
}

TEST(ParseSafetensors, SurvivesMutatedHeadersOfTheRightLength) {
  std::mt19937 random(2);
  const std::string file = SmallFile();
  const std::string data(66, 'x');
  const std::string header = file.substr(8, file.size() - 8 - data.size());
  int accepted = 0;
  for (int round = 0; round < kRounds; ++round) {
    Check(testing::RawSafetensors(Mutate(header, &random), data), &accepted);
  }
  EXPECT_GT(accepted, kRounds / 100);
  EXPECT_LT(accepted, kRounds * 9 / 10);
}

TEST(ParseModelConfig, SurvivesMutatedText) {
  const std::string text = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "vocab_size": 256,
      "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 2048, "rope_theta": 10000.0, "eos_token_id": [2, 3],
      "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0,
      "low_freq_factor": 1.0, "original_max_position_embeddings": 256}})";
  ASSERT_TRUE(ParseModelConfig(text).ok());
  std::mt19937 random(3);
  int accepted = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto config = ParseModelConfig(Mutate(text, &random));
    if (!config.ok()) continue;
    ++accepted;
    EXPECT_EQ(config->head_dim % 16, 0);
    EXPECT_EQ(config->num_q_heads % config->num_kv_heads, 0);
    EXPECT_EQ(config->rope.inverse.size(), static_cast<size_t>(config->head_dim / 2));
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, kRounds);
}

}  // namespace
}  // namespace headwater
