// Short prompts through the whole service to a worker that packs: real processes, but for the worker, which
// lives here to have a backend that packs on a CPU.
#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include <grpcpp/client_context.h>

#include "base/rpc/grpc_status.h"
#include "tests/integration/cluster.h"
#include "tests/support/tiny_model.h"
#include "tests/worker/packing_backend.h"
#include "worker/worker.h"

namespace headwater::testing {
namespace {

constexpr uint32_t kPassPrompts = 8;
constexpr int64_t kPassTokens = 1000;

class PackingServiceTest : public ::testing::Test {
 protected:
  PackingServiceTest() {
    ClusterOptions options;
    options.workers = 0;
    options.model_directory = MakeTempDirectory();
    WriteTinyModel(TinyModel{}, options.model_directory);
    cluster_ = std::make_unique<Cluster>(options);

    WorkerOptions worker;
    worker.coordinator = cluster_->coordinator_address();
    worker.worker_id = "packer";
    worker.listen = "127.0.0.1:0";
    worker.metrics = "127.0.0.1:0";
    worker.model_name = "tiny";
    worker.threads = 1;
    auto model = Model::Load({options.model_directory, kernels::DType::kF32, 0}).value();
    auto started = Worker::Start(worker, [&](const WorkerOptions&) {
      auto backend = std::make_unique<PackingBackend>(std::shared_ptr<const Model>(std::move(model)),
                                                      PackLimits{kPassPrompts, kPassTokens, true});
      backend_ = backend.get();
      backend->before_pass = [this] { AwaitLeave(); };
      return backend;
    });
    EXPECT_TRUE(started.ok()) << started.status();
    worker_ = *std::move(started);
    cluster_->WaitForMembers(1, 1);
  }

  void TearDown() override {
    if (HasFailure()) std::fprintf(stderr, "%s", cluster_->Logs().c_str());
  }

  // Passes start while there are any left.
  void AwaitLeave() {
    absl::MutexLock lock(&mutex_);
    const auto left = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return passes_left_ > 0; };
    ++passes_held_;
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&left), absl::Seconds(30)));
    --passes_held_;
    --passes_left_;
  }
  // Until a pass has its prompts and waits for leave: the worker can't end what runs before it is given.
  void AwaitAHeldPass() {
    absl::MutexLock lock(&mutex_);
    const auto held = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return passes_held_ > 0 && passes_left_ <= 0;
    };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&held), absl::Seconds(30)));
  }
  void SetPassesLeft(int passes) {
    absl::MutexLock lock(&mutex_);
    passes_left_ = passes;
  }

  uint32_t RequestsAtTheWorker() {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    v1::ListWorkersResponse response;
    EXPECT_TRUE(cluster_->admin().ListWorkers(&context, {}, &response).ok());
    EXPECT_EQ(response.workers_size(), 1);
    return response.workers_size() == 1 ? response.workers(0).num_requests() : 0;
  }

  absl::Mutex mutex_;
  int passes_left_ ABSL_GUARDED_BY(mutex_) = 1'000'000;
  int passes_held_ ABSL_GUARDED_BY(mutex_) = 0;
  std::unique_ptr<Cluster> cluster_;
  PackingBackend* backend_ = nullptr;
  std::unique_ptr<Worker> worker_;
};

TEST_F(PackingServiceTest, APackedBatchGivesTheCachesOfSinglePrompts) {
  v1::BatchPrefillRequest batch;
  std::vector<v1::PrefillRequest> singles;
  std::map<std::string, int> lengths;
  for (int i = 0; i < 60; ++i) {
    const int length = i % 20 == 19 ? 1001 + i : 1 + (i * i * 977) % 400;
    singles.push_back(MakeRequest(RandomTokens(100 + static_cast<uint64_t>(i), length)));
    singles.back().set_request_id(absl::StrCat("item", i));
    lengths[singles.back().request_id()] = length;
    *batch.add_items() = singles.back();
  }

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(240));
  const auto reader = cluster_->prefill().BatchPrefill(&context, batch);
  std::map<uint32_t, v1::PrefillCompleted> results;
  v1::BatchPrefillResponse event;
  while (reader->Read(&event)) {
    ASSERT_FALSE(event.response().has_failed()) << event.response().failed().error().message();
    if (event.response().has_completed()) {
      EXPECT_TRUE(results.emplace(event.item(), event.response().completed()).second);
    }
  }
  ASSERT_TRUE(reader->Finish().ok());

  ASSERT_EQ(results.size(), 60u);
  size_t most = 0, packed = 0;
  for (const auto& pass : backend_->passes()) {
    int64_t tokens = 0;
    for (const std::string& id : pass) tokens += lengths.at(id);
    EXPECT_LE(tokens, kPassTokens);
    EXPECT_LE(pass.size(), size_t{kPassPrompts});
    most = std::max(most, pass.size());
    packed += pass.size();
  }
  EXPECT_EQ(packed, 57u) << "all but the three long ones";
  EXPECT_GE(most, 3u) << "prompts wait at the worker for the next pass";
  for (const auto& [item, result] : results) {
    singles[item].set_request_id(absl::StrCat("single", item));
    const auto single = cluster_->Prefill(singles[item]);
    ASSERT_TRUE(single.ok()) << single.status();
    EXPECT_EQ(result.first_token(), single->first_token()) << "item " << item;
    EXPECT_EQ(result.kv_digest(), single->kv_digest()) << "item " << item;
    ASSERT_TRUE(cluster_->Release(*single).ok());
    ASSERT_TRUE(cluster_->Release(result).ok());
  }
  EXPECT_EQ(RequestsAtTheWorker(), 0u);
}

