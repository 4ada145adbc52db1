#include "worker/prefill.h"

#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "kernels/attention/attention.h"
#include "tests/model/dense_forward.h"
#include "tests/worker/hooked_model.h"
#include "tests/worker/prefill_group.h"

namespace headwater::testing {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

std::unique_ptr<Model> LoadF32(const std::string& directory) {
  auto model = Model::Load({directory, kernels::DType::kF32, 0});
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

void ExpectAllOk(const GroupResult& group) {
  for (const absl::Status& status : group.statuses) ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(group.kv.times(), Each(1));
}

void ExpectNear(const GroupResult& group, const DenseResult& expected, double most) {
  for (size_t layer = 0; layer < expected.k.size(); ++layer) {
    const auto at = static_cast<uint32_t>(layer);
    EXPECT_LE(RelativeError(group.kv.Tensor(at, KvKind::kK), expected.k[layer]), most) << "k." << layer;
    EXPECT_LE(RelativeError(group.kv.Tensor(at, KvKind::kV), expected.v[layer]), most) << "v." << layer;
  }
  EXPECT_LE(RelativeError(group.logits, expected.logits), most) << "logits";
}

// A longer prompt than the golden ones, from the same vocabulary.
std::vector<int32_t> LongPrompt(const Model& model, int64_t count) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>((i * 7919 + i / 3) % model.config().vocab_size));
  }
  return tokens;
}

constexpr v1::Partition kPartitions[] = {v1::PARTITION_CONTIGUOUS, v1::PARTITION_ZIGZAG,
                                         v1::PARTITION_STRIPED};

class GoldenPrefill : public ::testing::TestWithParam<std::tuple<std::string, int, v1::Partition>> {};

TEST_P(GoldenPrefill, AgreesWithTransformers) {
  const auto& [name, world_size, partition] = GetParam();
  const Golden golden = ReadGolden(name);
  const auto model = LoadF32(golden.directory);
  GroupRun run;
  run.world_size = world_size;
  run.partition = partition;

  const auto group = RunGroup(*model, golden.tokens, run);

  ExpectAllOk(*group);
  ExpectNear(*group, golden.expected, 1e-4);
  EXPECT_EQ(TopTokens(group->logits, 1)[0].token, TopTokens(golden.expected.logits, 1)[0].token);
}

std::string RowName(const ::testing::TestParamInfo<GoldenPrefill::ParamType>& row) {
  return absl::StrCat(
      std::get<0>(row.param), "_ranks", std::get<1>(row.param),
      absl::AsciiStrToLower(absl::StripPrefix(v1::Partition_Name(std::get<2>(row.param)), "PARTITION")));
}
INSTANTIATE_TEST_SUITE_P(All, GoldenPrefill,
                         ::testing::Combine(::testing::ValuesIn(GoldenNames()), ::testing::Values(1, 2, 4),
                                            ::testing::ValuesIn(kPartitions)),
                         RowName);

class PrefillTest : public ::testing::Test {
 protected:
  PrefillTest() : golden_(ReadGolden(GoldenNames()[0])), model_(LoadF32(golden_.directory)) {}

  GroupRun Two(v1::Partition partition) const {
    GroupRun run;
    run.world_size = 2;
    run.partition = partition;
    return run;
  }

  Golden golden_;
  std::unique_ptr<Model> model_;
};

TEST_F(PrefillTest, GivesBitwiseEqualKvForTheSamePlanTwice) {
  for (const auto partition : kPartitions) {
    const auto first = RunGroup(*model_, golden_.tokens, Two(partition));
    const auto second = RunGroup(*model_, golden_.tokens, Two(partition));

    ExpectAllOk(*first);
    ExpectAllOk(*second);
    EXPECT_EQ(first->kv.bytes(), second->kv.bytes());
    EXPECT_EQ(first->logits, second->logits);
    EXPECT_EQ(first->digest, second->digest);
  }
}

// Sizes around the edges of blocks, ranks and tiles: empty ranks, one token, a short last block.
TEST_F(PrefillTest, AgreesWithOneRankForEveryPromptLength) {
  for (const int64_t length : {1, 2, 15, 16, 17, 33, 64, 127, 128, 129, 300}) {
    const std::vector<int32_t> tokens = LongPrompt(*model_, length);
    const auto expected = ForwardDense(*model_, tokens);
    ASSERT_TRUE(expected.ok()) << expected.status();
    for (const auto partition : kPartitions) {
      GroupRun run = Two(partition);
      run.world_size = 3;
      const auto group = RunGroup(*model_, tokens, run);
      SCOPED_TRACE(length);
      ExpectAllOk(*group);
      ExpectNear(*group, *expected, 1e-5);
    }
  }
}

