// The sm_90a attention kernel against the double-precision reference.
#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "gtest/gtest.h"

#include "tests/kernels/cuda/attention_problem.h"

namespace headwater::kernels {
namespace {

class CudaAttentionGpuTest : public ::testing::TestWithParam<Case> {};

TEST_P(CudaAttentionGpuTest, MatchesReference) {
  HW_REQUIRE_SM90();
  const Problem problem(GetParam(), 20261122);
  const DeviceProblem device(problem);

  const Status status = device.Run();

  ASSERT_TRUE(status.ok()) << status.message();
  std::vector<double> wanted, wanted_lse;
  problem.Reference(&wanted, &wanted_lse);
  EXPECT_LE(RelativeError(device.Out(), wanted), kRelativeError);
  ExpectLse(device.lse.Host(), wanted_lse);
  EXPECT_TRUE(device.Intact());
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaAttentionGpuTest,
    ::testing::Values(Case{"one_token", 8, 2, 128, 1, 1}, Case{"tile_minus_1", 8, 2, 128, 127, 127},
                      Case{"tile", 8, 2, 128, 128, 128}, Case{"tile_plus_1", 8, 2, 128, 129, 129},
                      Case{"ragged", 8, 2, 128, 1000, 1000}, Case{"chunk", 8, 2, 128, 300, 1000},
                      Case{"one_query", 8, 2, 128, 1, 700}, Case{"mha", 4, 4, 128, 333, 333},
                      Case{"gqa3", 9, 3, 128, 333, 401}, Case{"gqa5", 5, 1, 128, 333, 401},
                      Case{"gqa6", 6, 1, 128, 333, 401}, Case{"gqa7", 14, 2, 128, 333, 401},
                      Case{"gqa8", 8, 1, 128, 333, 401}, Case{"d64", 8, 2, 64, 1000, 1000},
                      Case{"d64_one", 8, 2, 64, 1, 1}, Case{"d64_gqa3", 9, 3, 64, 333, 401},
                      Case{"d64_mha", 4, 4, 64, 577, 700}),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Positions, CudaAttentionGpuTest,
    ::testing::Values(Case{"some_rows_see_nothing", 8, 2, 128, 300, 260, -5, Lists::kNone, true},
                      Case{"most_rows_see_nothing", 8, 2, 128, 300, 260, -200, Lists::kNone, true},
                      Case{"nobody_sees_anything", 8, 2, 128, 300, 260, -300, Lists::kNone, true},
                      Case{"unaligned", 8, 2, 128, 300, 260, 37, Lists::kNone, true},
                      Case{"everything_visible", 8, 2, 128, 300, 260, 100000, Lists::kNone, true},
                      Case{"d64_unaligned", 6, 2, 64, 300, 260, 37, Lists::kNone, true}),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Lists, CudaAttentionGpuTest,
    ::testing::Values(Case{"kv_heads", 8, 2, 128, 1500, 1500, kAligned, Lists::kPerKvHead},
                      Case{"query_heads", 8, 2, 128, 1500, 1500, kAligned, Lists::kPerQueryHead},
                      Case{"chunk_kv_heads", 8, 2, 128, 700, 1900, kAligned, Lists::kPerKvHead},
                      Case{"chunk_query_heads", 8, 2, 128, 700, 1901, kAligned, Lists::kPerQueryHead},
                      Case{"gqa3_kv_heads", 9, 3, 128, 700, 1900, kAligned, Lists::kPerKvHead},
                      Case{"d64_kv_heads", 8, 2, 64, 700, 1900, kAligned, Lists::kPerKvHead},
                      Case{"d64_query_heads", 8, 2, 64, 700, 1900, kAligned, Lists::kPerQueryHead}),
    [](const auto& test) { return test.param.name; });

// From 65,536 keys on dense steps are 160 keys wide.
INSTANTIATE_TEST_SUITE_P(
    WideSteps, CudaAttentionGpuTest,
    ::testing::Values(Case{"long", 4, 1, 128, 100, 65536}, Case{"long_ragged", 4, 1, 128, 130, 65671},
                      Case{"long_unaligned", 4, 1, 128, 65, 65536, 37},
                      Case{"long_f32", 4, 1, 128, 129, 65537, kAligned, Lists::kNone, true}),
    [](const auto& test) { return test.param.name; });

// Means stand for what is not listed. 1,024 keys are a superblock, 8,192 a group of them; 20,000 keys take
// two steps over means.
INSTANTIATE_TEST_SUITE_P(
    Correction, CudaAttentionGpuTest,
    ::testing::Values(
        Case{"corrected_one_block", 8, 2, 128, 200, 200, kAligned, Lists::kPerKvHead, false, true},
        Case{"corrected", 8, 2, 128, 1500, 1500, kAligned, Lists::kPerKvHead, false, true},
        Case{"corrected_f32", 8, 2, 128, 700, 2900, kAligned, Lists::kPerKvHead, true, true},
        Case{"corrected_query_heads", 8, 2, 128, 700, 3001, kAligned, Lists::kPerQueryHead, false, true},
        Case{"corrected_position", 8, 2, 128, 300, 4000, 1029, Lists::kPerKvHead, false, true},
        Case{"corrected_gqa3", 9, 3, 128, 333, 9000, kAligned, Lists::kPerKvHead, false, true},
        Case{"corrected_two_steps", 8, 2, 128, 300, 20000, kAligned, Lists::kPerKvHead, false, true},
        Case{"corrected_d64", 8, 2, 64, 700, 9001, kAligned, Lists::kPerKvHead, false, true},
        Case{"corrected_d64_query_heads", 4, 2, 64, 300, 20000, kAligned, Lists::kPerQueryHead, false, true}),
    [](const auto& test) { return test.param.name; });

// Several sequences in one call; the last key row of sequence `poisoned` holds NaN.
TEST(CudaAttentionGpuTest, SequencesDoNotTouchEachOther) {
  HW_REQUIRE_SM90();
  const std::vector<int> q_lens = {1, 127, 128, 129, 400, 0, 33}, kv_lens = {1, 127, 300, 129, 511, 50, 33};
  constexpr int kPoisoned = 2, kQHeads = 8, kKvHeads = 2, kDim = 128;
  std::vector<int32_t> cu_q = {0}, cu_k = {0};
  std::vector<float> q, k, v;
  std::vector<std::unique_ptr<Problem>> problems;
  for (size_t i = 0; i < q_lens.size(); ++i) {
    problems.push_back(std::make_unique<Problem>(Case{"", kQHeads, kKvHeads, kDim, q_lens[i], kv_lens[i]},
                                                 static_cast<uint32_t>(i)));
    const auto append = [](std::vector<float>* to, const std::vector<float>& from) {
      to->insert(to->end(), from.begin(), from.end());
    };
    append(&q, problems[i]->q);
    append(&k, problems[i]->k);
    append(&v, problems[i]->v);
    cu_q.push_back(cu_q.back() + q_lens[i]);
    cu_k.push_back(cu_k.back() + kv_lens[i]);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(v.begin() + int64_t{cu_k[kPoisoned]} * kKvHeads * kDim, kKvHeads * kDim, nan);
  DeviceArray<uint16_t> dq(ToBf16(q)), dk(ToBf16(k)), dv(ToBf16(v)), out(q.size());
  DeviceArray<int32_t> dcu_q(cu_q), dcu_k(cu_k);
  CudaAttentionArgs args;
  args.q = dq.data();
  args.k = dk.data();
  args.v = dv.data();
  args.out = out.data();
  args.total_q = cu_q.back();
  args.total_k = cu_k.back();
  args.num_q_heads = kQHeads;
  args.num_kv_heads = kKvHeads;
  args.head_dim = kDim;
  args.softmax_scale = static_cast<float>(1 / std::sqrt(kDim));
  args.num_sequences = static_cast<int32_t>(q_lens.size());
  args.cu_seqlens_q = dcu_q.data();
  args.cu_seqlens_k = dcu_k.data();
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(args));

  const Status status = CudaAttention(args, workspace.data(), workspace.size(), nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<float> got = ToFloat(out.Host());
  for (size_t i = 0; i < q_lens.size(); ++i) {
    if (i == kPoisoned || q_lens[i] == 0) continue;
    std::vector<double> wanted, lse;
    problems[i]->Reference(&wanted, &lse);
    const auto begin = got.begin() + int64_t{cu_q[i]} * kQHeads * kDim;
    EXPECT_LE(RelativeError({begin, begin + static_cast<int64_t>(wanted.size())}, wanted), kRelativeError)
        << "sequence " << i;
  }
  EXPECT_TRUE(out.Intact());
}

TEST(CudaAttentionGpuTest, NanInAQueryStaysInItsRow) {
  HW_REQUIRE_SM90();
  Problem problem({"", 8, 2, 128, 200, 200}, 7);
  constexpr size_t kRow = 150 * 8 + 3;
  std::vector<double> wanted, lse;
  problem.Reference(&wanted, &lse);
  std::fill_n(problem.q.begin() + kRow * 128, 128, std::numeric_limits<float>::quiet_NaN());
  const DeviceProblem device(problem);

  ASSERT_TRUE(device.Run().ok());

  std::vector<float> got = device.Out();
  for (size_t i = 0; i < 128; ++i) {
    EXPECT_TRUE(std::isnan(got[kRow * 128 + i]));
    got[kRow * 128 + i] = 0;
    wanted[kRow * 128 + i] = 0;
  }
  EXPECT_LE(RelativeError(got, wanted), kRelativeError);
}

TEST(CudaAttentionGpuTest, EqualCallsGiveEqualBits) {
  HW_REQUIRE_SM90();
  for (const bool corrected : {false, true}) {
    const Problem problem({"", 8, 2, 128, 3000, 3000, kAligned, Lists::kPerKvHead, false, corrected}, 9);
    const DeviceProblem device(problem);
    std::vector<uint16_t> first;
    for (int i = 0; i < 20; ++i) {
      ASSERT_TRUE(device.Run().ok());
      const std::vector<uint16_t> now = device.out.Host();
      if (i == 0) first = now;
      ASSERT_EQ(now, first) << "run " << i;
    }
  }
}

// As ranks and calls cut it; keys are taken 160 at a time from 65,536 on.
TEST(CudaAttentionGpuTest, AnyCutOfAPromptGivesTheSameBits) {
  HW_REQUIRE_SM90();
  constexpr int kTokens = 901;
  for (const int head_dim : {64, 128}) {
    for (const int64_t prompt : {int64_t{kTokens}, int64_t{1} << 17}) {
      SCOPED_TRACE(std::to_string(head_dim) + ", " + std::to_string(prompt));
      const Problem problem({"", 8, 2, head_dim, kTokens, kTokens}, 21);
      DeviceProblem whole(problem), cut(problem);
      whole.args.prompt_k = cut.args.prompt_k = prompt;
      ASSERT_TRUE(whole.Run().ok());
      std::vector<double> wanted, lse;
      problem.Reference(&wanted, &lse);
      EXPECT_LE(RelativeError(whole.Out(), wanted), kRelativeError);
      const std::vector<int64_t> cuts = {0, 128, 512, 768, kTokens};
      const CudaAttentionArgs all = cut.args;
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const int64_t row = int64_t{all.num_q_heads} * head_dim, begin = cuts[i];
        cut.args.q = cut.q.data() + begin * row;
        cut.args.out = cut.out.data() + begin * row;
        cut.args.lse_ln = nullptr;
        cut.args.total_q = cuts[i + 1] - begin;
        cut.args.total_k = cuts[i + 1];
        ASSERT_TRUE(cut.Run().ok());
      }
      EXPECT_EQ(cut.out.Host(), whole.out.Host());
    }
  }
}

TEST(CudaAttentionGpuTest, TheOutputMayTakeThePlaceOfTheQueries) {
  HW_REQUIRE_SM90();
  for (const int heads : {8, 9}) {  // 9 / 3: rows leave without the tensor map
    const Problem problem({"", heads, heads == 8 ? 2 : 3, 128, 3001, 3001}, 13);
    const DeviceProblem apart(problem);
    DeviceProblem together(problem);
    together.args.out = together.q.data();

    ASSERT_TRUE(apart.Run().ok() && together.Run().ok());

    EXPECT_EQ(together.q.Host(), apart.out.Host());
  }
}

// Lists that break the rules: they are found, and the kernel that is given them writes only where it may.
struct BadList {
  const char* name;
  std::function<void(Problem*)> spoil;  // segment 5, which has three blocks
  int64_t first_bad = 5;
};

std::ostream& operator<<(std::ostream& out, const BadList& list) { return out << list.name; }

class CudaBadListsGpuTest : public ::testing::TestWithParam<BadList> {};

TEST_P(CudaBadListsGpuTest, AreFoundAndHarmless) {
  HW_REQUIRE_SM90();
  Problem problem({"", 8, 2, 128, 600, 600, kAligned, Lists::kPerKvHead, false, true}, 11);
  for (size_t i = 0; i < problem.counts.size(); ++i) {
    problem.counts[i] = static_cast<int32_t>(i % 19 < 9 ? i % 19 / 4 : 3);
    problem.offsets[i] = 0;
  }
  problem.counts[5] = 2;
  problem.offsets[5] = 3;
  problem.counts[0] = -1;
  problem.blocks = {0, 1, 2, 0, 1, 3, 0};
  GetParam().spoil(&problem);
  const DeviceProblem device(problem);
  const DeviceArray<int64_t> first_bad(1);
  DeviceArray<unsigned char> workspace(CudaAttentionWorkspaceBytes(device.args));

  const Status status = CudaCheckBlockLists(device.args, static_cast<int64_t>(problem.blocks.size()),
                                            first_bad.data(), workspace.data(), workspace.size(), nullptr);

  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(first_bad.Host()[0], GetParam().first_bad);
  EXPECT_TRUE(first_bad.Intact() && workspace.Intact());
  const bool leaves_the_arrays =
      problem.offsets[5] < 0 || problem.offsets[5] + std::max(0, problem.counts[5]) > 7;
  if (!leaves_the_arrays) {
    ASSERT_TRUE(device.Run().ok());
    EXPECT_TRUE(device.Intact());
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, CudaBadListsGpuTest,
    ::testing::Values(BadList{"good", [](Problem*) {}, -1},
                      BadList{"unsorted", [](Problem* p) { std::swap(p->blocks[3], p->blocks[4]); }},
                      BadList{"repeated", [](Problem* p) { p->blocks[4] = 0; }},
                      BadList{"negative", [](Problem* p) { p->blocks[3] = -7; }},
                      BadList{"past_the_diagonal", [](Problem* p) { p->blocks[4] = 2; }},
                      BadList{"huge", [](Problem* p) { p->blocks[4] = INT32_MAX; }},
                      BadList{"count_below_minus_one", [](Problem* p) { p->counts[5] = -2; }},
                      BadList{"more_than_visible", [](Problem* p) { p->counts[5] = 3; }},
                      BadList{"offset_negative", [](Problem* p) { p->offsets[5] = -1; }},
                      BadList{"offset_past_the_end", [](Problem* p) { p->offsets[5] = 6; }},
                      BadList{"first_of_two",
                              [](Problem* p) {
                                p->counts[9] = 100;
                                p->offsets[5] = 7;
                              }}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace headwater::kernels
