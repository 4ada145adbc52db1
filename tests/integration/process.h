// Child processes of a test: started with a log file each, killed with the test.
#ifndef HW_TESTS_INTEGRATION_PROCESS_H_
#define HW_TESTS_INTEGRATION_PROCESS_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include <sys/types.h>

namespace headwater::testing {

class Process {
 public:
  // Runs arguments[0] with stdout and stderr appended to `log_path`. The child dies with this process.
  Process(std::vector<std::string> arguments, std::string log_path);
  // Kills it if it still runs. Ends the test program where the child's log holds a sanitizer's report.
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void Signal(int signal_number) const;
  // Exit status, 128 + signal for a killed one; nullopt: still running after `timeout`.
  std::optional<int> Wait(absl::Duration timeout);
  bool running() { return !Wait(absl::ZeroDuration()).has_value(); }
  // SIGKILL and wait.
  void Kill();

  std::string Log() const;
  pid_t pid() const { return pid_; }

 private:
  const std::string log_path_;
  pid_t pid_ = -1;
  std::optional<int> status_;
};

// A TCP port of 127.0.0.1 that was free a moment ago, not handed out before by this process.
int PickFreePort();

// A new directory under the system's temporary one; removed at exit.
std::string MakeTempDirectory();

std::string ReadFile(const std::string& path);

// Path of a binary of this build, "headwater-worker".
std::string BinaryPath(const std::string& name);

}  // namespace headwater::testing

#endif  // HW_TESTS_INTEGRATION_PROCESS_H_