TEST_F(PrefillTest, CutsLongAttentionWithoutChangingTheResult) {
  const std::vector<int32_t> tokens = LongPrompt(*model_, 2500);
  const auto expected = ForwardDense(*model_, tokens);
  ASSERT_TRUE(expected.ok()) << expected.status();
  GroupRun run = Two(v1::PARTITION_ZIGZAG);
  run.flop_per_step = 1;

  const auto group = RunGroup(*model_, tokens, run);

  ExpectAllOk(*group);
  ExpectNear(*group, *expected, 1e-5);
}

TEST_F(PrefillTest, SendsTheWireTypeThatWasAskedFor) {
  for (const auto wire : {v1::KV_DTYPE_BF16, v1::KV_DTYPE_F16}) {
    GroupRun run = Two(v1::PARTITION_ZIGZAG);
    run.wire = wire;
    const auto group = RunGroup(*model_, golden_.tokens, run);

    ExpectAllOk(*group);
    for (size_t layer = 0; layer < golden_.expected.k.size(); ++layer) {
      // Each element is the golden one rounded: 2^-9 relative for bf16's 8 bits, 2^-12 for f16.
      const double most = wire == v1::KV_DTYPE_BF16 ? 3e-3 : 4e-4;
      EXPECT_LE(RelativeError(group->kv.Tensor(static_cast<uint32_t>(layer), KvKind::kK),
                              golden_.expected.k[layer]),
                most);
    }
    // Attention read the unrounded K and V.
    EXPECT_LE(RelativeError(group->logits, golden_.expected.logits), 1e-4);
  }
}

TEST_F(PrefillTest, ComputesInBf16UpToItsRounding) {
  const auto model = Model::Load({golden_.directory, kernels::DType::kBF16, 0});
  ASSERT_TRUE(model.ok()) << model.status();
  GroupRun run = Two(v1::PARTITION_CONTIGUOUS);
  run.wire = v1::KV_DTYPE_BF16;

  const auto group = RunGroup(**model, golden_.tokens, run);

  ExpectAllOk(*group);
  ExpectNear(*group, golden_.expected, 3e-2);
}

// The loop in its plainest form, with the reference attention and the whole prompt's block list.
DenseResult ReferenceForward(const Model& model, const std::vector<int32_t>& tokens,
                             const kernels::PatternPolicy& policy) {
  const ModelConfig& config = model.config();
  const auto count = static_cast<int64_t>(tokens.size());
  const size_t kv_size = tokens.size() * static_cast<size_t>(config.num_kv_heads * config.head_dim);
  const size_t q_size = tokens.size() * static_cast<size_t>(config.num_q_heads * config.head_dim);
  std::vector<float> hidden(tokens.size() * static_cast<size_t>(config.hidden_size));
  std::vector<float> q(q_size), attention(q_size),
      lse(tokens.size() * static_cast<size_t>(config.num_q_heads));
  EXPECT_TRUE(model.Embed(tokens, hidden.data()).ok());
  DenseResult result;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    std::vector<float> k(kv_size), v(kv_size);
    EXPECT_TRUE(model.BeforeAttention(layer, hidden.data(), count, 0, q.data(), k.data(), v.data()).ok());
    kernels::BlockIndex index;
    const kernels::PatternInputs inputs{layer, config.num_q_heads,   config.num_kv_heads, count,
                                        0,     (count - 1) / 128 + 1};
    EXPECT_TRUE(policy.Select(inputs, &index).ok());
    const kernels::AttentionState state{attention.data(), lse.data()};
    kernels::ResetAttentionState(model.attention_shape(), count, state);
    EXPECT_TRUE(kernels::reference::SparseAttention(
                    model.attention_shape(), {q.data(), kernels::DType::kF32, 0, count},
                    {k.data(), v.data(), kernels::DType::kF32, 0, count}, index, state)
                    .ok());
    EXPECT_TRUE(model.AfterAttention(layer, attention.data(), count, hidden.data()).ok());
    result.k.push_back(std::move(k));
    result.v.push_back(std::move(v));
  }
  result.logits.resize(static_cast<size_t>(config.vocab_size));
  const float* const last = hidden.data() + (count - 1) * config.hidden_size;
  EXPECT_TRUE(model.Logits(last, result.logits.data()).ok());
  return result;
}

