// What a coordinator sends to a worker.
#include <string>

#include "base/rpc/grpc_status.h"
#include "tests/fuzz/fuzz.h"
#include "worker/assignment.h"

namespace headwater::fuzz {
namespace {

using absl::StatusCode;

// Has a model and plans for it; computes nothing.
class PlanningBackend final : public PrefillBackend {
 public:
  PlanningBackend() {
    config_.num_layers = 2;
    config_.hidden_size = 64;
    config_.num_q_heads = 4;
    config_.num_kv_heads = 2;
    config_.head_dim = 16;
    config_.vocab_size = 256;
    config_.max_position = 512;
    shape_ = {64, 4, 2, 16, 256, 512, kernels::DType::kF32, 3, true, 1 << 20};
  }
  const ModelConfig& config() const override { return config_; }
  const std::string& fingerprint() const override { return fingerprint_; }
  std::vector<std::string> policies() const override { return kernels::PolicyNames(); }
  bool serves_quality() const override { return true; }
  uint32_t max_world_size() const override { return 0; }
  v1::MemoryModel memory_model() const override { return LinearMemoryModel(shape_, 1 << 30, 1 << 20); }
  std::string Describe() const override { return "plans only"; }
  absl::StatusOr<MemoryPlan> Plan(const kernels::PatternPolicy&, kernels::DType wire, int64_t local_tokens,
                                  int64_t max_rank_tokens, int64_t num_tokens, int world_size,
                                  int64_t held_tokens, v1::Strategy strategy) const override {
    const MemoryPlan plan = PlanMemory(shape_, wire, local_tokens, max_rank_tokens, num_tokens, world_size,
                                       held_tokens, strategy);
    const absl::Status fits = CheckMemoryPlan(plan, 1 << 30, 1 << 20);
    if (!fits.ok()) return fits;
    return plan;
  }
  absl::Status Reserve(const PrefillJob&) override { return absl::UnimplementedError("plans only"); }
  absl::StatusOr<PrefillResult> Run(const PrefillJob&, const PrefillContext&) override {
    return absl::UnimplementedError("plans only");
  }

 private:
  ModelConfig config_;
  MemoryShape shape_;
  const std::string fingerprint_ = "sha256:tiny";
};

v1::PrefillAssignment Good(uint32_t world) {
  v1::PrefillAssignment assignment;
  assignment.set_request_id("r1");
  assignment.set_epoch(3);
  v1::PrefillPlan* const plan = assignment.mutable_plan();
  plan->set_world_size(world);
  plan->set_partition(v1::PARTITION_ZIGZAG);
  plan->set_strategy(v1::STRATEGY_RING);
  plan->set_block_tokens(16);
  for (uint32_t i = 0; i < world; ++i) plan->add_worker_ids(i == 0 ? "w0" : "w1");
  assignment.set_rendezvous_address("127.0.0.1:7071");
  for (uint32_t i = 0; i < 100; ++i) assignment.add_token_ids(i);
  v1::KvLayout* const layout = assignment.mutable_layout();
  layout->set_num_layers(2);
  layout->set_num_kv_heads(2);
  layout->set_head_dim(16);
  layout->set_num_tokens(100);
  layout->set_block_tokens(16);
  layout->set_dtype(v1::KV_DTYPE_BF16);
  layout->set_model_fingerprint("sha256:tiny");
  assignment.mutable_destination()->set_kv_address("127.0.0.1:7080");
  assignment.mutable_destination()->set_session_id("s1");
  assignment.mutable_destination()->set_session_token("secret");
  return assignment;
}

void Run(absl::string_view input) {
  static const PlanningBackend* const backend = new PlanningBackend();
  v1::PrefillAssignment assignment;
  if (!assignment.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  AssignmentContext context;
  context.backend = backend;
  context.worker_id = "w0";
  const absl::StatusOr<PrefillJob> job = CheckAssignment(assignment, context);
  if (!job.ok()) {
    ExpectRefusal(job.status(), {StatusCode::kInvalidArgument, StatusCode::kFailedPrecondition,
                                 StatusCode::kUnimplemented});
    return;
  }
  FUZZ_EXPECT(job->rank >= 0 && job->rank < job->world_size(), "a rank of the group");
  FUZZ_EXPECT(job->partition.size() == static_cast<size_t>(job->world_size()), "a part for each rank");
  int64_t tokens = 0;
  for (const RankTokens& part : job->partition) tokens += NumTokens(part);
  FUZZ_EXPECT(tokens == static_cast<int64_t>(job->tokens.size()), "the parts make the prompt");
  FUZZ_EXPECT(job->tokens.size() <= 512, "no longer than the model");
  FUZZ_EXPECT(job->geometry->layout().num_tokens() == job->tokens.size(), "a layout of the prompt");
  FUZZ_EXPECT(job->plan.total_bytes() <= 1 << 30, "a plan within the budget");
  FUZZ_EXPECT(!job->resume.has_value() || job->resume->layer < 2, "goes on inside the model");
}

std::vector<std::string> Seeds() {
  v1::PrefillAssignment alone = Good(1), group = Good(2), resumed = Good(2), kept = Good(1);
  (*alone.mutable_policy()->mutable_parameters())["window_tokens"] = 64;
  alone.mutable_policy()->set_name("a_shape");
  v1::ResumePoint* const resume = resumed.mutable_resume();
  resume->set_layer(1);
  resume->set_epoch(1);
  resume->set_world_size(2);
  resume->set_partition(v1::PARTITION_STRIPED);
  resume->set_block_tokens(16);
  resume->add_providers(0);
  resume->add_providers(1);
  kept.mutable_policy()->set_name("headwater");
  kept.mutable_quality()->set_min_recall(0.9);
  return {alone.SerializeAsString(), group.SerializeAsString(), resumed.SerializeAsString(),
          kept.SerializeAsString()};
}

const Registration kTarget({"assignment", Run, Seeds, Prototype<v1::PrefillAssignment>});

}  // namespace
}  // namespace headwater::fuzz
