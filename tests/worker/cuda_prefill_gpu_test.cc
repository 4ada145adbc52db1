// The loop on a GPU against the loop on the CPU: the whole KV cache as the sender gets it, and the logits.
#include "worker/cuda/cuda_prefill.h"

#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/kernels/cuda/gpu.h"
#include "tests/model/checkpoint_files.h"
#include "tests/model/dense_forward.h"
#include "tests/model/random_checkpoint.h"
#include "tests/worker/memory_sink.h"
#include "tests/worker/prefill_group.h"

namespace headwater {
namespace {

using testing::CheckpointShape;
using testing::GroupRun;
using testing::KvCapture;
using testing::MemorySink;
using testing::RandomTokens;
using testing::RelativeError;

// bf16 against f32.
constexpr double kTolerance = 2e-2;

class CudaPrefillGpuTest : public ::testing::Test {
 protected:
  void Load(const CheckpointShape& shape, int64_t chunk_tokens = 8192) {
    testing::WriteRandomCheckpoint(folder_.path(), shape, 3);
    auto host = Model::Load({folder_.path(), kernels::DType::kF32, 0});
    ASSERT_TRUE(host.ok()) << host.status();
    host_ = *std::move(host);
    auto device = CudaModel::Load({folder_.path(), 0, 3, 0, chunk_tokens});
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
  }

  struct Outcome {
    explicit Outcome(const KvGeometry& geometry) : kv(geometry) {}
    KvCapture kv;
    absl::StatusOr<PrefillResult> result;
    KvDigest digest;
  };

  // What is called after every layer.
  using OnLayer = std::function<void(size_t prompt, JobControl*, MemorySink*)>;

  // One pass of all prompts.
  std::vector<std::unique_ptr<Outcome>> RunPass(const std::vector<std::vector<int32_t>>& prompts,
                                                const GroupRun& run, const OnLayer& on_layer = nullptr) {
    // Of a ring of its own: how long a stall may last is the test's.
    auto egress = CudaEgressMemory::Allocate(run.stall_timeout);
    EXPECT_TRUE(egress.ok()) << egress.status();
    std::vector<PrefillJob> jobs;
    for (const std::vector<int32_t>& tokens : prompts)
      jobs.push_back(testing::MakeJob(*host_, tokens, run, 0));
    std::vector<std::unique_ptr<Outcome>> outcomes;
    std::vector<std::unique_ptr<MemorySink>> sinks;
    std::vector<std::unique_ptr<JobControl>> controls;
    std::vector<CudaPrefillPrompt> pass;
    for (size_t i = 0; i < jobs.size(); ++i) {
      outcomes.push_back(std::make_unique<Outcome>(*jobs[i].geometry));
      sinks.push_back(std::make_unique<MemorySink>(&outcomes[i]->kv, run.sink));
      controls.push_back(std::make_unique<JobControl>());
      pass.push_back({&jobs[i], sinks[i].get(), controls[i].get(), [&, i](const PrefillProgress&) {
                        if (on_layer) on_layer(i, controls[i].get(), sinks[i].get());
                      }});
    }
    std::vector<absl::StatusOr<PrefillResult>> results =
        RunCudaPrefill(pass, {device_.get(), egress->get(), nullptr});
    EXPECT_EQ(results.size(), jobs.size());
    for (size_t i = 0; i < jobs.size(); ++i) {
      outcomes[i]->result = std::move(results[i]);
      if (outcomes[i]->result.ok()) {
        const absl::Status finished = sinks[i]->Finish();
        if (!finished.ok()) outcomes[i]->result = finished;
      }
      outcomes[i]->digest = sinks[i]->Stats().digest;
    }
    sinks.clear();
    return outcomes;
  }

  std::unique_ptr<Outcome> Run(const std::vector<int32_t>& tokens, const GroupRun& run,
                               const std::function<void(JobControl*, MemorySink*)>& on_layer = nullptr) {
    return std::move(RunPass({tokens}, run, [&](size_t, JobControl* control, MemorySink* sink) {
      if (on_layer) on_layer(control, sink);
    })[0]);
  }

  // K, V and the logits of an outcome against the CPU's.
  void ExpectEqualsTheCpu(const Outcome& got, const std::vector<int32_t>& tokens, const GroupRun& run,
                          const std::string& name) {
    ASSERT_TRUE(got.result.ok()) << name << ": " << got.result.status();
    EXPECT_THAT(got.kv.times(), ::testing::Each(1)) << name;
    GroupRun dense = run;
    dense.policy = "dense";
    dense.parameters.clear();
    const auto wanted = testing::RunGroup(*host_, tokens, dense);
    for (uint32_t layer = 0; layer < static_cast<uint32_t>(host_->config().num_layers); ++layer) {
      for (const KvKind kind : {KvKind::kK, KvKind::kV}) {
        EXPECT_LE(RelativeError(got.kv.Tensor(layer, kind), wanted->kv.Tensor(layer, kind)), kTolerance)
            << name << ", layer " << layer;
      }
    }
    std::vector<float> logits(wanted->logits.size());
    for (const TokenScore& score : got.result->top) logits[static_cast<size_t>(score.token)] = score.logit;
    EXPECT_LE(RelativeError(logits, wanted->logits), kTolerance) << name;
  }