TEST_F(PrefillTest, AShapeAgreesWithTheReferenceOverTwoRanksAndIsSparse) {
  const std::vector<int32_t> tokens = LongPrompt(*model_, 1000);
  GroupRun run = Two(v1::PARTITION_ZIGZAG);
  run.policy = "a_shape";
  run.parameters = {{"sink_tokens", 20}, {"window_tokens", 150}};
  const PrefillJob job = MakeJob(*model_, tokens, run, 0);
  const DenseResult expected = ReferenceForward(*model_, tokens, *job.policy);
  const auto dense = ForwardDense(*model_, tokens);
  ASSERT_TRUE(dense.ok());

  const auto group = RunGroup(*model_, tokens, run);

  ExpectAllOk(*group);
  ExpectNear(*group, expected, 1e-4);
  // The pattern leaves out what matters to this random model, so agreement is no accident.
  EXPECT_GT(RelativeError(group->logits, dense->logits), 1e-3);
  uint64_t computed = 0;
  uint64_t possible = 0;
  for (const PrefillResult& result : group->results) {
    computed += result.progress.pairs_computed;
    possible += result.progress.pairs_possible;
    ASSERT_FALSE(result.progress.layers.empty());
    for (const PrefillProgress::Layer& layer : result.progress.layers) {
      EXPECT_GT(layer.density, 0);
      EXPECT_LT(layer.density, 1);
      EXPECT_LT(layer.recall, 0) << "nothing measured it";
    }
  }
  EXPECT_LT(computed, possible * 8 / 10);
  EXPECT_GT(computed, 0u);
}

TEST_F(PrefillTest, CountsEveryPairOfADensePrompt) {
  const std::vector<int32_t> tokens = LongPrompt(*model_, 512);
  GroupRun run = Two(v1::PARTITION_CONTIGUOUS);
  run.block_tokens = 128;
  const auto group = RunGroup(*model_, tokens, run);

  ExpectAllOk(*group);
  uint64_t possible = 0;
  size_t layers_known = 0;
  for (const PrefillResult& result : group->results) {
    EXPECT_EQ(result.progress.pairs_computed, result.progress.pairs_possible);
    for (const PrefillProgress::Layer& layer : result.progress.layers) EXPECT_EQ(layer.density, 1);
    layers_known += result.progress.layers.size();
    EXPECT_EQ(result.progress.layers_done, static_cast<uint32_t>(model_->config().num_layers));
    possible += result.progress.pairs_possible;
  }
  // 4 tiles: 1 + 2 + 3 + 4 blocks a head and layer; the last layer computes the last token's tile only.
  const auto layers = static_cast<uint64_t>(model_->config().num_layers);
  // Only the last token's rank reads anything in the last layer.
  EXPECT_EQ(layers_known, 2 * layers - 1);
  EXPECT_EQ(possible, (10 * (layers - 1) + 4) * static_cast<uint64_t>(model_->config().num_q_heads));
}

