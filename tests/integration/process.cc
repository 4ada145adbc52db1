#include "tests/integration/process.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"

namespace headwater::testing {

namespace {

// Runs `work` on one thread that lives as long as this process. A child's parent-death signal comes when the
// thread that forked it ends, so children must not be forked by a test's short-lived threads.
void RunOnSpawner(const std::function<void()>& work) {
  struct Spawner {
    absl::Mutex mutex;
    const std::function<void()>* next ABSL_GUARDED_BY(mutex) = nullptr;
    bool busy ABSL_GUARDED_BY(mutex) = false;
  };
  static Spawner* const spawner = [] {
    auto* made = new Spawner();
    std::thread([made] {
      for (;;) {
        absl::MutexLock lock(&made->mutex);
        made->mutex.Await(absl::Condition(
            +[](Spawner* s) { return s->next != nullptr; }, made));
        (*made->next)();
        made->next = nullptr;
      }
    }).detach();
    return made;
  }();
  absl::MutexLock lock(&spawner->mutex);
  spawner->mutex.Await(absl::Condition(
      +[](Spawner* s) { return !s->busy; }, spawner));
  spawner->busy = true;
  spawner->next = &work;
  spawner->mutex.Await(absl::Condition(
      +[](Spawner* s) { return s->next == nullptr; }, spawner));
  spawner->busy = false;
}

pid_t Spawn(const std::vector<char*>& argv, const std::string& log_path) {
  const pid_t parent = getpid();
  const pid_t pid = fork();
  HW_CHECK(pid >= 0);
  if (pid > 0) return pid;
  // Only async-signal-safe calls from here to exec: other threads of the test may hold locks.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(125);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int log = open(log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (log < 0) _exit(126);
  dup2(log, STDOUT_FILENO);
  dup2(log, STDERR_FILENO);
  execv(argv[0], argv.data());
  _exit(127);
}

}  // namespace

Process::Process(std::vector<std::string> arguments, std::string log_path) : log_path_(std::move(log_path)) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  RunOnSpawner([&] { pid_ = Spawn(argv, log_path_); });
}

Process::~Process() {
  Kill();
  // A killed process has no exit status that would tell of its sanitizer's reports.
  const std::string log = Log();
  for (const char* report : {"WARNING: ThreadSanitizer", "FATAL: ThreadSanitizer", "ERROR: AddressSanitizer",
                             "ERROR: LeakSanitizer", "runtime error: "}) {
    if (!absl::StrContains(log, report)) continue;
    std::fputs(log.c_str(), stderr);
    HW_CHECK(!"a sanitizer reported on a child process");
  }
}

void Process::Signal(int signal_number) const {
  if (!status_.has_value()) kill(pid_, signal_number);
}

std::optional<int> Process::Wait(absl::Duration timeout) {
  const absl::Time end = absl::Now() + timeout;
  while (!status_.has_value()) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (absl::Now() >= end) {
      return std::nullopt;
    } else {
      absl::SleepFor(absl::Milliseconds(2));
    }
  }
  return status_;
}

void Process::Kill() {
  Signal(SIGKILL);
  Wait(absl::Seconds(10));
}

std::string Process::Log() const { return ReadFile(log_path_); }

int PickFreePort() {
  static std::set<int>* const taken = new std::set<int>();
  for (;;) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    HW_CHECK(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
    socklen_t length = sizeof(address);
    HW_CHECK(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0);
    close(fd);
    const int port = ntohs(address.sin_port);
    if (taken->insert(port).second) return port;
  }
}

std::string MakeTempDirectory() {
  struct Cleaner {
    std::vector<std::string> paths;
    ~Cleaner() {
      for (const std::string& path : paths) {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
      }
    }
  };
  static Cleaner cleaner;
  std::string path = std::filesystem::temp_directory_path() / "headwater-test-XXXXXX";
  HW_CHECK(mkdtemp(path.data()) != nullptr);
  cleaner.paths.push_back(path);
  return path;
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string BinaryPath(const std::string& name) { return std::string(HW_BINARY_DIRECTORY) + "/" + name; }

}  // namespace headwater::testing
