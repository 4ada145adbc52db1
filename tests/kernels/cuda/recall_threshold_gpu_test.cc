// Thresholds for a wanted recall on the GPU against lists and masses of the double-precision references.
#include "kernels/cuda/recall_threshold.h"

#include <algorithm>
#include <cmath>

#include "gtest/gtest.h"

#include "kernels/cuda/block_stats.h"
#include "kernels/reference/block_mass.h"
#include "kernels/reference/select_blocks.h"
#include "tests/kernels/cuda/gpu.h"
#include "tests/kernels/cuda/near.h"
#include "tests/kernels/policies/random_problem.h"

namespace headwater::kernels {
namespace {

// f32 scores of bf16 means: what lies closer to a step (log2 units) may be listed or not.
constexpr double kNear = 0.01, kMassError = 1e-4;

struct Case {
  const char* name;
  int tokens, q_heads, kv_heads, head_dim;
  int rows = 32, dense_last_tokens = 0, window_blocks = 1;
  float min_recall = 0.9f;

  int Positions() const { return 128 / (q_heads / kv_heads); }
  int Tiles() const { return (tokens + Positions() - 1) / Positions(); }
  int Blocks() const { return (tokens + 127) / 128; }
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

// Keys of some blocks are longer, so that some blocks are worth more than others.
reference::RandomProblem Made(const Case& c) {
  reference::RandomProblem made(c.tokens, c.q_heads, c.kv_heads, c.head_dim);
  for (int token = 0; token < c.tokens; ++token) {
    for (int i = 0; i < c.kv_heads * c.head_dim; ++i) {
      made.Key(token)[i] *= 0.3f + static_cast<float>(token / 128 * 5 % 7) / 3;
    }
  }
  made.q = ToFloat(ToBf16(made.q));
  made.k = ToFloat(ToBf16(made.k));
  made.Point();
  return made;
}

struct Bounds {
  double low = 0, high = 0;
};

// Lists that the search makes under a threshold, and what of a row's mass they hold, at least and at most.
class Lists {
 public:
  Lists(const Case& c, const reference::RandomProblem& problem, double threshold) : case_(c) {
    reference::SelectBlocksArgs args;
    args.q = problem.q.data();
    args.k = problem.k.data();
    args.total_q = args.total_k = c.tokens;
    args.num_q_heads = c.q_heads;
    args.num_kv_heads = c.kv_heads;
    args.head_dim = c.head_dim;
    args.softmax_scale = problem.get.softmax_scale;
    args.threshold = threshold;
    args.sink_blocks = 2;
    args.window_blocks = c.window_blocks;
    args.dense_last_tokens = c.dense_last_tokens;
    selected_ = reference::SelectBlocks(args, kNear);
  }

  // mass: of a row by block, a mean over the heads of the group.
  Bounds Held(int kv_head, int64_t position, const std::vector<double>& mass) const {
    const auto& tile = selected_[static_cast<size_t>(kv_head) * case_.Tiles() + position / case_.Positions()];
    Bounds bounds;
    for (int block = 0; block < case_.Blocks(); ++block) {
      const auto in = [&](const std::vector<int32_t>& list) {
        return std::find(list.begin(), list.end(), block) != list.end();
      };
      const bool listed = tile.dense || in(tile.blocks), either = in(tile.undecided);
      if (listed && !either) bounds.low += mass[block];
      if (listed || either) bounds.high += mass[block];
    }
    return bounds;
  }

 private:
  const Case case_;
  std::vector<reference::SelectedBlocks> selected_;
};

struct Found {
  Status status;
  std::vector<float> curve, thresholds;
};

class RecallThresholdGpuTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    HW_REQUIRE_SM90();
    const Case& c = GetParam();
    problem_ = std::make_unique<reference::RandomProblem>(Made(c));
    for (int row = 0; row < c.rows; ++row) {
      positions_.push_back((int64_t{row} * c.tokens + c.tokens / 2) / c.rows);
    }
    std::vector<float> mass(static_cast<size_t>(c.rows) * c.q_heads * c.Blocks());
    mass_.assign(static_cast<size_t>(c.rows) * c.kv_heads, std::vector<double>(c.Blocks()));
    const int pack = c.q_heads / c.kv_heads;
    for (int head = 0; head < c.q_heads; ++head) {
      const std::vector<double> lse = reference::LogSumExp(problem_->get, head);
      for (int row = 0; row < c.rows; ++row) {
        const std::vector<double> of_row =
            reference::RowMass(problem_->get, positions_[row], head, lse[positions_[row]]);
        for (int block = 0; block < c.Blocks(); ++block) {
          mass[(static_cast<size_t>(row) * c.q_heads + head) * c.Blocks() + block] =
              static_cast<float>(of_row[block]);
          mass_[static_cast<size_t>(row) * c.kv_heads + head / pack][block] += of_row[block] / pack;
        }
      }
    }
    device_mass_ = std::make_unique<DeviceArray<float>>(mass);
  }

