// Times the KV stream over loopback (checksums, acknowledgements, file-backed store) beside a raw TCP socket
// with as many connections and beside memcpy, alternating in one run; both ends share the machine. Appends
// rows to --out.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "nlohmann/json.hpp"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/rpc/accept_limit.h"
#include "base/rpc/server.h"
#include "base/status_macros.h"
#include "kvtransfer/receiver.h"
#include "kvtransfer/sender.h"
#include "kvtransfer/store.h"

ABSL_FLAG(std::string, out, "bench/results/kv.jsonl", "file that the rows are appended to");
ABSL_FLAG(std::string, kv_dir, "/dev/shm", "directory in which the store makes its own");
ABSL_FLAG(std::string, sink, "memory", "memory, or verify: the receiver checks blocks and drops them");
ABSL_FLAG(int, layers, 64,
          "layers of 8 MiB: 16 blocks of 512 KiB (256 tokens, 8 heads, 128 dimensions, bf16)");
ABSL_FLAG(std::string, tls, "",
          "directory of tools/make_certificates.py: the stream is mutual TLS; empty: plaintext");
ABSL_FLAG(int, repeat, 3, "timed rounds after one that warms up; the median counts");
ABSL_FLAG(std::vector<std::string>, channels, std::vector<std::string>({"1", "2", "4"}), "connections");

namespace headwater {
namespace {

constexpr uint64_t kTokens = 2048;

struct Sample {
  double gb_per_s = 0;
  double cpu_s_per_gb = 0;
  double first_block_ms = 0;
};

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double TimeMemcpy(const std::vector<char>& from, std::vector<char>* to) {
  const absl::Time start = absl::Now();
  std::memcpy(to->data(), from.data(), from.size());
  return static_cast<double>(from.size()) / absl::ToDoubleSeconds(absl::Now() - start) * 1e-9;
}

// One connection: writes bytes [0, size) in pieces of a block; the peer reads them to one place.
absl::Status PumpTcp(const char* data, uint64_t size, uint64_t piece) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(listener, 1) != 0 ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    return absl::UnavailableError("cannot listen");
  }
  std::atomic<uint64_t> received{0};
  std::thread reader([&] {
    const int fd = accept(listener, nullptr, nullptr);
    std::vector<char> buffer(piece);
    for (ssize_t got = 0; (got = recv(fd, buffer.data(), buffer.size(), 0)) > 0;) {
      received += static_cast<uint64_t>(got);
    }
    close(fd);
  });
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const bool connected = connect(fd, reinterpret_cast<sockaddr*>(&address), length) == 0;
  for (uint64_t at = 0; connected && at < size;) {
    const ssize_t sent = send(fd, data + at, std::min(piece, size - at), MSG_NOSIGNAL);
    if (sent <= 0) break;
    at += static_cast<uint64_t>(sent);
  }
  close(fd);
  shutdown(listener, SHUT_RDWR);
  reader.join();
  close(listener);
  return received == size ? absl::OkStatus() : absl::UnavailableError("the socket broke");
}

