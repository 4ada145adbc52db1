#include "worker/control_client.h"

#include <map>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/rpc/grpc_status.h"
#include "tests/worker/fake_coordinator.h"
#include "worker/assignment_queue.h"

namespace headwater::testing {
namespace {

constexpr absl::Duration kPlenty = absl::Seconds(20);

// Runs each assignment until the test lets it end, or it is cancelled.
class PuppetRunner final : public AssignmentRunner {
 public:
  v1::ConnectRequest Run(const v1::PrefillAssignment& assignment, JobControl* control,
                         const std::function<void(const v1::RankProgress&)>& progress) override {
    absl::MutexLock lock(&mutex_);
    ++started_;
    const JobControl::CancelHook hook(control, [this] {
      absl::MutexLock cancel(&wake_mutex_);
      cancelled_ = true;
    });
    v1::ConnectRequest result;
    while (true) {
      if (progress_ > 0) {
        v1::RankProgress report;
        report.set_request_id(assignment.request_id());
        report.set_epoch(assignment.epoch());
        report.set_layers_done(progress_);
        if (checkpoint_ > 0) report.mutable_checkpoint()->set_layer(checkpoint_);
        progress_ = 0;
        progress(report);
      }
      if (ends_ > 0) {
        --ends_;
        ++finished_;
        result.mutable_completed()->set_request_id(assignment.request_id());
        result.mutable_completed()->set_epoch(assignment.epoch());
        return result;
      }
      if (TakeCancelled()) {
        ++finished_;
        result.mutable_failed()->set_request_id(assignment.request_id());
        result.mutable_failed()->set_epoch(assignment.epoch());
        *result.mutable_failed()->mutable_error() = ToRpcStatus(control->status());
        return result;
      }
      changed_.WaitWithTimeout(&mutex_, absl::Milliseconds(2));
    }
  }
  KvBytes kv_bytes() const override { return {0, 77}; }

  void LetOneEnd() {
    absl::MutexLock lock(&mutex_);
    ++ends_;
  }
  void Report(uint32_t layers, uint32_t checkpoint = 0) {
    absl::MutexLock lock(&mutex_);
    progress_ = layers;
    checkpoint_ = checkpoint;
  }
  // Waits until the last Report() has been passed on.
  bool WaitReported() {
    absl::MutexLock lock(&mutex_);
    const auto reported = [this] { return progress_ == 0; };
    return mutex_.AwaitWithTimeout(absl::Condition(&reported), kPlenty);
  }
  bool WaitStarted(int count) { return WaitFor(&started_, count); }
  bool WaitFinished(int count) { return WaitFor(&finished_, count); }
  int started() const {
    absl::MutexLock lock(&mutex_);
    return started_;
  }

 private:
  bool WaitFor(const int* counter, int count) {
    absl::MutexLock lock(&mutex_);
    const auto reached = [counter, count] { return *counter >= count; };
    return mutex_.AwaitWithTimeout(absl::Condition(&reached), kPlenty);
  }
  bool TakeCancelled() {
    absl::MutexLock lock(&wake_mutex_);
    return std::exchange(cancelled_, false);
  }

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  int started_ = 0;
  int finished_ = 0;
  int ends_ = 0;
  uint32_t progress_ = 0;
  uint32_t checkpoint_ = 0;
  absl::Mutex wake_mutex_;
  bool cancelled_ = false;
};

v1::PrefillAssignment Assignment(const std::string& id, uint32_t epoch = 1) {
  v1::PrefillAssignment assignment;
  assignment.set_request_id(id);
  assignment.set_epoch(epoch);
  assignment.set_rank(3);
  return assignment;
}

ControlClientOptions Options(const std::string& coordinator) {
  ControlClientOptions options;
  options.coordinator = coordinator;
  options.registration.set_worker_id("w0");
  options.registration.set_incarnation("inc");
  options.max_backoff = absl::Milliseconds(200);
  options.max_queued = 2;
  return options;
}

class ControlClientTest : public ::testing::Test {
 protected:
  void Connect(ControlClientOptions options) {
    client_ = ControlClient::Start(options, &runner_);
    ASSERT_TRUE(coordinator_.NextRegistration().has_value());
    // A heartbeat says that the client took the acceptance.
    ASSERT_TRUE(NextHeartbeat().has_value());
  }
  void Connect() { Connect(Options(coordinator_.address())); }
  std::optional<v1::ConnectRequest> NextHeartbeat() {
    return coordinator_.Next([](const v1::ConnectRequest& m) { return m.has_heartbeat(); });
  }