TEST_F(PrefillTest, StopsWhenCancelledAndItsPeerLearnsIt) {
  GroupRun run = Two(v1::PARTITION_CONTIGUOUS);
  run.on_layer = [](int rank, JobControl* control, const PrefillProgress&) {
    if (rank == 0) control->Cancel(absl::CancelledError("no longer wanted"));
  };
  const absl::Time start = absl::Now();

  const auto group = RunGroup(*model_, LongPrompt(*model_, 600), run);

  EXPECT_EQ(group->statuses[0], absl::CancelledError("no longer wanted"));
  EXPECT_EQ(group->statuses[1].code(), absl::StatusCode::kUnavailable) << group->statuses[1];
  EXPECT_EQ(ReasonOf(group->statuses[1]), v1::ERROR_REASON_WORKER_LOST);
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

TEST_F(PrefillTest, StopsInTheMiddleOfALayer) {
  JobControl control;
  HookedModel model(model_.get());
  int calls_after = 0;
  model.before_attention = [&](int32_t layer) {
    if (control.status().ok() && layer == 1) control.Cancel(absl::CancelledError("mid-layer"));
  };
  model.after_attention = [&](int32_t layer) { calls_after += layer >= 1 ? 1 : 0; };
  const PrefillJob job = MakeJob(model, golden_.tokens, GroupRun(), 0);
  Arena arena;
  ASSERT_TRUE(arena.Reset(job.plan.arena_bytes()).ok());
  KvCapture capture(*job.geometry);
  MemorySink sink(&capture, MemorySink::Mode::kAcknowledge);
  PrefillContext context;
  context.model = &model;
  context.sender = &sink;
  context.control = &control;
  context.arena = &arena;

  EXPECT_EQ(RunPrefill(job, context).status(), absl::CancelledError("mid-layer"));

  EXPECT_EQ(calls_after, 0);
}

TEST_F(PrefillTest, AFailureInTheMiddleOfTheRingEndsThePeersQuickly) {
  HookedModel failing(model_.get());
  failing.before_attention_status = [](int32_t layer, int64_t begin) {
    // Rank 0 of a contiguous partition has the first token.
    return layer == 1 && begin == 0 ? absl::InternalError("broken kernel") : absl::OkStatus();
  };
  GroupRun run;
  run.world_size = 4;
  const absl::Time start = absl::Now();

  const auto group = RunGroup(failing, LongPrompt(*model_, 600), run);

  EXPECT_EQ(group->statuses[0].message(), "broken kernel");
  for (size_t rank = 1; rank < 4; ++rank) {
    EXPECT_EQ(ReasonOf(group->statuses[rank]), v1::ERROR_REASON_WORKER_LOST) << group->statuses[rank];
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

TEST_F(PrefillTest, RefusesRanksThatDisagreeOnThePlan) {
  const std::function<void(PrefillJob*)> changes[] = {
      [](PrefillJob* job) { job->tokens[3] ^= 1; },
      [](PrefillJob* job) { std::swap(job->partition[0], job->partition[1]); },
      [](PrefillJob* job) { job->strategy = v1::STRATEGY_ALLGATHER; },
  };
  for (const auto& change : changes) {
    GroupRun run = Two(v1::PARTITION_CONTIGUOUS);
    run.change_job = [&](int rank, PrefillJob* job) {
      if (rank == 1) change(job);
    };

    const auto group = RunGroup(*model_, LongPrompt(*model_, 64), run);

    for (const absl::Status& status : group->statuses) {
      EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
      EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_MODEL_MISMATCH);
    }
  }
}

TEST_F(PrefillTest, StopsAtTheDeadline) {
  const PrefillJob job = MakeJob(*model_, golden_.tokens, GroupRun(), 0);
  JobControl control(Clock::Real(), Clock::Real()->Now() - absl::Milliseconds(1));
  Arena arena;
  ASSERT_TRUE(arena.Reset(job.plan.arena_bytes()).ok());
  KvCapture capture(*job.geometry);
  MemorySink sink(&capture, MemorySink::Mode::kAcknowledge);
  PrefillContext context;
  context.model = model_.get();
  context.sender = &sink;
  context.control = &control;
  context.arena = &arena;

  const auto result = RunPrefill(job, context);

  EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(result.status()), v1::ERROR_REASON_DEADLINE);
}

TEST_F(PrefillTest, HoldsNoMoreThanTheEgressBuffersWhenNothingIsAcknowledged) {
  GroupRun run;
  run.egress_buffers = 1;
  run.sink = MemorySink::Mode::kHold;
  run.stall_timeout = absl::Milliseconds(100);

  const auto group = RunGroup(*model_, golden_.tokens, run);

  EXPECT_EQ(group->statuses[0].code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(group->statuses[0]), v1::ERROR_REASON_KV_STREAM_STALLED) << group->statuses[0];
  EXPECT_EQ(group->most_outstanding[0], 2 * ((golden_.tokens.size() + 15) / 16));
}

TEST_F(PrefillTest, ASlowReceiverNeverHasMoreThanTheEgressBuffersToTake) {
  for (const int egress : {1, 2}) {
    GroupRun run;
    run.egress_buffers = egress;
    const auto group = RunGroup(*model_, golden_.tokens, run);

    ExpectAllOk(*group);
    const uint64_t blocks_per_layer = 2 * ((golden_.tokens.size() + 15) / 16);
    EXPECT_LE(group->most_outstanding[0], static_cast<uint64_t>(egress) * blocks_per_layer);
    ExpectNear(*group, golden_.expected, 1e-4);
  }
}

TEST_F(PrefillTest, RefusesValuesThatF16CannotHold) {
  HookedModel model(model_.get());
  model.after_projection = [](float* k) { k[5] = 70000; };
  GroupRun run;
  run.wire = v1::KV_DTYPE_F16;

  const auto group = RunGroup(model, golden_.tokens, run);

  EXPECT_EQ(ReasonOf(group->statuses[0]), v1::ERROR_REASON_NON_FINITE) << group->statuses[0];
  EXPECT_THAT(std::string(group->statuses[0].message()), HasSubstr("f16"));
}

TEST_F(PrefillTest, TurnsNonFiniteValuesIntoAnErrorWithTheLayer) {
  HookedModel poisoned(model_.get());
  poisoned.after_embed = [](float* hidden) { hidden[3] = std::numeric_limits<float>::quiet_NaN(); };

  const auto group = RunGroup(poisoned, golden_.tokens, GroupRun());

  EXPECT_EQ(group->statuses[0].code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ReasonOf(group->statuses[0]), v1::ERROR_REASON_NON_FINITE) << group->statuses[0];
  EXPECT_THAT(std::string(group->statuses[0].message()), HasSubstr("layer 0"));
}

}  // namespace
}  // namespace headwater::testing
