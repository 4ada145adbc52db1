// Runs a prompt over a group of ranks that are threads of the test.
#ifndef HW_TESTS_WORKER_PREFILL_GROUP_H_
#define HW_TESTS_WORKER_PREFILL_GROUP_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

#include "model/model.h"
#include "tests/worker/memory_sink.h"
#include "worker/collectives.h"
#include "worker/prefill.h"

namespace headwater::testing {

struct GroupRun {
  int world_size = 1;
  v1::Partition partition = v1::PARTITION_CONTIGUOUS;
  v1::Strategy strategy = v1::STRATEGY_RING;
  uint32_t block_tokens = 16;
  v1::KvDtype wire = v1::KV_DTYPE_F32;
  std::string policy = "dense";
  std::map<std::string, double> parameters;
  int egress_buffers = 3;
  double flop_per_step = 4e9;
  absl::Duration stall_timeout = absl::Seconds(30);
  MemorySink::Mode sink = MemorySink::Mode::kAcknowledge;
  // Endpoints of the ranks; empty: an in-process group.
  std::function<std::unique_ptr<Collectives>(int rank)> join;
  // Of the ranks; empty: no checkpoints.
  std::vector<CheckpointStore*> checkpoints;
  int checkpoint_layers = 0;
  bool measure_link = false;
  uint64_t least_probe_bytes = 1;  // on GPUs
  std::function<void(int rank, PrefillContext* context)> change_context;
  // Changes a rank's job before it runs.
  std::function<void(int rank, PrefillJob* job)> change_job;
  // Runs on rank `rank`'s thread after every layer.
  std::function<void(int rank, JobControl* control, const PrefillProgress&)> on_layer;
};

struct GroupResult {
  explicit GroupResult(const KvGeometry& geometry) : kv(geometry) {}
  KvCapture kv;
  std::vector<absl::Status> statuses;  // of the ranks
  std::vector<PrefillResult> results;
  std::vector<uint64_t> most_outstanding;
  KvDigest digest;  // of all shares
  // Of the rank that holds the last token, in the order of the token ids.
  std::vector<float> logits;
};

PrefillJob MakeJob(const Model& model, absl::Span<const int32_t> tokens, const GroupRun& run, int rank);

std::unique_ptr<GroupResult> RunGroup(const Model& model, absl::Span<const int32_t> tokens,
                                      const GroupRun& run);

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_PREFILL_GROUP_H_