  FakeCoordinator coordinator_;
  PuppetRunner runner_;
  std::unique_ptr<ControlClient> client_;
};

TEST_F(ControlClientTest, RegistersAndHeartbeats) {
  client_ = ControlClient::Start(Options(coordinator_.address()), &runner_);

  const auto registration = coordinator_.NextRegistration();
  ASSERT_TRUE(registration.has_value());
  EXPECT_EQ(registration->worker_id(), "w0");
  for (int i = 0; i < 3; ++i) {
    const auto heartbeat = NextHeartbeat();
    ASSERT_TRUE(heartbeat.has_value());
    EXPECT_EQ(heartbeat->heartbeat().kv_unacked_bytes(), 77u);
    EXPECT_EQ(heartbeat->heartbeat().last_step_age_ms(), 0u);
  }
  EXPECT_TRUE(client_->registered());
}

TEST_F(ControlClientTest, RunsAnAssignmentAndReportsProgressBeforeItsEnd) {
  Connect();
  coordinator_.SendAssignment(Assignment("a"));
  ASSERT_TRUE(runner_.WaitStarted(1));
  runner_.Report(5);
  runner_.LetOneEnd();

  const auto progress = coordinator_.Next([](const v1::ConnectRequest& m) { return !m.has_heartbeat(); });
  ASSERT_TRUE(progress.has_value());
  EXPECT_EQ(progress->progress().layers_done(), 5u);
  const auto result = coordinator_.Next([](const v1::ConnectRequest& m) { return !m.has_heartbeat(); });
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->completed().request_id(), "a");
}

TEST_F(ControlClientTest, SendsEveryCheckpointHoweverFastTheyCome) {
  ControlClientOptions options = Options(coordinator_.address());
  options.progress_interval = absl::Hours(1);
  Connect(options);
  coordinator_.SendAssignment(Assignment("a"));
  ASSERT_TRUE(runner_.WaitStarted(1));
  for (uint32_t layer = 1; layer <= 8; ++layer) {
    runner_.Report(layer, layer / 2);
    ASSERT_TRUE(runner_.WaitReported());
  }
  for (uint32_t checkpoint = 1; checkpoint <= 4; ++checkpoint) {
    const auto progress = coordinator_.Next([checkpoint](const v1::ConnectRequest& m) {
      return m.progress().checkpoint().layer() == checkpoint;
    });
    ASSERT_TRUE(progress.has_value()) << checkpoint;
    EXPECT_EQ(progress->progress().layers_done(), 2 * checkpoint);
  }
  runner_.LetOneEnd();
  EXPECT_TRUE(coordinator_.NextResult().has_value());
}

TEST_F(ControlClientTest, HeartbeatsShowTheAgeOfTheLastStepWhileAnEngineIsStuck) {
  Connect();
  coordinator_.SendAssignment(Assignment("a"));
  ASSERT_TRUE(runner_.WaitStarted(1));

  const auto aged = coordinator_.Next([](const v1::ConnectRequest& m) {
    return m.has_heartbeat() && m.heartbeat().last_step_age_ms() >= 100;
  });

  EXPECT_TRUE(aged.has_value());
}

// Reports all of a pass, then ends them in the other order.
class PackingPuppet final : public AssignmentRunner {
 public:
  v1::ConnectRequest Run(const v1::PrefillAssignment& assignment, JobControl*,
                         const std::function<void(const v1::RankProgress&)>&) override {
    return MakeRankFailed(assignment.request_id(), assignment.epoch(), 0, absl::InternalError("alone"));
  }
  PackLimits pack_limits() const override { return {4, 100, false}; }
  void RunPacked(std::vector<Task> tasks) override {
    for (uint32_t layers = 1; layers <= 3; ++layers) {
      for (const Task& task : tasks) {
        v1::RankProgress report;
        report.set_request_id(task.assignment->request_id());
        report.set_epoch(task.assignment->epoch());
        report.set_layers_done(layers);
        task.progress(report);
      }
    }
    for (auto task = tasks.rbegin(); task != tasks.rend(); ++task) {
      v1::ConnectRequest result;
      result.mutable_completed()->set_request_id(task->assignment->request_id());
      result.mutable_completed()->set_epoch(task->assignment->epoch());
      task->done(result);
    }
  }
  KvBytes kv_bytes() const override { return {}; }
};

TEST(ControlClientPackingTest, TheLastProgressOfEachComesBeforeItsEnd) {
  FakeCoordinator coordinator;
  PackingPuppet runner;
  ControlClientOptions options = Options(coordinator.address());
  options.max_queued = 3;
  const auto client = ControlClient::Start(options, &runner);
  ASSERT_TRUE(coordinator.NextRegistration().has_value());
  ASSERT_TRUE(coordinator.Next([](const v1::ConnectRequest& m) { return m.has_heartbeat(); }).has_value());
  for (const char* id : {"a", "b", "c"}) {
    v1::PrefillAssignment assignment = Assignment(id);
    assignment.mutable_plan()->set_world_size(1);
    coordinator.SendAssignment(assignment);
  }

  std::map<std::string, uint32_t> layers;
  int ended = 0;
  while (ended < 3) {
    const auto message = coordinator.Next([](const v1::ConnectRequest& m) { return !m.has_heartbeat(); });
    ASSERT_TRUE(message.has_value());
    if (message->has_progress()) {
      layers[message->progress().request_id()] = message->progress().layers_done();
      continue;
    }
    ++ended;
    ASSERT_TRUE(message->has_completed()) << message->DebugString();
    EXPECT_EQ(layers[message->completed().request_id()], 3u) << message->completed().request_id();
  }
}

TEST_F(ControlClientTest, AnswersAnAbortOfWhatRunsWaitsOrIsUnknown) {
  Connect();
  coordinator_.SendAssignment(Assignment("running"));
  ASSERT_TRUE(runner_.WaitStarted(1));
  coordinator_.SendAssignment(Assignment("waiting"));
  coordinator_.SendAbort("waiting", 1);
  coordinator_.SendAbort("unknown", 7);
  coordinator_.SendAbort("running", 1);

  for (const std::string id : {"waiting", "unknown", "running"}) {
    const auto result = coordinator_.NextResult();
    ASSERT_TRUE(result.has_value()) << id;
    EXPECT_EQ(result->failed().request_id(), id);
    EXPECT_EQ(result->failed().error().code(), static_cast<int>(absl::StatusCode::kCancelled));
  }
  EXPECT_EQ(runner_.started(), 1);
}

TEST_F(ControlClientTest, AnswersNoAbortOfWhatHasEnded) {
  Connect();
  coordinator_.SendAssignment(Assignment("a"));
  runner_.LetOneEnd();
  ASSERT_TRUE(coordinator_.NextResult().has_value());
  coordinator_.SendAbort("a", 1);
  coordinator_.SendAbort("unknown", 1);

  // Aborts are answered in order: had "a" been answered, that would come first.
  const auto result = coordinator_.NextResult();
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->failed().request_id(), "unknown");
}

