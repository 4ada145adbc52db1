#include "tests/integration/cluster.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include <arpa/inet.h>
#include <grpcpp/client_context.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/rpc/grpc_status.h"
#include "base/rpc/server.h"
#include "tests/support/http.h"

namespace headwater::testing {
namespace {

std::string Loopback(int port) { return absl::StrCat("127.0.0.1:", port); }

void SetTimeout(grpc::ClientContext* context, absl::Duration timeout) {
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout));
}

}  // namespace

Cluster::Cluster(ClusterOptions options) : options_(std::move(options)), directory_(MakeTempDirectory()) {
  coordinator_address_ = Loopback(PickFreePort());
  coordinator_metrics_port_ = PickFreePort();
  std::vector<std::string> arguments = {BinaryPath("headwater-coordinator"),
                                        absl::StrCat("--listen=", coordinator_address_),
                                        absl::StrCat("--metrics=", Loopback(coordinator_metrics_port_))};
  arguments.insert(arguments.end(), options_.coordinator_flags.begin(), options_.coordinator_flags.end());
  coordinator_ = Start(arguments, "coordinator.log");
  channel_ = DialPrivate(coordinator_address_, options_.transport.get(), Role::kCoordinator);
  prefill_ = v1::PrefillService::NewStub(channel_);
  admin_ = v1::AdminService::NewStub(channel_);
  decode_port_ = PickFreePort();
  decode_metrics_port_ = PickFreePort();
  kv_port_ = options_.kv_proxy_port ? options_.kv_proxy_port(decode_port_) : decode_port_;
  workers_.resize(static_cast<size_t>(options_.workers));
  for (int i = 0; i < options_.workers; ++i) worker_metrics_ports_.push_back(PickFreePort());
  StartDecode();
  for (int i = 0; i < options_.workers; ++i) StartWorker(i);
  WaitForMembers(options_.workers, 1);
}

Cluster::~Cluster() = default;

std::unique_ptr<Process> Cluster::Start(const std::vector<std::string>& arguments, const std::string& log) {
  std::vector<std::string> command = options_.command_prefix;
  command.insert(command.end(), arguments.begin(), arguments.end());
  return std::make_unique<Process>(command, absl::StrCat(directory_, "/", log));
}

void Cluster::StartWorker(int index) {
  std::vector<std::string> arguments = {
      BinaryPath("headwater-worker"),
      absl::StrCat("--coordinator=", coordinator_address_),
      absl::StrCat("--worker_id=w", index),
      absl::StrCat("--listen=", Loopback(PickFreePort())),
      absl::StrCat("--metrics=", Loopback(worker_metrics_ports_[static_cast<size_t>(index)])),
      absl::StrCat("--model=", options_.model_directory),
      "--model_name=tiny",
      "--threads=1",
      absl::StrCat("--measure_rates=", options_.measure_rates ? "true" : "false"),
      absl::StrCat("--compute=", options_.compute)};
  arguments.insert(arguments.end(), options_.worker_flags.begin(), options_.worker_flags.end());
  if (options_.flags_of_worker) {
    for (std::string& flag : options_.flags_of_worker(index)) arguments.push_back(std::move(flag));
  }
  workers_[static_cast<size_t>(index)] = Start(arguments, absl::StrCat("worker", index, ".log"));
}

void Cluster::StartDecode() {
  std::vector<std::string> arguments = {BinaryPath("headwater-decode"),
                                        absl::StrCat("--coordinator=", coordinator_address_),
                                        "--decode_node=d0",
                                        absl::StrCat("--listen=", Loopback(decode_port_)),
                                        absl::StrCat("--advertise_kv=", Loopback(kv_port_)),
                                        absl::StrCat("--metrics=", Loopback(decode_metrics_port_)),
                                        absl::StrCat("--model=", options_.model_directory),
                                        "--threads=1",
                                        absl::StrCat("--compute=", options_.compute),
                                        absl::StrCat("--kv_dir=", directory_, "/kv"),
                                        "--kv_budget=2147483648"};
  arguments.insert(arguments.end(), options_.decode_flags.begin(), options_.decode_flags.end());
  decode_ = Start(arguments, "decode.log");
}

