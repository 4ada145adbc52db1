#include "tests/worker/assignments.h"

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "tests/model/dense_forward.h"

namespace headwater::testing {

AssignmentFixture::AssignmentFixture() {
  auto model = Model::Load({ReadGolden(GoldenNames()[0]).directory, kernels::DType::kF32, 0});
  HW_CHECK(model.ok());
  model_ = *std::move(model);
}

CpuBackend* AssignmentFixture::NewBackend(uint64_t budget_bytes) {
  backends_.push_back(std::make_unique<CpuBackend>(model_, MakeMemoryShape(*model_, 1, 3, 2), budget_bytes));
  return backends_.back().get();
}

AssignmentContext AssignmentFixture::context(int rank, uint64_t budget_bytes) {
  return {NewBackend(budget_bytes), absl::StrCat("w", rank)};
}

v1::PrefillAssignment AssignmentFixture::Make(int64_t tokens, int world, int rank) const {
  const ModelConfig& config = model_->config();
  v1::PrefillAssignment assignment;
  assignment.set_request_id("r1");
  assignment.set_epoch(3);
  assignment.set_rank(static_cast<uint32_t>(rank));
  v1::PrefillPlan* const plan = assignment.mutable_plan();
  plan->set_world_size(static_cast<uint32_t>(world));
  plan->set_partition(v1::PARTITION_ZIGZAG);
  plan->set_strategy(v1::STRATEGY_RING);
  plan->set_block_tokens(16);
  // A single rank may be any worker.
  for (int i = 0; i < world; ++i) plan->add_worker_ids(absl::StrCat("w", world == 1 ? 1 : i));
  assignment.set_rendezvous_address("127.0.0.1:7071");
  for (int64_t i = 0; i < tokens; ++i) {
    assignment.add_token_ids(static_cast<uint32_t>((i * 7919 + i / 3) % config.vocab_size));
  }
  v1::KvLayout* const layout = assignment.mutable_layout();
  layout->set_num_layers(static_cast<uint32_t>(config.num_layers));
  layout->set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  layout->set_head_dim(static_cast<uint32_t>(config.head_dim));
  layout->set_num_tokens(static_cast<uint64_t>(tokens));
  layout->set_block_tokens(16);
  layout->set_dtype(v1::KV_DTYPE_F32);
  layout->set_model_fingerprint(model_->fingerprint());
  assignment.mutable_destination()->set_decode_node("d0");
  assignment.mutable_destination()->set_kv_address("127.0.0.1:7080");
  assignment.mutable_destination()->set_session_id("s1");
  assignment.mutable_destination()->set_session_token("secret");
  return assignment;
}

}  // namespace headwater::testing
