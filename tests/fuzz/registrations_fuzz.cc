// What workers and decode nodes say of themselves.
#include <cmath>
#include <string>

#include "base/rpc/grpc_status.h"
#include "coordinator/registration.h"
#include "fuzz.pb.h"
#include "tests/coordinator/fakes.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

using absl::StatusCode;

// What the planner multiplies, for the longest prompt: it must stay below 2^63.
void CheckSums(const v1::WorkerRegistration& worker) {
  const v1::MemoryModel& memory = worker.memory();
  const v1::ServedModel& model = worker.model();
  constexpr uint64_t kTokens = uint64_t{1} << 22;
  uint64_t bytes = 0, kv = 0;
  const uint64_t per_token =
      memory.bytes_per_token() + memory.group_bytes_per_token() + memory.group_bytes_per_prompt_token();
  FUZZ_EXPECT(!__builtin_mul_overflow(kTokens, per_token, &bytes) &&
                  !__builtin_add_overflow(bytes, memory.fixed_bytes(), &bytes) && bytes < uint64_t{1} << 63,
              "a prompt's memory does not wrap");
  FUZZ_EXPECT(!__builtin_mul_overflow(uint64_t{8} * model.num_layers() * model.num_kv_heads(),
                                      uint64_t{model.head_dim()} * kTokens, &kv) &&
                  kv < uint64_t{1} << 63,
              "a prompt's KV bytes do not wrap");
  FUZZ_EXPECT(memory.weight_bytes() <= memory.budget_bytes(), "weights inside the budget");
  FUZZ_EXPECT(worker.policies_size() >= 1 && worker.policies_size() <= 64, "bounded policies");
  FUZZ_EXPECT(worker.max_packed_prompts() <= kMaxPackedPrompts, "bounded packs");
  FUZZ_EXPECT(worker.max_packed_tokens() <= kMaxPackedTokens, "bounded packs");
  for (const double rate : {worker.rates().linear_flops(), worker.rates().attention_flops(),
                            worker.rates().link_bytes_per_s(), worker.rates().egress_bytes_per_s(),
                            worker.rates().exchange_step_s(), worker.rates().group_start_s()}) {
    FUZZ_EXPECT(std::isfinite(rate) && rate >= 0, "a rate that can be reckoned with");
  }
}

void Run(absl::string_view input) {
  Registrations both;
  if (!both.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  for (const absl::Status& status : {CheckRegistration(both.worker()), CheckRegistration(both.decode())}) {
    if (!status.ok()) ExpectRefusal(status, {StatusCode::kInvalidArgument, StatusCode::kFailedPrecondition});
  }
  if (CheckRegistration(both.worker()).ok()) CheckSums(both.worker());
}

std::vector<std::string> Seeds() {
  Registrations both;
  *both.mutable_worker() = testing::MakeWorker("w0");
  *both.mutable_decode() = testing::MakeDecodeNode("d0");
  const std::string plain = both.SerializeAsString();
  both.mutable_worker()->set_max_packed_prompts(16);
  both.mutable_worker()->set_max_packed_tokens(4096);
  both.mutable_worker()->set_default_policy("dense");
  both.mutable_worker()->add_strategies(v1::STRATEGY_RING);
  both.mutable_worker()->add_policy_limits()->set_name("dense");
  both.mutable_worker()->mutable_rates()->set_linear_flops(1e12);
  return {plain, both.SerializeAsString()};
}

const Registration kTarget({"registrations", Run, Seeds, Prototype<Registrations>});

}  // namespace
}  // namespace headwater::fuzz
