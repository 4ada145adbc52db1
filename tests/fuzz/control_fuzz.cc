// What a coordinator gets from workers, decode nodes and clients, in any order: the whole scheduler.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/rpc/grpc_status.h"
#include "coordinator/registration.h"
#include "coordinator/validation.h"
#include "fuzz.pb.h"
#include "tests/coordinator/fakes.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

constexpr int kMostSteps = 48;
constexpr size_t kMostWorkers = 8;

CoordinatorOptions Options() {
  CoordinatorOptions options;
  options.max_queue_requests = 16;
  options.max_prompt_tokens = 4096;
  options.context_parallel_min_tokens = 32;
  return options;
}

class Coordinator {
 public:
  Coordinator() : cluster_(Options()) {}

  void Step(const ControlStep& step) {
    switch (step.step_case()) {
      case ControlStep::kAddWorker:
        AddWorker(step.add_worker());
        break;
      case ControlStep::kAddDecode: {
        const auto connection =
            cluster_.scheduler.AddDecodeNode(step.add_decode(), std::make_shared<testing::FakeDecodeLink>());
        if (!connection.ok()) ExpectRegistrationRefusal(connection.status());
        break;
      }
      case ControlStep::kSubmit:
        Submit(step.submit());
        break;
      case ControlStep::kMessage:
        Message(step);
        break;
      case ControlStep::kAdvance:
        cluster_.clock.Advance(absl::Milliseconds(std::min<uint32_t>(step.advance(), 700'000)));
        cluster_.scheduler.Tick();
        break;
      case ControlStep::kAnswer:
        if (!cluster_.decode.pending.empty()) {
          cluster_.decode.Answer(absl::Status(static_cast<absl::StatusCode>(step.answer() % 17), "a test's"));
        }
        break;
      case ControlStep::kCloseWorker:
        if (!workers_.empty()) {
          cluster_.scheduler.OnWorkerClosed(workers_[step.close_worker() % workers_.size()].connection);
        }
        break;
      case ControlStep::kCancel:
        if (!watched_.empty()) {
          const JobWatch& watch = watched_[step.cancel() % watched_.size()];
          cluster_.scheduler.Cancel(watch.key, [](const absl::StatusOr<bool>&) {});
        }
        break;
      case ControlStep::kDetach:
        if (!watched_.empty()) cluster_.scheduler.Detach({watched_[step.detach() % watched_.size()]});
        break;
      case ControlStep::STEP_NOT_SET:
        break;
    }
  }

  // Every request ends, once; what it sent out is well-formed.
  void Finish() {
    cluster_.scheduler.ListWorkers();
    cluster_.scheduler.ListDecodeNodes();
    cluster_.scheduler.EndAll(absl::UnavailableError("the end"));
    cluster_.decode.AnswerAll();
    FUZZ_EXPECT(cluster_.scheduler.num_jobs() == 0, "no job is left");
    for (const auto& watcher : watchers_) {
      FUZZ_EXPECT(watcher->violations.empty(), watcher->violations.front().c_str());
    }
  }

 private:
  struct Worker {
    uint64_t connection = 0;
    std::shared_ptr<testing::FakeWorkerLink> link;
    v1::PrefillAssignment last;
  };

  static void ExpectRegistrationRefusal(const absl::Status& status) {
    ExpectRefusal(status, {absl::StatusCode::kInvalidArgument, absl::StatusCode::kFailedPrecondition,
                           absl::StatusCode::kAlreadyExists, absl::StatusCode::kResourceExhausted});
  }

  void AddWorker(const v1::WorkerRegistration& registration) {
    if (workers_.size() >= kMostWorkers) return;
    Worker worker;
    worker.link = std::make_shared<testing::FakeWorkerLink>();
    const auto connection = cluster_.scheduler.AddWorker(registration, worker.link);
    if (!connection.ok()) {
      ExpectRegistrationRefusal(connection.status());
      return;
    }
    worker.connection = *connection;
    workers_.push_back(std::move(worker));
  }

  void Submit(const v1::PrefillRequest& request) {
    auto prepared = PrepareRequest(request, cluster_.scheduler.options());
    if (!prepared.ok()) return;
    const JobKey key{prepared->request->tenant(), prepared->request->request_id()};
    watchers_.push_back(std::make_shared<testing::RecordingWatcher>());
    watched_.push_back({key, watchers_.back()});
    cluster_.scheduler.Submit(*std::move(prepared), watchers_.back());
  }

  void Message(const ControlStep& step) {
    if (workers_.empty()) return;
    Worker& worker = workers_[step.worker() % workers_.size()];
    while (const auto message = worker.link->Next()) {
      if (message->has_assignment()) worker.last = message->assignment();
    }
    v1::ConnectRequest message = step.message();
    const auto name = [&](auto* report) {
      report->set_request_id(worker.last.request_id());
      report->set_epoch(worker.last.epoch());
      report->set_rank(worker.last.rank());
    };
    if (step.right_names() && message.has_progress()) name(message.mutable_progress());
    if (step.right_names() && message.has_completed()) name(message.mutable_completed());
    if (step.right_names() && message.has_failed()) name(message.mutable_failed());
    cluster_.scheduler.OnWorkerMessage(worker.connection, message);
  }

  testing::FakeCluster cluster_;
  std::vector<Worker> workers_;
  std::vector<std::shared_ptr<testing::RecordingWatcher>> watchers_;
  std::vector<JobWatch> watched_;
};

void Run(absl::string_view input) {
  ControlSteps steps;
  if (!steps.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  Coordinator coordinator;
  for (int i = 0; i < steps.steps_size() && i < kMostSteps; ++i) coordinator.Step(steps.steps(i));
  coordinator.Finish();
}

ControlStep* Report(ControlSteps* steps, uint32_t worker) {
  ControlStep* const step = steps->add_steps();
  step->set_worker(worker);
  step->set_right_names(true);
  return step;
}

std::vector<std::string> Seeds() {
  ControlSteps steps;
  *steps.add_steps()->mutable_add_decode() = testing::MakeDecodeNode("d0");
  for (const char* id : {"w0", "w1"}) *steps.add_steps()->mutable_add_worker() = testing::MakeWorker(id);
  *steps.add_steps()->mutable_submit() = testing::MakeRequest("r1", 64);
  steps.add_steps()->set_answer(0);
  for (const uint32_t worker : {0u, 1u}) {
    auto* const progress = Report(&steps, worker)->mutable_message()->mutable_progress();
    progress->set_layers_done(1);
    progress->set_bytes_acked(100);
    progress->mutable_checkpoint()->set_layer(1);
    progress->mutable_checkpoint()->set_kv_digest_share(std::string(16, 'x'));
    progress->mutable_attention()->set_density(0.5);
  }
  ControlSteps lost = steps;
  lost.add_steps()->set_close_worker(1);
  steps.add_steps()->set_advance(500);
  for (const uint32_t worker : {0u, 1u}) {
    auto* const completed = Report(&steps, worker)->mutable_message()->mutable_completed();
    completed->set_kv_digest_share(std::string(16, 'y'));
    completed->set_kv_bytes(4000);
    completed->set_pairs_computed(5);
    completed->set_pairs_possible(10);
    if (worker == 0) completed->set_first_token(42);
  }
  steps.add_steps()->set_answer(0);
  *lost.add_steps()->mutable_add_worker() = testing::MakeWorker("w2");
  auto* const failed = Report(&lost, 0)->mutable_message()->mutable_failed();
  *failed->mutable_error() = ToRpcStatus(absl::UnavailableError("peer"));
  lost.add_steps()->set_advance(1000);
  lost.add_steps()->set_cancel(0);
  lost.add_steps()->set_detach(0);
  return {steps.SerializeAsString(), lost.SerializeAsString()};
}

const Registration kTarget({"control", Run, Seeds, Prototype<ControlSteps>});

}  // namespace
}  // namespace headwater::fuzz