TEST_F(ControlClientTest, BoundsItsQueue) {
  Connect();
  coordinator_.SendAssignment(Assignment("running"));
  ASSERT_TRUE(runner_.WaitStarted(1));
  for (const std::string id : {"w1", "w2", "w3"}) coordinator_.SendAssignment(Assignment(id));

  const auto refused = coordinator_.NextResult();
  ASSERT_TRUE(refused.has_value());
  EXPECT_EQ(refused->failed().request_id(), "w3");
  EXPECT_EQ(refused->failed().rank(), 3u);
  EXPECT_EQ(ReasonOf(FromRpcStatus(refused->failed().error())), v1::ERROR_REASON_QUEUE_FULL);
  for (const std::string id : {"running", "w1", "w2"}) {
    runner_.LetOneEnd();
    const auto result = coordinator_.NextResult();
    ASSERT_TRUE(result.has_value());
    EXPECT_EQ(result->completed().request_id(), id);
  }
}

TEST_F(ControlClientTest, IgnoresADuplicateAndRefusesAnOlderEpoch) {
  Connect();
  coordinator_.SendAssignment(Assignment("a", 5));
  coordinator_.SendAssignment(Assignment("a", 5));
  coordinator_.SendAssignment(Assignment("a", 4));

  const auto refused = coordinator_.NextResult();
  ASSERT_TRUE(refused.has_value());
  EXPECT_EQ(refused->failed().epoch(), 4u);
  EXPECT_EQ(ReasonOf(FromRpcStatus(refused->failed().error())), v1::ERROR_REASON_STALE_EPOCH);
  runner_.LetOneEnd();
  EXPECT_EQ(coordinator_.NextResult()->completed().epoch(), 5u);
  EXPECT_EQ(runner_.started(), 1);
}

