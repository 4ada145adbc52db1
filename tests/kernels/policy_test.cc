#include "kernels/pattern/policy.h"

#include <cmath>
#include <limits>
#include <string>
#include <variant>

#include <gtest/gtest.h>

namespace headwater::kernels {
namespace {

std::unique_ptr<PatternPolicy> Make(const std::string& name,
                                    const std::map<std::string, double>& parameters) {
  std::unique_ptr<PatternPolicy> policy;
  const Status status = MakePolicy(name, parameters, &policy);
  EXPECT_TRUE(status.ok()) << status.message();
  return policy;
}

PatternInputs Prompt(int64_t num_tokens) {
  PatternInputs inputs;
  inputs.num_q_heads = 4;
  inputs.num_kv_heads = 2;
  inputs.num_tokens = num_tokens;
  inputs.num_q_tiles = (num_tokens + kQueryTileTokens - 1) / kQueryTileTokens;
  return inputs;
}

bool Lists(const BlockIndex& index, int64_t tile, int64_t block) {
  const auto row = static_cast<size_t>(index.Row(0, tile));
  if (index.dense[row] != 0) return true;
  for (int64_t i = index.offsets[row]; i < index.offsets[row + 1]; ++i) {
    if (index.blocks[static_cast<size_t>(i)] == block) return true;
  }
  return false;
}

TEST(Policy, EmptyNameIsDense) {
  EXPECT_EQ(Make("", {})->name(), "dense");
  EXPECT_EQ(Make("dense", {})->name(), "dense");
  EXPECT_EQ(Make("a_shape", {})->name(), "a_shape");
  EXPECT_EQ(PolicyNames().front(), "dense");
}

TEST(Policy, KnowsBelowWhatLengthItIsDense) {
  EXPECT_EQ(DenseBelowTokens(Make("dense", {})->parameters()), INT64_MAX);
  EXPECT_EQ(DenseBelowTokens(Make("probe", {})->parameters()), 8192);
  EXPECT_EQ(DenseBelowTokens(Make("probe", {{"density", 0.5}})->parameters()), 0);
  EXPECT_EQ(DenseBelowTokens(Make("headwater", {{"dense_below_tokens", 100}})->parameters()), 100);
  EXPECT_EQ(DenseBelowTokens(Make("flash2", {{"dense_tokens", 16384}})->parameters()), 16385);
  EXPECT_EQ(DenseBelowTokens(Make("flex", {{"dense_below_tokens", 77}})->parameters()), 77);
  EXPECT_EQ(DenseBelowTokens(Make("flex", {{"dense_below_tokens", 0}})->parameters()), 0);
  EXPECT_GT(DenseBelowTokens(Make("xattention", {})->parameters()), 0);
  EXPECT_EQ(DenseBelowTokens(reference::FlexParameters{}), 0);
  EXPECT_EQ(DenseBelowTokens(Make("a_shape", {{"dense_below_tokens", 0}})->parameters()), 0);
}

TEST(Policy, DenseSelectsEverything) {
  BlockIndex index;
  PatternInputs inputs = Prompt(1000);
  inputs.first_q_tile = 3;
  inputs.num_q_tiles = 5;
  ASSERT_TRUE(Make("dense", {})->Select(inputs, &index).ok());
  ASSERT_TRUE(ValidateBlockIndex(index).ok());
  EXPECT_EQ(index.first_q_tile, 3);
  EXPECT_EQ(CountBlocks(index).selected, CountBlocks(index).possible);
}

TEST(Policy, AShapeListsExactlyTheBlocksWithAVisibleKey) {
  for (const int64_t tokens : {1, 127, 128, 129, 700, 1025}) {
    for (const int64_t sink : {0, 1, 128, 129, 400}) {
      for (const int64_t window : {1, 2, 127, 128, 129, 300, 2000}) {
        BlockIndex index;
        const auto policy = Make("a_shape", {{"sink_tokens", static_cast<double>(sink)},
                                             {"window_tokens", static_cast<double>(window)}});
        ASSERT_TRUE(policy->Select(Prompt(tokens), &index).ok());
        ASSERT_TRUE(ValidateBlockIndex(index).ok()) << ValidateBlockIndex(index).message();
        EXPECT_EQ(index.sink_tokens, sink);
        EXPECT_EQ(index.window_tokens, window);
        for (int64_t tile = 0; tile < index.num_q_tiles; ++tile) {
          bool pruned = false;
          for (int64_t block = 0; block <= tile; ++block) {
            bool visible = false;
            for (int64_t q = tile * 128; q < std::min(tile * 128 + 128, tokens); ++q) {
              for (int64_t k = block * 128; k < std::min(block * 128 + 128, q + 1); ++k) {
                const bool seen = k < sink || k > q - window;
                visible = visible || seen;
                pruned = pruned || !seen;
              }
            }
            EXPECT_EQ(Lists(index, tile, block), visible)
                << tokens << " tokens, sink " << sink << ", window " << window << ", tile " << tile
                << ", block " << block;
          }
          EXPECT_EQ(index.dense[static_cast<size_t>(tile)] != 0, !pruned)
              << tokens << " tokens, sink " << sink << ", window " << window << ", tile " << tile;
        }
      }
    }
  }
}

TEST(Policy, PartOfThePromptGetsTheSameListsAsTheWhole) {
  const auto policy = Make("a_shape", {{"sink_tokens", 128}, {"window_tokens", 300}});
  BlockIndex whole;
  ASSERT_TRUE(policy->Select(Prompt(2000), &whole).ok());
  PatternInputs inputs = Prompt(2000);
  inputs.first_q_tile = 7;
  inputs.num_q_tiles = 4;
  BlockIndex part;
  ASSERT_TRUE(policy->Select(inputs, &part).ok());
  ASSERT_TRUE(ValidateBlockIndex(part).ok());
  for (int64_t tile = 7; tile < 11; ++tile) {
    for (int64_t block = 0; block <= tile; ++block) {
      EXPECT_EQ(Lists(part, tile, block), Lists(whole, tile, block));
    }
  }
}

TEST(Policy, RefusesNamesAndValues) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  struct Row {
    std::string name;
    std::map<std::string, double> parameters;
    std::string words;
  };
  const Row kRows[] = {
      {"minference", {}, "policy \"minference\" is not one of dense, a_shape, headwater, probe, flash, "},
      {"dense", {{"dense_below_tokens", 1}}, "policy dense has no parameter \"dense_below_tokens\""},
      {"flash", {{"dense_below_tokens", -1}}, "dense_below_tokens -1 is not a whole number from 0"},
      {"dense", {{"window_tokens", 1}}, "policy dense has no parameter \"window_tokens\""},
      {"", {{"x", 1}}, "policy dense has no parameter \"x\""},
      {"probe", {{"threshold", 0}}, "threshold 0 is not over 0 and at most 1"},
      {"probe", {{"threshold", nan}}, "threshold nan is not over 0 and at most 1"},
      {"probe", {{"density", 1.5}}, "density 1.5 is not over 0 and at most 1"},
      {"probe", {{"density", 0.1}, {"threshold", 0.1}}, "a threshold or a density, not both"},
      {"probe", {{"alpha", 0.1}}, "policy probe has no parameter \"alpha\""},
      {"flash", {{"alpha", 1.5}}, "alpha 1.5 is not from 0 to 1"},
      {"flash", {{"sink_blocks", -1}}, "sink_blocks -1 is not a whole number from 0 to 1048576"},
      {"flash2", {{"dense_layers", 0.5}}, "dense_layers 0.5 is not a whole number"},
      {"flex", {{"gamma", 1}}, "gamma 1 is not from 1e-09 to 0.999999999"},
      {"flex", {{"gamma", 1 - 1e-12}}, "gamma 0.999999999999 is not"},
      {"flex", {{"tau", nan}}, "tau nan is not from 0"},
      {"flex", {{"min_budget_tokens", 0}}, "min_budget_tokens 0 is not a whole number from 1"},
      {"share", {{"pivots_per_layer", -1}}, "pivots_per_layer -1"},
      {"share", {{"clusters", 1}}, "policy share has no parameter \"clusters\""},
      {"skeleton", {{"local_tokens", 0}}, "local_tokens 0"},
      {"skeleton", {{"epsilon", 0}}, "epsilon 0 is not from"},
      {"vertical_slash", {{"n_slash", 0}}, "n_slash 0"},
      {"xattention", {{"stride", 24}}, "stride 24 does not divide 128"},
      {"a_shape", {{"sinks", 1}}, "policy a_shape has no parameter \"sinks\""},
      {"a_shape", {{"window_tokens", 0}}, "window_tokens 0 is not a whole number from 1 to 4194304"},
      {"a_shape", {{"window_tokens", 4194305}}, "window_tokens 4194305"},
      {"a_shape", {{"window_tokens", 1.5}}, "window_tokens 1.5"},
      {"a_shape", {{"sink_tokens", -1}}, "sink_tokens -1 is not a whole number from 0 to 4194304"},
      {"a_shape", {{"sink_tokens", 1e300}}, "sink_tokens 1"},
      {"a_shape", {{"sink_tokens", nan}}, "sink_tokens nan"},
      {"a_shape", {{"window_tokens", INFINITY}}, "window_tokens inf"},
  };
  for (const Row& row : kRows) {
    std::unique_ptr<PatternPolicy> policy;
    const Status status = MakePolicy(row.name, row.parameters, &policy);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << row.words;
    EXPECT_NE(status.message().find(row.words), std::string::npos) << status.message();
    EXPECT_EQ(policy, nullptr);
  }
}

TEST(Policy, ParametersReachTheirFields) {
  const auto flash2 = std::get<reference::Flash2Parameters>(
      Make("flash2", {{"alpha", 0.25}, {"dense_last_tiles", 3}, {"dense_layers", 0}})->parameters());
  EXPECT_EQ(flash2.alpha, 0.25);
  EXPECT_EQ(flash2.dense_last_tiles, 3);
  EXPECT_EQ(flash2.dense_layers, 0);
  EXPECT_EQ(flash2.window_blocks, 4);
  const auto slash =
      std::get<reference::VerticalSlashParameters>(Make("vertical_slash", {{"n_slash", 77}})->parameters());
  EXPECT_EQ(slash.budgets[0].n_slash, 77);
  EXPECT_EQ(slash.budgets[0].n_vertical, 1000);
  EXPECT_EQ(std::get<ShareWithClusters>(Make("share", {{"gamma", 0.95}})->parameters()).share.gamma, 0.95);
  EXPECT_EQ(std::get<reference::XAttentionParameters>(Make("xattention", {{"threshold", 0.8}})->parameters())
                .thresholds[0],
            0.8);
  for (const std::string& name : PolicyNames()) {
    std::unique_ptr<PatternPolicy> policy;
    EXPECT_TRUE(MakePolicy(name, {}, &policy).ok()) << name;
    EXPECT_EQ(policy->name(), name);
  }
}

TEST(Policy, WhatSearchesIsRefusedByName) {
  BlockIndex index;
  const Status status = Make("flex", {})->Select(Prompt(1000), &index);
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("policy flex"), std::string::npos);
}

TEST(Policy, RefusesTilesOutsideThePrompt) {
  BlockIndex index;
  for (const auto& policy : {Make("dense", {}), Make("a_shape", {})}) {
    PatternInputs inputs = Prompt(1000);
    inputs.num_q_tiles = 9;
    EXPECT_EQ(policy->Select(inputs, &index).code(), StatusCode::kInvalidArgument);
    inputs = Prompt(1000);
    inputs.first_q_tile = 1;
    EXPECT_EQ(policy->Select(inputs, &index).code(), StatusCode::kInvalidArgument);
    inputs.first_q_tile = -1;
    EXPECT_EQ(policy->Select(inputs, &index).code(), StatusCode::kInvalidArgument);
    inputs.first_q_tile = INT64_MAX;
    EXPECT_EQ(policy->Select(inputs, &index).code(), StatusCode::kInvalidArgument);
    inputs = Prompt(1000);
    inputs.num_tokens = -1;
    EXPECT_EQ(policy->Select(inputs, &index).code(), StatusCode::kInvalidArgument);
    inputs = Prompt(0);
    EXPECT_TRUE(policy->Select(inputs, &index).ok());
  }
}

}  // namespace
}  // namespace headwater::kernels