  Found Run(float min_recall, float errors) {
    const Case& c = GetParam();
    DeviceArray<uint16_t> q(ToBf16(problem_->q)), k(ToBf16(problem_->k));
    DeviceArray<float> mean(static_cast<size_t>(CudaStatsBlocks(c.tokens)) * c.kv_heads * c.head_dim);
    DeviceArray<uint16_t> table(static_cast<size_t>(CudaMeanTableRows(c.tokens)) * c.kv_heads * c.head_dim);
    CudaBlockStats stats;
    stats.k_mean = mean.data();
    EXPECT_TRUE(
        CudaBlockStatistics({k.data(), nullptr, c.tokens, c.kv_heads, c.head_dim, 0, stats}, nullptr).ok());
    EXPECT_TRUE(CudaMeanTables(
                    {mean.data(), nullptr, table.data(), nullptr, c.tokens, c.kv_heads, c.head_dim}, nullptr)
                    .ok());
    DeviceArray<int64_t> positions(positions_);
    DeviceArray<float> curve(static_cast<size_t>(c.rows) * c.kv_heads * (kRecallSteps + 1)),
        thresholds(static_cast<size_t>(c.kv_heads));
    CudaRecallThresholdArgs args;
    args.q = q.data();
    args.k_means = table.data();
    args.num_tokens = c.tokens;
    args.num_q_heads = c.q_heads;
    args.num_kv_heads = c.kv_heads;
    args.head_dim = c.head_dim;
    args.softmax_scale = static_cast<float>(problem_->get.softmax_scale);
    args.window_blocks = c.window_blocks;
    args.dense_last_tokens = c.dense_last_tokens;
    args.goal.rows = {positions.data(), nullptr, c.rows};
    args.goal.mass = device_mass_->data();
    args.goal.min_recall = min_recall;
    args.goal.errors = errors;
    args.goal.curve = curve.data();
    args.goal.thresholds = thresholds.data();
    Found found;
    found.status = CudaThresholdsForRecall(args, nullptr);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(curve.Intact() && thresholds.Intact());
    found.curve = curve.Host();
    found.thresholds = thresholds.Host();
    return found;
  }

  float CurveAt(const Found& found, int row, int kv_head, int step) const {
    return found
        .curve[(static_cast<size_t>(row) * GetParam().kv_heads + kv_head) * (kRecallSteps + 1) + step];
  }

  std::unique_ptr<reference::RandomProblem> problem_;
  std::vector<int64_t> positions_;
  std::vector<std::vector<double>> mass_;  // [rows * KV heads][blocks]
  std::unique_ptr<DeviceArray<float>> device_mass_;
};

TEST_P(RecallThresholdGpuTest, CurvesAreTheMassesOfTheSearchsLists) {
  const Case& c = GetParam();
  const Found found = Run(c.min_recall, 2), again = Run(c.min_recall, 2);
  ASSERT_TRUE(found.status.ok()) << found.status.message();
  EXPECT_TRUE(SameBits(found.curve, again.curve));
  for (const int step : {0, 12, 37, 80, kRecallSteps}) {
    const Lists lists(c, *problem_, std::exp2(-step / double{kRecallStepsPerOctave}));
    for (int row = 0; row < c.rows; ++row) {
      for (int head = 0; head < c.kv_heads; ++head) {
        const Bounds held =
            lists.Held(head, positions_[row], mass_[static_cast<size_t>(row) * c.kv_heads + head]);
        EXPECT_GE(CurveAt(found, row, head, step), held.low - kMassError)
            << step << " " << row << " " << head;
        EXPECT_LE(CurveAt(found, row, head, step), held.high + kMassError)
            << step << " " << row << " " << head;
      }
    }
  }
}

TEST_P(RecallThresholdGpuTest, TheFirstStepThatHoldsIsTaken) {
  const Case& c = GetParam();
  for (const float errors : {0.0f, 2.0f}) {
    const Found found = Run(c.min_recall, errors);
    ASSERT_TRUE(found.status.ok()) << found.status.message();
    for (int head = 0; head < c.kv_heads; ++head) {
      const auto holds = [&](int step) {
        double sum = 0, squares = 0;
        for (int row = 0; row < c.rows; ++row) {
          const double x = CurveAt(found, row, head, step);
          sum += x;
          squares += x * x;
        }
        const double mean = sum / c.rows;
        const double variance = c.rows == 1 ? 0 : std::fmax(0, (squares - sum * mean) / (c.rows - 1));
        return mean - errors * std::sqrt(variance / c.rows) >= c.min_recall;
      };
      int first = 0;
      while (first <= kRecallSteps && !holds(first)) ++first;
      const float wanted =
          first > kRecallSteps ? 0 : std::exp2(-static_cast<float>(first) / kRecallStepsPerOctave);
      EXPECT_FLOAT_EQ(found.thresholds[head], wanted) << head << ", errors " << errors;
    }
  }
}

TEST_P(RecallThresholdGpuTest, MassesThatAreNoNumbersAreEnoughForNothing) {
  const Case& c = GetParam();
  std::vector<float> mass = device_mass_->Host();
  std::fill(mass.begin(), mass.end(), NAN);
  device_mass_ = std::make_unique<DeviceArray<float>>(mass);
  const Found found = Run(c.min_recall, 2);
  ASSERT_TRUE(found.status.ok()) << found.status.message();
  for (const float threshold : found.thresholds) EXPECT_EQ(threshold, 0);
}

INSTANTIATE_TEST_SUITE_P(
    RecallThreshold, RecallThresholdGpuTest,
    ::testing::Values(Case{"one_token", 1, 2, 1, 128, 1}, Case{"one_block", 128, 4, 1, 64, 3},
                      Case{"block_plus_1", 129, 3, 1, 64, 5}, Case{"gqa1", 1500, 2, 2, 128},
                      Case{"gqa3_ragged", 1333, 6, 2, 64}, Case{"gqa4", 2560, 8, 2, 128, 64, 200, 3},
                      Case{"gqa5", 1100, 5, 1, 128}, Case{"gqa7_ragged", 1279, 7, 1, 128, 40, 100},
                      Case{"gqa8", 2049, 16, 2, 64, 100, 0, 2, 0.97f},
                      Case{"all_of_it", 900, 4, 2, 128, 20, 0, 1, 1.0f}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
