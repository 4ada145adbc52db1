// Receiver: the side of a decode node that takes KV streams.
#ifndef HW_TESTS_WORKER_RECEIVER_H_
#define HW_TESTS_WORKER_RECEIVER_H_

#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/metrics.h"
#include "base/rpc/server.h"
#include "headwater/v1/worker.pb.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/store.h"
#include "tests/model/checkpoint_files.h"

namespace headwater::testing {

class Receiver {
 public:
  Receiver() : metrics_("test") {
    KvStoreOptions options;
    options.directory = directory_.path();
    options.budget_bytes = 1 << 28;
    store_ = KvStore::Open(options).value();
    service_ = MakeKvReceiver(store_.get(), &metrics_);
    server_ = StartServer("127.0.0.1:0", {service_.get()}).value();
  }
  ~Receiver() { server_.server->Shutdown(std::chrono::system_clock::now()); }

  void Open(const v1::PrefillAssignment& assignment) {
    v1::OpenSessionRequest request;
    request.set_session_id(assignment.destination().session_id());
    request.set_session_token(assignment.destination().session_token());
    request.set_request_id(assignment.request_id());
    request.set_epoch(assignment.epoch());
    request.set_resume_layer(assignment.resume().layer());
    *request.mutable_layout() = assignment.layout();
    const auto opened = store_->OpenSession(request);
    ASSERT_TRUE(opened.ok()) << opened.status();
  }
  absl::Status Commit(const v1::PrefillAssignment& assignment, const std::vector<v1::RankCompleted>& ranks) {
    v1::CommitSessionRequest request;
    KvDigest sum;
    for (const v1::RankCompleted& rank : ranks) {
      KvDigest share;
      EXPECT_TRUE(KvDigest::FromBytes(rank.kv_digest_share(), &share));
      sum.Merge(share);
      if (rank.has_first_token()) request.set_first_token(rank.first_token());
    }
    request.set_session_id(assignment.destination().session_id());
    request.set_session_token(assignment.destination().session_token());
    request.set_epoch(assignment.epoch());
    request.set_kv_digest(sum.Bytes());
    *request.mutable_token_ids() = assignment.token_ids();
    return store_->Commit(request).status();
  }
  KvStore* store() { return store_.get(); }
  const std::string& address() const { return server_.address; }

 private:
  TempDir directory_;
  Metrics metrics_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<grpc::Service> service_;
  RunningServer server_;
};

}  // namespace headwater::testing

#endif  // HW_TESTS_WORKER_RECEIVER_H_