  testing::TempDir folder_;
  std::unique_ptr<Model> host_;
  std::unique_ptr<CudaModel> device_;
};

struct Case {
  const char* name;
  int tokens;
  v1::KvDtype wire;
  uint32_t block_tokens;
  int64_t chunk_tokens;
  int num_layers;
};

TEST_F(CudaPrefillGpuTest, EqualsTheCpu) {
  HW_REQUIRE_SM90();
  for (const Case& c :
       {Case{"bf16", 700, v1::KV_DTYPE_BF16, 256, 8192, 2}, Case{"f32", 700, v1::KV_DTYPE_F32, 256, 128, 3},
        Case{"f16", 333, v1::KV_DTYPE_F16, 16, 256, 2}, Case{"one_token", 1, v1::KV_DTYPE_BF16, 256, 8192, 3},
        Case{"many_pieces", 40'000, v1::KV_DTYPE_F32, 64, 8192, 5}}) {
    CheckpointShape shape;
    shape.num_layers = c.num_layers;
    if (c.tokens > 10'000) {
      shape.hidden_size = shape.intermediate_size = 64;
      shape.num_q_heads = shape.num_kv_heads = 8;
    }
    Load(shape, c.chunk_tokens);
    const std::vector<int32_t> tokens = RandomTokens(c.tokens, shape.vocab_size);
    GroupRun run;
    run.block_tokens = c.block_tokens;
    run.wire = c.wire;

    const auto got = Run(tokens, run);

    if (c.tokens > 10'000) {  // that all blocks came once is what this one is for
      ASSERT_TRUE(got->result.ok()) << c.name << ": " << got->result.status();
      EXPECT_THAT(got->kv.times(), ::testing::Each(1)) << c.name;
    } else {
      ExpectEqualsTheCpu(*got, tokens, run, c.name);
    }
  }
}

TEST_F(CudaPrefillGpuTest, PackedPromptsEqualTheCpu) {
  HW_REQUIRE_SM90();
  Load({}, 256);
  std::vector<std::vector<int32_t>> prompts;
  for (const int count : {1, 300, 17, 128, 700, 64}) {
    prompts.push_back(RandomTokens(count, 512));
  }
  GroupRun run;
  run.block_tokens = 64;
  const auto got = RunPass(prompts, run);
  for (size_t i = 0; i < prompts.size(); ++i) {
    ExpectEqualsTheCpu(*got[i], prompts[i], run, absl::StrCat(prompts[i].size(), " tokens"));
    const uint64_t count = prompts[i].size();
    EXPECT_EQ(got[i]->result->progress.pairs_computed,
              count * (count + 1) / 2 *
                  static_cast<uint64_t>(host_->config().num_q_heads * host_->config().num_layers));
  }
}

TEST_F(CudaPrefillGpuTest, APackedPromptThatIsCancelledOrFailsEndsAlone) {
  HW_REQUIRE_SM90();
  CheckpointShape shape;
  shape.num_layers = 4;
  Load(shape);
  const std::vector<std::vector<int32_t>> prompts = {RandomTokens(400, 512), RandomTokens(500, 512),
                                                     RandomTokens(600, 512)};
  GroupRun run;
  run.wire = v1::KV_DTYPE_BF16;
  const auto got = RunPass(prompts, run, [](size_t i, JobControl* control, MemorySink* sink) {
    if (i == 0) control->Cancel(absl::CancelledError("test"));
    if (i == 2) sink->Cancel();  // as if its decode node were gone
  });
  EXPECT_EQ(got[0]->result.status().code(), absl::StatusCode::kCancelled) << got[0]->result.status();
  EXPECT_TRUE(got[1]->result.ok()) << got[1]->result.status();
  EXPECT_THAT(got[1]->kv.times(), ::testing::Each(1));
  EXPECT_FALSE(got[2]->result.ok());
}

// Senders of one pass still read the ring while the next passes write it.
TEST_F(CudaPrefillGpuTest, PassesShareARingThatIsStillRead) {
  HW_REQUIRE_SM90();
  CheckpointShape shape;
  shape.num_layers = 4;
  Load(shape);
  GroupRun run;
  run.wire = v1::KV_DTYPE_BF16;
  const auto ring = CudaEgressMemory::Allocate();
  ASSERT_TRUE(ring.ok()) << ring.status();
  constexpr size_t kPasses = 6;
  std::vector<PrefillJob> jobs;
  std::vector<std::unique_ptr<KvCapture>> captures;
  std::vector<std::unique_ptr<MemorySink>> sinks;
  std::vector<std::string> alone;
  JobControl control;
  for (size_t i = 0; i < kPasses; ++i) {
    const std::vector<int32_t> tokens = RandomTokens(2000 + 300 * static_cast<int>(i), 512);
    alone.push_back(Run(tokens, run)->kv.bytes());
    jobs.push_back(testing::MakeJob(*host_, tokens, run, 0));
    captures.push_back(std::make_unique<KvCapture>(*jobs[i].geometry));
    sinks.push_back(std::make_unique<MemorySink>(captures[i].get(), run.sink));
  }
  for (size_t i = 0; i < kPasses; ++i) {
    const CudaPrefillPrompt prompt{&jobs[i], sinks[i].get(), &control, {}};
    const auto results = RunCudaPrefill({&prompt, 1}, {device_.get(), ring->get(), nullptr});
    ASSERT_TRUE(results[0].ok()) << results[0].status();
  }
  for (size_t i = 0; i < kPasses; ++i) {
    ASSERT_TRUE(sinks[i]->Finish().ok());
    EXPECT_TRUE(captures[i]->bytes() == alone[i]) << "pass " << i;
  }
  sinks.clear();
}

TEST_F(CudaPrefillGpuTest, APackedPromptThatIsNotFiniteEndsAlone) {
  HW_REQUIRE_SM90();
  Load({});
  std::vector<std::vector<int32_t>> prompts = {RandomTokens(200, 512), RandomTokens(300, 512),
                                               RandomTokens(150, 512)};
  prompts[1][7] = 512;  // past the vocabulary: its row is NaN
  GroupRun run;
  const auto got = RunPass(prompts, run);
  EXPECT_EQ(got[1]->result.status().code(), absl::StatusCode::kInternal) << got[1]->result.status();
  for (const size_t i : {size_t{0}, size_t{2}}) ExpectEqualsTheCpu(*got[i], prompts[i], run, absl::StrCat(i));
}

// Where every block is listed, attention is exact; and what was visited is reported.
TEST_F(CudaPrefillGpuTest, ProbeAtFullDensityEqualsTheCpu) {
  HW_REQUIRE_SM90();
  for (const int head_dim : {64, 128}) {
    CheckpointShape shape;
    shape.head_dim = head_dim;
    Load(shape, 256);
    const std::vector<int32_t> tokens = RandomTokens(1500, 512);
    GroupRun run;
    run.policy = "probe";
    run.parameters = {{"density", 1.0}};
    const auto got = Run(tokens, run);
    ExpectEqualsTheCpu(*got, tokens, run, absl::StrCat("head_dim ", head_dim));
    if (!got->result.ok()) continue;
    const PrefillProgress& done = got->result->progress;
    EXPECT_EQ(done.pairs_computed, done.pairs_possible);
    EXPECT_GT(done.pairs_possible, 0);
  }
}

TEST_F(CudaPrefillGpuTest, ProbeVisitsTheDensityThatIsForced) {
  HW_REQUIRE_SM90();
  CheckpointShape shape;
  shape.num_layers = 3;
  Load(shape);
  // Long enough that what is always listed is little, and for several searches a layer.
  const std::vector<int32_t> tokens = RandomTokens(160'000, 512);
  GroupRun run;
  run.wire = v1::KV_DTYPE_BF16;
  run.policy = "probe";
  run.parameters = {{"density", 0.05}};
  const auto got = Run(tokens, run);
  ASSERT_TRUE(got->result.ok()) << got->result.status();
  const PrefillProgress& done = got->result->progress;
  EXPECT_NEAR(static_cast<double>(done.pairs_computed) / static_cast<double>(done.pairs_possible), 0.05,
              0.004);
  EXPECT_EQ(Run(tokens, run)->digest.Bytes(), got->digest.Bytes());
}

TEST_F(CudaPrefillGpuTest, EqualJobsGiveEqualBits) {
  HW_REQUIRE_SM90();
  Load({});
  const std::vector<int32_t> tokens = RandomTokens(3000, 512);
  GroupRun run;
  run.wire = v1::KV_DTYPE_BF16;
  const auto first = Run(tokens, run);
  ASSERT_TRUE(first->result.ok()) << first->result.status();
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Run(tokens, run)->kv.bytes(), first->kv.bytes());
}

TEST_F(CudaPrefillGpuTest, ASlowReceiverStallsTheJobAndNothingIsLost) {
  HW_REQUIRE_SM90();
  CheckpointShape shape;
  shape.num_layers = 6;
  shape.num_q_heads = shape.num_kv_heads = 8;
  Load(shape);
  GroupRun run;
  run.wire = v1::KV_DTYPE_F32;
  run.sink = MemorySink::Mode::kHold;
  run.stall_timeout = absl::Milliseconds(300);
  // Twice what the ring holds.
  const auto got = Run(RandomTokens(45'000, 512), run);
  EXPECT_EQ(got->result.status().code(), absl::StatusCode::kUnavailable) << got->result.status();
}

TEST_F(CudaPrefillGpuTest, RefusesWhatItCannotDo) {
  HW_REQUIRE_SM90();
  Load({});
  GroupRun run;
  run.policy = "xattention";
  run.parameters = {{"stride", 2}, {"dense_below_tokens", 0}};
  const absl::Status status = Run(RandomTokens(300, 512), run)->result.status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("stride 2"));
}

}  // namespace
}  // namespace headwater
