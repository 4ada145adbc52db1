// Bad assignments, command lines, checkpoints and roles files.
#include <memory>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "base/rpc/roles.h"
#include "coordinator/flags.h"
#include "decode/options.h"
#include "model/config.h"
#include "model/safetensors.h"
#include "tests/badinputs/cases.h"
#include "tests/worker/assignments.h"
#include "worker/options.h"

namespace headwater::testing {
namespace {

TEST(BadAssignmentTest, AreRefused) {
  AssignmentFixture fixture;
  const AssignmentContext context = fixture.context();
  ExpectRefusals(kAssignmentCases, [&](const BadInput& bad) {
    v1::PrefillAssignment assignment = fixture.Make(100, 2, 1);
    Override(bad.text, &assignment);
    return CheckAssignment(assignment, context).status();
  });
  EXPECT_TRUE(CheckAssignment(fixture.Make(100, 2, 1), context).ok());
}

// What is wanted besides the bad argument is there.
absl::Status ParseFlags(char program, std::vector<std::string> arguments) {
  std::string help;
  if (program == 'c') {
    CoordinatorFlags flags;
    return ParseCoordinatorFlags(arguments, &flags, &help);
  }
  arguments.insert(arguments.begin(), {"--model=/tmp", "--coordinator=127.0.0.1:1"});
  if (program == 'w') {
    WorkerOptions options;
    return ParseWorkerOptions(arguments, &options, &help);
  }
  DecodeOptions options;
  return ParseDecodeOptions(arguments, &options, &help);
}

TEST(BadFlagTest, AreRefusedByName) {
  ExpectRefusals(kFlagCases, [](const BadInput& bad) {
    const std::vector<std::string> arguments = absl::StrSplit(bad.text, '\n');
    const absl::Status status = ParseFlags(bad.name[0], arguments);
    const std::string flag = arguments[0].substr(0, arguments[0].find('='));
    const std::string name = flag.substr(std::min(flag.size(), flag.find_first_not_of('-')));
    EXPECT_TRUE(absl::StrContains(status.message(), name)) << bad.name << ": " << status;
    return status;
  });
  for (const char program : {'c', 'w', 'd'}) {
    const absl::Status status = ParseFlags(program, {});
    EXPECT_TRUE(status.ok()) << program << ": " << status;
  }
}

TEST(BadConfigTest, AreRefused) {
  const nlohmann::json good = {{"architectures", {"LlamaForCausalLM"}},
                               {"hidden_size", 64},
                               {"intermediate_size", 128},
                               {"num_hidden_layers", 2},
                               {"num_attention_heads", 4},
                               {"num_key_value_heads", 2},
                               {"head_dim", 16},
                               {"vocab_size", 256},
                               {"max_position_embeddings", 512},
                               {"rms_norm_eps", 1e-5},
                               {"hidden_act", "silu"}};
  ASSERT_TRUE(ParseModelConfig(good.dump()).ok()) << ParseModelConfig(good.dump()).status();
  ExpectRefusals(kConfigCases, [&good](const BadInput& bad) {
    const std::string text = Expand(bad.text);
    if (text[0] == '!') return ParseModelConfig(text.substr(1)).status();
    nlohmann::json config = good;
    const nlohmann::json patch = nlohmann::json::parse(text);
    for (const auto& [key, value] : patch.items()) config[key] = value;
    return ParseModelConfig(config.dump()).status();
  });
}

TEST(BadSafetensorsTest, AreRefused) {
  const auto parse = [](const std::string& file) {
    return ParseSafetensors(reinterpret_cast<const uint8_t*>(file.data()), file.size()).status();
  };
  const auto with_data = [](const std::string& header) {
    std::string file(8, '\0');
    for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(uint64_t{header.size()} >> (8 * i));
    return file + header + std::string(24, 'd');
  };
  const absl::Status good = parse(with_data(R"({"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}})"));
  ASSERT_TRUE(good.ok()) << good;
  ExpectRefusals(kSafetensorsCases, [&](const BadInput& bad) {
    const std::string text = Expand(bad.text);
    return text[0] == '!' ? parse(absl::HexStringToBytes(text.substr(1))) : parse(with_data(text));
  });
}

TEST(BadRolesTest, AreRefused) {
  ASSERT_TRUE(Roles::Parse(DefaultRoles()).ok());
  ExpectRefusals(kRolesCases, [](const BadInput& bad) { return Roles::Parse(bad.text).status(); });
}

}  // namespace
}  // namespace headwater::testing