TEST_F(ControlClientTest, CancelsTheRunningJobWhenTheStreamBreaksAndRegistersAnewWithoutItsResult) {
  Connect();
  coordinator_.SendAssignment(Assignment("running"));
  coordinator_.SendAssignment(Assignment("waiting"));
  ASSERT_TRUE(runner_.WaitStarted(1));

  coordinator_.Break();

  ASSERT_TRUE(runner_.WaitFinished(1));
  const auto registration = coordinator_.NextRegistration();
  ASSERT_TRUE(registration.has_value());
  EXPECT_EQ(registration->incarnation(), "inc");
  ASSERT_TRUE(NextHeartbeat().has_value());
  coordinator_.SendAssignment(Assignment("next", 2));
  runner_.LetOneEnd();
  const auto result = coordinator_.NextResult();
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->completed().request_id(), "next");
  EXPECT_EQ(runner_.started(), 2);
}

TEST_F(ControlClientTest, EnforcesADeadlineOnARunnerThatWaits) {
  Connect();
  v1::PrefillAssignment assignment = Assignment("a");
  assignment.set_deadline_ms(50);
  coordinator_.SendAssignment(assignment);

  const auto result = coordinator_.NextResult();

  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->failed().error().code(), static_cast<int>(absl::StatusCode::kDeadlineExceeded));
}

TEST_F(ControlClientTest, DrainLetsTheRunningJobEndAndRefusesTheRest) {
  Connect();
  coordinator_.SendAssignment(Assignment("running"));
  ASSERT_TRUE(runner_.WaitStarted(1));
  coordinator_.SendAssignment(Assignment("waiting"));
  // The abort's answer proves that the assignment before it was taken.
  coordinator_.SendAbort("unknown", 1);
  ASSERT_EQ(coordinator_.NextResult()->failed().request_id(), "unknown");
  bool drained = false;
  std::thread drain([&] { drained = client_->Drain(kPlenty); });

  const auto refused = coordinator_.NextResult();
  ASSERT_TRUE(refused.has_value());
  EXPECT_EQ(refused->failed().request_id(), "waiting");
  EXPECT_EQ(ReasonOf(FromRpcStatus(refused->failed().error())), v1::ERROR_REASON_DRAINING);
  runner_.LetOneEnd();
  EXPECT_EQ(coordinator_.NextResult()->completed().request_id(), "running");
  drain.join();

  EXPECT_TRUE(drained);
  EXPECT_TRUE(coordinator_.WaitClosed());
}

