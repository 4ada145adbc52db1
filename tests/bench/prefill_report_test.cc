#include "bench/prefill_report.h"

#include <algorithm>
#include <map>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "model/presets.h"

namespace headwater {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// 4 s for 1000 tokens, of which 3 s are its floor.
PrefillReport Report() {
  PrefillReport report;
  report.device = "Some GPU";
  report.linear = "bf16";
  report.date = absl::FromUnixSeconds(1'700'000'000);
  report.tokens = 1000;
  report.gpus = 1;
  report.ttft_s = 4;
  report.stages = {{"linear", 2.5}, {"egress_stall", 0.125}};
  report.density = 0.25;
  report.linear_flop = 6e12;
  report.attention_flop = 2e12;
  report.linear_floor_s = 2;
  report.attention_floor_s = 1;
  report.planned_bytes = uint64_t{3} << 30;
  report.peak_bytes = uint64_t{7} << 29;
  return report;
}

// Head and row as columns by title.
std::map<std::string, std::string> Columns(const PrefillReport& report) {
  const std::string head = TableHead(report), row = TableRow(report);
  EXPECT_EQ(head.size(), row.size()) << head << row;
  std::map<std::string, std::string> columns;
  for (size_t begin = 0; begin < head.size();) {
    // Cells are to the right and two blanks apart; a title holds single blanks only.
    const size_t first = head.find_first_not_of(" \n", begin);
    if (first == std::string::npos) break;
    const size_t end = std::min(head.find("  ", first), head.find('\n', first));
    std::string value = row.substr(begin, end - begin);
    columns[head.substr(first, end - first)] = value.substr(value.find_first_not_of(' '));
    begin = end;
  }
  return columns;
}

TEST(PrefillReportTest, SeveralGpusAreToldOf) {
  PrefillReport report = Report();
  report.gpus = 2;
  report.group = {"zigzag", "allgather", 0.0125, 1.03, {{2, 1, 0.05, 0}, {2.5, 0.5, 0, 0.25}}, 16};
  PrefillBenchOptions options;
  options.checkpoint_layers = 8;
  const nlohmann::ordered_json row = ToJson(report, options);
  EXPECT_EQ(row["params"]["gpus"], 2);
  EXPECT_EQ(row["params"]["partition"], "zigzag");
  EXPECT_EQ(row["params"]["strategy"], "allgather");
  EXPECT_EQ(row["params"]["checkpoint_layers"], 8);
  ASSERT_EQ(row["ranks"].size(), 2U);
  EXPECT_EQ(row["ranks"][0]["linear_s"], 2.0);
  EXPECT_EQ(row["ranks"][0]["exchange_s"], 0.05);
  EXPECT_EQ(row["ranks"][1]["attention_s"], 0.5);
  EXPECT_EQ(row["ranks"][1]["egress_stall_s"], 0.25);
  EXPECT_EQ(row["metrics"]["exposed_comm_ratio"], 0.0125);
  EXPECT_EQ(row["metrics"]["imbalance"], 1.03);
  EXPECT_EQ(row["metrics"]["checkpoint_layer"], 16);
  EXPECT_EQ(row["metrics"]["tflops_per_gpu"], 1.0);  // 8 TFLOP in 4 s on two
  const auto columns = Columns(report);
  EXPECT_EQ(columns.at("exposed"), "1.2 %");
  EXPECT_EQ(columns.at("imbalance"), "1.030");
  EXPECT_NE(TableTitle(report, options).find("2 GPUs, zigzag, allgather"), std::string::npos);
}

TEST(PrefillReportTest, FlopOfAShapeCountedByHand) {
  ModelConfig config;
  config.num_layers = 3;
  config.hidden_size = 8;
  config.intermediate_size = 16;
  config.num_q_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim = 4;
  // Projections: 8 to (2 + 1 + 1) * 4, 10 rows in 3 layers; the rest: 8 to 8 and 3 times 8 to 16, 10 rows in
  // 2 layers and one row in the last.
  EXPECT_DOUBLE_EQ(LinearFlop(config, 10), 2.0 * 8 * 16 * 30 + 2.0 * (64 + 3 * 128) * 21);
  // 55 causal pairs in two layers, 10 in the last; two products of 4 for each of two heads.
  EXPECT_DOUBLE_EQ(DenseAttentionFlop(config, 10), 4.0 * 2 * 4 * (2 * 55 + 10));
  EXPECT_DOUBLE_EQ(LinearSeconds({2, 5}, config, 10), 2 * 30 + 5 * 21);
}

TEST(PrefillReportTest, FlopOfLlama3) {
  const auto config = PresetConfig("llama-3-8b", 1 << 20);
  ASSERT_TRUE(config.ok()) << config.status();
  // 6.98e9 parameters in linear layers, of which the last layer's 0.19e9 after K and V see one token.
  EXPECT_NEAR(LinearFlop(*config, 1 << 20), 1.4232e16, 1e12);
  EXPECT_NEAR(DenseAttentionFlop(*config, 1 << 20), 2.7922e17, 1e13);
}

TEST(PrefillReportTest, RowHasTheHouseFormat) {
  PrefillBenchOptions options;
  options.commit = "abc";
  options.sink = "verify";
  options.policy = {"probe", 0.01, {}};
  PrefillReport report = Report();
  report.kv_acked_s = 4.5;
  report.kv_acked_share = 0.875;

  const auto row = ToJson(report, options);

  EXPECT_EQ(row.dump(),
            R"({"bench":"prefill","device":"Some GPU","commit":"abc","date":"2023-11-14T22:13:20Z",)"
            R"("params":{"model":"llama-3-8b","weights":"random","tokens":1000,"gpus":1,"policy":"probe",)"
            R"("density_mode":"forced","linear":"bf16","sink":"verify","repeat":3},)"
            R"("metrics":{"ttft_s":4.0,"density":0.25,"tokens_per_s":250.0,"tflops_per_gpu":2.0,)"
            R"("kv_acked_s":4.5,"kv_acked_share_at_first_token":0.875,"linear_s":2.5,"egress_stall_s":0.125,)"
            R"("linear_floor_s":2.0,"attention_floor_s":1.0,"floor_s":3.0,"attention_flop":2000000000000.0,)"
            R"("planned_device_bytes":3221225472,"peak_device_bytes":3758096384},"peers":{}})");
}

TEST(PrefillReportTest, PredictionStandsBesideTheMeasurement) {
  PrefillReport report = Report();
  EXPECT_FALSE(ToJson(report, {}).contains("predicted"));
  EXPECT_EQ(Columns(report).count("predicted s"), 0u);
  v1::PlanCost& cost = report.predicted.emplace();
  cost.set_total_s(3.5);
  cost.set_linear_s(2);
  cost.set_attention_s(1);
  cost.set_exchange_s(1.25);
  cost.set_exchange_hidden_s(0.75);
  cost.set_egress_s(0.25);
  EXPECT_EQ(ToJson(report, {})["predicted"].dump(),
            R"({"ttft_s":3.5,"error":-0.125,"linear_s":2.0,"attention_s":1.0,"exchange_s":1.25,)"
            R"("exposed_s":0.5,"egress_s":0.25})");
  EXPECT_EQ(Columns(report).at("predicted s"), "3.5");
  EXPECT_THAT(TableTitle(report, {}), HasSubstr("predicted: the planner's"));
}

TEST(PrefillReportTest, EmulatedGpusAreCalledSo) {
  PrefillReport report = Report();
  report.gpus = 8;
  report.group = {"zigzag", "allgather", 0.0125, 1.03, {}, {}};
  PrefillBenchOptions options;
  EXPECT_FALSE(ToJson(report, options)["params"].contains("emulated"));
  options.emulate = true;
  options.link_gbytes_per_s = 250;
  const auto row = ToJson(report, options);
  EXPECT_EQ(row["params"]["emulated"], true);
  EXPECT_EQ(row["params"]["link_gbytes_per_s"], 250);
  EXPECT_THAT(TableTitle(report, options), HasSubstr("8 emulated GPUs"));
}

TEST(PrefillReportTest, SkippedLengthNamesBothSizes) {
  PrefillReport report = Report();
  report.device_bytes = uint64_t{2} << 30;
  const auto row = SkippedToJson(report, {});
  EXPECT_EQ(row["metrics"].dump(), R"({"planned_device_bytes":3221225472,"device_bytes":2147483648})");
  EXPECT_EQ(row["params"]["tokens"], 1000);
  EXPECT_EQ(row["skipped"], "the plan is over the device's memory");
  EXPECT_THAT(SkippedLine(report), AllOf(HasSubstr("3221225472"), HasSubstr("2147483648")));
}

TEST(PrefillReportTest, HostMemoryIsThereWhereSomeIsPlanned) {
  PrefillReport report = Report();
  EXPECT_FALSE(ToJson(report, {})["metrics"].contains("planned_host_bytes"));
  EXPECT_EQ(Columns(report).count("host GiB"), 0u);
  report.planned_host_bytes = uint64_t{3} << 29;
  EXPECT_EQ(ToJson(report, {})["metrics"]["planned_host_bytes"], uint64_t{3} << 29);
  EXPECT_EQ(Columns(report).at("host GiB"), "1.50");
  EXPECT_NE(TableTitle(report, {}).find("checkpoints, all GPUs"), std::string::npos);
}

TEST(PrefillReportTest, RowHasTheAttentionReport) {
  PrefillBenchOptions options;
  options.policy = {"headwater", 0, {{"threshold", 0.25}}};
  options.quality.min_recall = 0.95;
  options.measure_recall = true;
  PrefillReport report = Report();
  report.prompt = "text:1";
  v1::AttentionReport& attention = report.attention.emplace();
  attention.set_density(0.25);
  attention.set_recall_mean(0.96);
  attention.set_sampled_queries(32);
  attention.mutable_wait()->set_nanos(500'000'000);
  v1::AttentionGroup* const group = attention.add_groups();
  group->set_kv_head(0);
  group->set_density(0.5);
  group->set_recall(0.96875);
  group->set_threshold(static_cast<double>(0.1f));
  group->set_window_blocks(16);
  group->set_rounds(4);
  group->set_fallback(v1::ATTENTION_FALLBACK_DENSE_RECALL);
  attention.add_groups()->set_layer(1);

  const auto row = ToJson(report, options);

  EXPECT_EQ(row["params"]["prompt"], "text:1");
  EXPECT_EQ(row["params"]["min_recall"], 0.95);
  EXPECT_EQ(row["params"]["measure_recall"], true);
  EXPECT_EQ(row["params"]["policy_parameters"].dump(), R"({"threshold":0.25})");
  EXPECT_EQ(row["attention"].dump(),
            R"({"density":0.25,"recall_mean":0.96,"sampled_queries":32,"wait_s":0.5,"groups":[)"
            R"({"layer":0,"kv_head":0,"density":0.5,"recall":0.96875,"threshold":0.10000000149011612,)"
            R"("window_blocks":16,"rounds":4,"fallback":"dense_recall"},)"
            R"({"layer":1,"density":0.0,"rounds":0}]})");
  EXPECT_EQ(row["attention"]["groups"][0]["threshold"].get<float>(), 0.1f);
  auto columns = Columns(report);
  EXPECT_EQ(columns["recall"], "0.9600");
  EXPECT_EQ(columns["prompt"], "text:1");
}

TEST(PrefillReportTest, WhatIsNotKnownIsNotInTheRow) {
  PrefillReport report = Report();
  report.linear_floor_s.reset();
  report.attention_floor_s = 1;
  const auto row = ToJson(report, {});
  for (const char* key : {"kv_acked_s", "kv_acked_share_at_first_token", "linear_floor_s", "floor_s"}) {
    EXPECT_FALSE(row["metrics"].contains(key)) << key;
  }
  EXPECT_EQ(row["params"]["density_mode"], "natural");
  EXPECT_FALSE(row.contains("attention"));
  EXPECT_FALSE(row["params"].contains("measure_recall"));
}

TEST(PrefillReportTest, TableShowsEveryColumnInLine) {
  PrefillReport report = Report();
  auto columns = Columns(report);
  EXPECT_EQ(columns["tokens"], "1000");
  EXPECT_EQ(columns["TTFT s"], "4");
  EXPECT_EQ(columns["linear s"], "2.5");
  EXPECT_EQ(columns["egress stall s"], "0.125");
  EXPECT_EQ(columns["tokens/s"], "250");
  EXPECT_EQ(columns["TFLOP/s"], "2");
  EXPECT_EQ(columns["floor s"], "3");
  EXPECT_EQ(columns["of floor"], "75.0 %");
  EXPECT_EQ(columns["KV acked"], "-");
  EXPECT_EQ(columns["density"], "0.25");
  EXPECT_EQ(columns["peak GiB"], "3.50");
  EXPECT_EQ(columns["planned GiB"], "3.00");

  report.kv_acked_share = 0.875;
  report.linear_floor_s.reset();
  columns = Columns(report);
  EXPECT_EQ(columns["KV acked"], "87.5 %");
  EXPECT_EQ(columns["floor s"], "-");
  EXPECT_EQ(columns["of floor"], "-");
}

TEST(PrefillReportTest, TitleSaysWhatTheFloorHolds) {
  PrefillBenchOptions options;
  options.attention_tflops = 640;
  PrefillReport report = Report();
  EXPECT_THAT(TableTitle(report, options),
              AllOf(HasSubstr("Some GPU: llama-3-8b (random weights), linear bf16, policy dense, sink none"),
                    HasSubstr("attention's FLOP at 640 TFLOP/s")));
  report.attention_floor_s.reset();
  EXPECT_THAT(TableTitle(report, options), HasSubstr("without attention, which --attention_tflops adds"));
  report.linear_floor_s.reset();
  EXPECT_THAT(TableTitle(report, options), Not(HasSubstr("floor")));
}

}  // namespace
}  // namespace headwater