absl::StatusOr<double> TimeTcp(const std::vector<char>& data, int connections, uint64_t piece) {
  const absl::Time start = absl::Now();
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(connections));
  std::atomic<int> failed{0};
  const uint64_t share = data.size() / static_cast<uint64_t>(connections);
  for (int i = 0; i < connections; ++i) {
    threads.emplace_back([&, i] {
      if (!PumpTcp(data.data() + share * static_cast<uint64_t>(i), share, piece).ok()) ++failed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (failed > 0) return absl::UnavailableError("raw TCP: a connection broke");
  return static_cast<double>(share * static_cast<uint64_t>(connections)) /
         absl::ToDoubleSeconds(absl::Now() - start) * 1e-9;
}

absl::StatusOr<Sample> TimeStream(const std::vector<char>& data, const KvGeometry& geometry, KvStore* store,
                                  const std::string& address, int channels,
                                  std::shared_ptr<const Transport> worker) {
  v1::OpenSessionRequest open;
  open.set_session_id("bench");
  open.set_session_token("bench");
  open.set_epoch(1);
  *open.mutable_layout() = geometry.layout();
  HW_RETURN_IF_ERROR(store->OpenSession(open).status());
  KvSenderOptions options;
  options.address = address;
  options.transport = std::move(worker);
  options.session_id = options.session_token = "bench";
  options.epoch = 1;
  options.num_channels = channels;
  const double cpu_before = CpuSeconds();
  const absl::Time start = absl::Now();
  std::atomic<int64_t> first_done{0};
  const std::unique_ptr<KvSender> sender = KvSender::Create(options, geometry);
  for (uint64_t i = 0; i < geometry.num_blocks(); ++i) {
    const KvBlockId block = geometry.BlockAt(i);
    HW_RETURN_IF_ERROR(sender->Submit(block, data.data() + geometry.OffsetOf(block), [&] {
      int64_t none = 0;
      first_done.compare_exchange_strong(none, absl::ToUnixNanos(absl::Now()));
    }));
  }
  HW_RETURN_IF_ERROR(sender->Finish());
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  const double gigabytes = static_cast<double>(geometry.total_bytes()) * 1e-9;
  Sample sample;
  sample.gb_per_s = gigabytes / seconds;
  sample.cpu_s_per_gb = (CpuSeconds() - cpu_before) / gigabytes;
  sample.first_block_ms = static_cast<double>(first_done.load() - absl::ToUnixNanos(start)) * 1e-6;
  store->Release("bench");
  return sample;
}

std::string FirstLine(const char* command) {
  std::string line;
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "unknown";
  for (int c = 0; (c = fgetc(pipe)) != EOF && c != '\n';) line += static_cast<char>(c);
  pclose(pipe);
  return line.empty() ? "unknown" : line;
}

nlohmann::json MakeRow(int channels, uint64_t chunk_bytes, const std::vector<Sample>& samples,
                       const std::vector<double>& tcp, const std::vector<double>& copy) {
  std::vector<double> rate, cpu, first;
  for (const Sample& sample : samples) {
    rate.push_back(sample.gb_per_s);
    cpu.push_back(sample.cpu_s_per_gb);
    first.push_back(sample.first_block_ms);
  }
  nlohmann::json row;
  row["bench"] = "kv";
  row["device"] = FirstLine("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo");
  row["commit"] = FirstLine("git rev-parse --short HEAD 2>/dev/null");
  row["date"] = absl::FormatTime("%Y-%m-%d", absl::Now(), absl::UTCTimeZone());
  row["params"] = {{"transport", "grpc"},
                   {"sink", absl::GetFlag(FLAGS_sink)},
                   {"channels", channels},
                   {"chunk_bytes", chunk_bytes},
                   {"tls", !absl::GetFlag(FLAGS_tls).empty()},
                   {"cores", std::thread::hardware_concurrency()}};
  row["metrics"] = {
      {"gb_per_s", Median(rate)}, {"cpu_s_per_gb", Median(cpu)}, {"first_block_ms", Median(first)}};
  row["peers"] = {{"raw_tcp", {{"gb_per_s", Median(tcp)}}}, {"memcpy", {{"gb_per_s", Median(copy)}}}};
  return row;
}

// nullptr: plaintext.
absl::StatusOr<std::shared_ptr<const Transport>> TransportOf(const std::string& role) {
  const std::string directory = absl::GetFlag(FLAGS_tls);
  TransportOptions options;
  if (!directory.empty()) {
    options.cert = directory + "/" + role + ".crt";
    options.key = directory + "/" + role + ".key";
    options.ca = directory + "/ca.crt";
  }
  return Transport::Create(options);
}

absl::Status Run() {
  v1::KvLayout layout;
  layout.set_num_layers(static_cast<uint32_t>(absl::GetFlag(FLAGS_layers)));
  layout.set_num_kv_heads(8);
  layout.set_head_dim(128);
  layout.set_num_tokens(kTokens);
  layout.set_block_tokens(256);
  layout.set_dtype(v1::KV_DTYPE_BF16);
  HW_ASSIGN_OR_RETURN(const KvGeometry geometry, KvGeometry::Create(layout));
  const uint64_t block_bytes = geometry.BytesOf(geometry.BlockAt(0));
  std::vector<char> data(geometry.total_bytes()), copy(geometry.total_bytes());
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 2654435761u >> 13);

  const std::filesystem::path directory =
      std::filesystem::path(absl::GetFlag(FLAGS_kv_dir)) / absl::StrCat("kv_bench.", getpid());
  KvStoreOptions options;
  const std::string sink = absl::GetFlag(FLAGS_sink);
  if (sink != "memory" && sink != "verify") {
    return absl::InvalidArgumentError("--sink: '" + sink + "' is not one of memory, verify");
  }
  options.sink = sink == "verify" ? KvSink::kVerify : KvSink::kMemory;
  options.directory = directory.string();
  options.budget_bytes = geometry.total_bytes();
  HW_ASSIGN_OR_RETURN(std::unique_ptr<KvStore> store, KvStore::Open(options));
  HW_ASSIGN_OR_RETURN(const auto decode, TransportOf("decode"));
  HW_ASSIGN_OR_RETURN(const auto worker, TransportOf("worker"));
  Metrics metrics("bench");
  const std::unique_ptr<grpc::Service> service = MakeKvReceiver(store.get(), &metrics);
  LimitConnections();  // as decode nodes do
  HW_ASSIGN_OR_RETURN(RunningServer server, StartServer("127.0.0.1:0", {service.get()}, decode.get()));

  absl::Status status;
  for (const std::string& text : absl::GetFlag(FLAGS_channels)) {
    const int channels = std::max(1, atoi(text.c_str()));
    std::vector<Sample> samples;
    std::vector<double> tcp, memory;
    for (int round = 0; round <= std::max(1, absl::GetFlag(FLAGS_repeat)); ++round) {
      const auto sample = TimeStream(data, geometry, store.get(), server.address, channels, worker);
      const auto raw = TimeTcp(data, channels, block_bytes);
      const double copied = TimeMemcpy(data, &copy);
      status = sample.ok() ? raw.status() : sample.status();
      if (!status.ok()) break;
      if (round == 0) continue;
      samples.push_back(*sample);
      tcp.push_back(*raw);
      memory.push_back(copied);
    }
    if (!status.ok()) break;
    const std::string row = MakeRow(channels, block_bytes, samples, tcp, memory).dump();
    std::printf("%s\n", row.c_str());
    std::ofstream(absl::GetFlag(FLAGS_out), std::ios::app) << row << "\n";
  }
  server.server->Shutdown(std::chrono::system_clock::now());
  server.server->Wait();
  store.reset();
  std::error_code error;
  std::filesystem::remove_all(directory, error);
  return status;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = headwater::Run();
  if (!status.ok()) std::fprintf(stderr, "kv_bench: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