TEST_F(PackingServiceTest, AClientThatGoesAwayFreesTheWorkerOfAllItsPrompts) {
  v1::BatchPrefillRequest batch;
  for (int i = 0; i < 60; ++i) {
    *batch.add_items() = MakeRequest(RandomTokens(static_cast<uint64_t>(i), 300));
  }
  SetPassesLeft(1);
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    const auto reader = cluster_->prefill().BatchPrefill(&context, batch);
    v1::BatchPrefillResponse event;
    while (reader->Read(&event) && !event.response().has_completed()) {
    }
    EXPECT_TRUE(event.response().has_completed());
    AwaitAHeldPass();
    EXPECT_GT(RequestsAtTheWorker(), 0u);
    context.TryCancel();
    SetPassesLeft(1'000'000);
    while (reader->Read(&event)) {
    }
    reader->Finish();
  }

  const absl::Time end = absl::Now() + absl::Seconds(20);
  while (RequestsAtTheWorker() > 0 && absl::Now() < end) absl::SleepFor(absl::Milliseconds(10));

  EXPECT_EQ(RequestsAtTheWorker(), 0u);
  const auto next = cluster_->Prefill(MakeRequest(RandomTokens(1, 100)));
  EXPECT_TRUE(next.ok()) << next.status();
}

TEST_F(PackingServiceTest, ADrainEndsWhatRunsAndTheRestWaitsForAnotherWorker) {
  v1::BatchPrefillRequest batch;
  for (int i = 0; i < 40; ++i) {
    *batch.add_items() = MakeRequest(RandomTokens(static_cast<uint64_t>(i), 100));
  }
  SetPassesLeft(2);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  const auto reader = cluster_->prefill().BatchPrefill(&context, batch);
  v1::BatchPrefillResponse event;
  std::set<uint32_t> completed;
  while (completed.empty() && reader->Read(&event)) {
    if (event.response().has_completed()) completed.insert(event.item());
  }
  AwaitAHeldPass();
  bool drained = false;
  std::thread drain([&] { drained = worker_->Drain(absl::Seconds(30)); });
  // The drain has begun when the worker gives back what waited there for the next pass.
  const absl::Time begun = absl::Now() + absl::Seconds(20);
  while (RequestsAtTheWorker() > kPassPrompts && absl::Now() < begun) absl::SleepFor(absl::Milliseconds(10));
  SetPassesLeft(1'000'000);
  drain.join();

  EXPECT_TRUE(drained);
  worker_.reset();
  v1::ListWorkersResponse workers;
  const absl::Time end = absl::Now() + absl::Seconds(20);
  do {
    grpc::ClientContext again;
    workers.Clear();
    ASSERT_TRUE(cluster_->admin().ListWorkers(&again, {}, &workers).ok());
  } while (workers.workers_size() > 0 && absl::Now() < end);

  EXPECT_EQ(workers.workers_size(), 0);
  context.TryCancel();
  while (reader->Read(&event)) {
    if (event.response().has_completed()) completed.insert(event.item());
    EXPECT_FALSE(event.response().has_failed()) << event.response().failed().error().message();
  }
  reader->Finish();
  EXPECT_LT(completed.size(), 40u) << "some had to wait for another worker";
}

}  // namespace
}  // namespace headwater::testing