TEST_F(ControlClientTest, ADrainingWorkerSaysSoAtOnce) {
  const auto says_draining = [](const v1::ConnectRequest& m) { return m.heartbeat().draining(); };
  // Its next heartbeat is a minute away.
  FakeCoordinator patient(0, true, 60'000);
  client_ = ControlClient::Start(Options(patient.address()), &runner_);
  ASSERT_TRUE(patient.NextRegistration().has_value());
  patient.SendAssignment(Assignment("running"));
  ASSERT_TRUE(runner_.WaitStarted(1));
  EXPECT_TRUE(patient.Pending().empty());
  std::thread drain([&] { client_->Drain(kPlenty); });

  EXPECT_TRUE(patient.Next(says_draining).has_value());
  runner_.LetOneEnd();
  drain.join();
  EXPECT_TRUE(patient.WaitClosed());
  client_->Stop();
}

TEST_F(ControlClientTest, PassesOnThatTheCoordinatorWantsItToLeave) {
  Connect();
  EXPECT_FALSE(client_->drain_requested());
  v1::ConnectResponse message;
  message.mutable_drain();
  coordinator_.Send(message);
  coordinator_.SendAbort("unknown", 1);
  ASSERT_TRUE(coordinator_.NextResult().has_value()) << "what was sent before was taken";
  EXPECT_TRUE(client_->drain_requested());
}

TEST_F(ControlClientTest, DrainSaysWhenTheRunningJobDoesNotEndInTime) {
  Connect();
  coordinator_.SendAssignment(Assignment("running"));
  ASSERT_TRUE(runner_.WaitStarted(1));

  EXPECT_FALSE(client_->Drain(absl::Milliseconds(50)));
  client_->Stop();

  EXPECT_TRUE(runner_.WaitFinished(1));
}

TEST_F(ControlClientTest, DrainsAtOnceWhenIdle) {
  Connect();
  const absl::Time start = absl::Now();

  EXPECT_TRUE(client_->Drain(kPlenty));

  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  EXPECT_TRUE(coordinator_.WaitClosed());
}

TEST(ControlClientConnectTest, ConnectsWhenTheCoordinatorComesLater) {
  int port = 0;
  {
    const FakeCoordinator probe;
    port = probe.port();
  }
  PuppetRunner runner;
  const auto client = ControlClient::Start(Options(absl::StrCat("127.0.0.1:", port)), &runner);

  FakeCoordinator coordinator(port);

  EXPECT_TRUE(coordinator.NextRegistration().has_value());
}

TEST(ControlClientConnectTest, GivesUpAStreamThatIsNotAcceptedAndTriesAgain) {
  FakeCoordinator coordinator(0, false);
  PuppetRunner runner;
  ControlClientOptions options = Options(coordinator.address());
  options.registration_timeout = absl::Milliseconds(100);
  const auto client = ControlClient::Start(options, &runner);

  EXPECT_TRUE(coordinator.NextRegistration().has_value());
  EXPECT_TRUE(coordinator.NextRegistration().has_value());
  EXPECT_FALSE(client->registered());
}

TEST(ControlClientConnectTest, DropsACoordinatorThatSendsAssignmentsBeforeItAccepts) {
  FakeCoordinator coordinator(0, false);
  PuppetRunner runner;
  const auto client = ControlClient::Start(Options(coordinator.address()), &runner);
  ASSERT_TRUE(coordinator.NextRegistration().has_value());

  coordinator.SendAssignment(Assignment("early"));

  EXPECT_TRUE(coordinator.NextRegistration().has_value());
  EXPECT_EQ(runner.started(), 0);
}

TEST(ControlClientConnectTest, StopsAtOnceWithoutACoordinator) {
  PuppetRunner runner;
  const auto client = ControlClient::Start(Options("127.0.0.1:1"), &runner);
  const absl::Time start = absl::Now();

  EXPECT_TRUE(client->Drain(kPlenty));
  client->Stop();

  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

}  // namespace
}  // namespace headwater::testing