void Cluster::WaitForMembers(int workers, int decode_nodes) {
  const absl::Time end = absl::Now() + absl::Seconds(60);
  while (absl::Now() < end) {
    grpc::ClientContext worker_context;
    grpc::ClientContext decode_context;
    SetTimeout(&worker_context, absl::Seconds(2));
    SetTimeout(&decode_context, absl::Seconds(2));
    // Calls that fail at once would not wait for a handshake, which goes on only while something waits.
    worker_context.set_wait_for_ready(true);
    decode_context.set_wait_for_ready(true);
    v1::ListWorkersResponse worker_list;
    v1::ListDecodeNodesResponse decode_list;
    if (admin_->ListWorkers(&worker_context, {}, &worker_list).ok() &&
        admin_->ListDecodeNodes(&decode_context, {}, &decode_list).ok()) {
      int connected = 0;
      for (const auto& node : decode_list.decode_nodes()) connected += node.connected() ? 1 : 0;
      if (worker_list.workers_size() == workers && connected == decode_nodes) return;
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
  std::fprintf(stderr, "the cluster did not come up with %d workers and %d decode nodes:\n%s", workers,
               decode_nodes, Logs().c_str());
  std::abort();
}

absl::StatusOr<v1::PrefillCompleted> Cluster::Prefill(
    const v1::PrefillRequest& request, const std::function<void(const v1::PrefillResponse&)>& on_event,
    absl::Duration timeout) {
  grpc::ClientContext context;
  SetTimeout(&context, timeout);
  const auto reader = prefill_->Prefill(&context, request);
  v1::PrefillResponse event;
  absl::StatusOr<v1::PrefillCompleted> result =
      absl::UnknownError("the stream ended without a terminal event");
  int terminal_events = 0;
  while (reader->Read(&event)) {
    if (on_event) on_event(event);
    if (event.has_completed()) result = event.completed();
    if (event.has_failed()) result = FromRpcStatus(event.failed().error());
    terminal_events += event.has_completed() || event.has_failed() ? 1 : 0;
  }
  const absl::Status status = FromGrpcStatus(reader->Finish());
  if (!status.ok()) return status;
  if (terminal_events > 1) return absl::InternalError(absl::StrCat(terminal_events, " terminal events"));
  return result;
}

absl::StatusOr<std::vector<uint32_t>> Cluster::Generate(const v1::PrefillCompleted& completed,
                                                        uint32_t count) {
  const auto stub = v1::DecodeService::NewStub(
      DialPrivate(completed.decode_address(), options_.transport.get(), Role::kDecode));
  grpc::ClientContext context;
  SetTimeout(&context, absl::Seconds(60));
  v1::GenerateRequest request;
  request.set_session_id(completed.session_id());
  request.set_max_new_tokens(count);
  const auto reader = stub->Generate(&context, request);
  std::vector<uint32_t> tokens;
  v1::GenerateResponse response;
  while (reader->Read(&response)) tokens.push_back(response.token_id());
  const absl::Status status = FromGrpcStatus(reader->Finish());
  if (!status.ok()) return status;
  return tokens;
}

absl::StatusOr<uint64_t> Cluster::Release(const v1::PrefillCompleted& completed) {
  const auto stub = v1::DecodeService::NewStub(
      DialPrivate(completed.decode_address(), options_.transport.get(), Role::kDecode));
  grpc::ClientContext context;
  SetTimeout(&context, absl::Seconds(20));
  v1::ReleaseRequest request;
  request.set_session_id(completed.session_id());
  v1::ReleaseResponse response;
  const absl::Status status = FromGrpcStatus(stub->Release(&context, request, &response));
  if (!status.ok()) return status;
  return response.bytes_reclaimed();
}

std::string Cluster::Logs() const {
  std::string logs = absl::StrCat("--- coordinator\n", ReadFile(directory_ + "/coordinator.log"));
  for (int i = 0; i < options_.workers; ++i) {
    absl::StrAppend(&logs, "--- worker ", i, "\n", ReadFile(absl::StrCat(directory_, "/worker", i, ".log")));
  }
  absl::StrAppend(&logs, "--- decode\n", ReadFile(directory_ + "/decode.log"));
  return logs;
}

std::vector<uint32_t> RandomTokens(uint64_t seed, int count, uint32_t vocab) {
  std::mt19937_64 generator(seed);
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(static_cast<uint32_t>(generator() % vocab));
  return tokens;
}

v1::PrefillRequest MakeRequest(const std::vector<uint32_t>& tokens) {
  v1::PrefillRequest request;
  request.set_kv_dtype(v1::KV_DTYPE_F32);
  request.mutable_token_ids()->Assign(tokens.begin(), tokens.end());
  return request;
}

double ReadMetric(int port, const std::string& name_and_labels) {
  const std::string text = GetHttp(absl::StrCat("127.0.0.1:", port), "/metrics", "GET", "localhost", 5).body;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    double value = 0;
    if (absl::StartsWith(line, name_and_labels + " ") &&
        absl::SimpleAtod(line.substr(name_and_labels.size() + 1), &value)) {
      return value;
    }
  }
  return -1;
}

}  // namespace headwater::testing
