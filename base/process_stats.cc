#include "base/process_stats.h"

#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

namespace headwater {
namespace {

void Add(const char* name, const char* help, prometheus::MetricType type, double value,
         std::vector<prometheus::MetricFamily>* families) {
  prometheus::ClientMetric metric;
  (type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  prometheus::MetricFamily& family = families->emplace_back();
  family.name = name;
  family.help = help;
  family.type = type;
  family.metric.push_back(std::move(metric));
}

// Of proc(5)'s stat, from field 3 (the state) on: the name before may hold anything.
std::vector<double> StatFields() {
  std::ifstream file("/proc/self/stat");
  std::string text;
  std::getline(file, text);
  const size_t end = text.rfind(") ");
  if (end == std::string::npos) return {};
  std::vector<double> fields;
  for (const absl::string_view word : absl::StrSplit(text.substr(end + 2), ' ')) {
    double value = 0;
    fields.push_back(absl::SimpleAtod(word, &value) ? value : 0);
  }
  return fields;
}

int CountOpenFiles() {
  DIR* const directory = opendir("/proc/self/fd");
  if (directory == nullptr) return -1;
  int count = 0;
  while (const dirent* const entry = readdir(directory)) count += entry->d_name[0] != '.';
  closedir(directory);
  return count - 1;  // that of the directory itself
}

}  // namespace

std::vector<prometheus::MetricFamily> ProcessStats::Collect() const {
  constexpr auto kCounter = prometheus::MetricType::Counter, kGauge = prometheus::MetricType::Gauge;
  // Numbers of proc(5), less 3.
  constexpr size_t kUser = 14 - 3, kSystem = 15 - 3, kThreads = 20 - 3, kVirtual = 23 - 3, kResident = 24 - 3;
  std::vector<prometheus::MetricFamily> families;
  if (const std::vector<double> stat = StatFields(); stat.size() > kResident) {
    const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
    Add("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.", kCounter,
        (stat[kUser] + stat[kSystem]) / ticks, &families);
    Add("process_threads", "Threads of the process.", kGauge, stat[kThreads], &families);
    Add("process_virtual_memory_bytes", "Virtual memory size in bytes.", kGauge, stat[kVirtual], &families);
    Add("process_resident_memory_bytes", "Resident memory size in bytes.", kGauge,
        stat[kResident] * static_cast<double>(sysconf(_SC_PAGESIZE)), &families);
  }
  if (const int open = CountOpenFiles(); open >= 0) {
    Add("process_open_fds", "Number of open file descriptors.", kGauge, open, &families);
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    Add("process_max_fds", "Maximum number of open file descriptors.", kGauge,
        static_cast<double>(limit.rlim_cur), &families);
  }
  return families;
}

}  // namespace headwater
