#include "tests/worker/prefill_group.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "base/log.h"
#include "kernels/ops/linear.h"
#include "worker/inprocess_collectives.h"
#include "worker/layer_kv.h"
#include "worker/memory_plan.h"

namespace headwater::testing {

PrefillJob MakeJob(const Model& model, absl::Span<const int32_t> tokens, const GroupRun& run, int rank) {
  const ModelConfig& config = model.config();
  v1::KvLayout layout;
  layout.set_num_layers(static_cast<uint32_t>(config.num_layers));
  layout.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  layout.set_head_dim(static_cast<uint32_t>(config.head_dim));
  layout.set_num_tokens(tokens.size());
  layout.set_block_tokens(run.block_tokens);
  layout.set_dtype(run.wire);
  layout.set_model_fingerprint(model.fingerprint());
  PrefillJob job;
  job.request_id = "test";
  job.rank = rank;
  job.tokens.assign(tokens.begin(), tokens.end());
  job.partition =
      PartitionTokens(static_cast<int64_t>(tokens.size()), run.world_size, run.partition, run.block_tokens)
          .value();
  job.strategy = run.strategy;
  job.geometry = std::make_shared<const KvGeometry>(KvGeometry::Create(layout).value());
  std::unique_ptr<kernels::PatternPolicy> policy;
  HW_CHECK(kernels::MakePolicy(run.policy, run.parameters, &policy).ok());
  job.policy = std::move(policy);
  // All logits come back.
  job.top_logprobs = config.vocab_size;
  int64_t most = 0;
  for (const RankTokens& ranges : job.partition) most = std::max(most, NumTokens(ranges));
  job.plan =
      PlanMemory(MakeMemoryShape(model, 1, run.egress_buffers, 1), WireType(run.wire), NumTokens(job.local()),
                 most, static_cast<int64_t>(tokens.size()), run.world_size, 0, run.strategy);
  return job;
}

std::unique_ptr<GroupResult> RunGroup(const Model& model, absl::Span<const int32_t> tokens,
                                      const GroupRun& run) {
  const size_t world = static_cast<size_t>(run.world_size);
  auto group = std::make_unique<GroupResult>(*MakeJob(model, tokens, run, 0).geometry);
  group->statuses.resize(world);
  group->results.resize(world);
  group->most_outstanding.resize(world);
  std::vector<std::unique_ptr<Collectives>> endpoints(world);
  if (!run.join && world > 1) endpoints = MakeInProcessGroup(run.world_size, absl::Seconds(20));
  std::vector<KvDigest> digests(world);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < run.world_size; ++rank) {
    threads.emplace_back([&, rank] {
      const size_t at = static_cast<size_t>(rank);
      kernels::SetNumThreads(1);
      if (run.join && world > 1) endpoints[at] = run.join(rank);
      PrefillJob job = MakeJob(model, tokens, run, rank);
      if (run.change_job) run.change_job(rank, &job);
      JobControl control;
      Arena arena;
      HW_CHECK(arena.Reset(job.plan.arena_bytes()).ok());
      MemorySink sink(&group->kv, run.sink);
      PrefillContext context;
      context.model = &model;
      context.collectives = endpoints[at].get();
      context.sender = &sink;
      context.control = &control;
      context.arena = &arena;
      if (!run.checkpoints.empty()) context.checkpoints = run.checkpoints[at];
      context.checkpoint_layers = run.checkpoint_layers;
      context.measure_link = run.measure_link;
      context.stall_timeout = run.stall_timeout;
      context.flop_per_step = run.flop_per_step;
      context.progress = [&](const PrefillProgress& progress) {
        if (run.on_layer) run.on_layer(rank, &control, progress);
      };
      if (run.change_context) run.change_context(rank, &context);
      absl::StatusOr<PrefillResult> result = RunPrefill(job, context);
      group->statuses[at] = result.status();
      if (result.ok()) group->statuses[at] = sink.Finish();
      if (result.ok()) group->results[at] = *std::move(result);
      group->most_outstanding[at] = sink.most_outstanding();
      digests[at] = sink.Stats().digest;
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Gloo takes up to 10 ms for each connection that it closes.
  std::vector<std::thread> leaving;
  for (auto& endpoint : endpoints) leaving.emplace_back([&endpoint] { endpoint.reset(); });
  for (std::thread& thread : leaving) thread.join();
  for (const KvDigest& digest : digests) group->digest.Merge(digest);
  for (const PrefillResult& result : group->results) {
    if (result.top.empty()) continue;
    group->logits.resize(result.top.size());
    for (const TokenScore& score : result.top) group->logits[static_cast<size_t>(score.token)] = score.logit;
  }
  return group;
}

}  // namespace headwater::testing
