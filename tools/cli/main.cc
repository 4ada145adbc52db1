// headwater: the command line of the service.
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/signals.h"
#include "tools/cli/cli.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

int TerminalWidth() {
  constexpr int kDefault = 80;
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kDefault;
}

int Main(int argc, char** argv) {
  BlockTerminationSignals();
  // Never destroyed: the thread below may still use it while the process ends.
  auto* const interrupt = new Interrupt();
  std::thread([interrupt] {
    while (true) {
      if (WaitForTerminationSignal(absl::Hours(1)) != 0 && !interrupt->Raise()) _exit(kExitInterrupted);
    }
  }).detach();
  const Console console{std::cin,        std::cout, std::cerr, isatty(STDERR_FILENO) == 1,
                        TerminalWidth(), interrupt};
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const int exit_code = RunCli(arguments, console);
  std::cout.flush();
  return exit_code;
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) { return headwater::Main(argc, argv); }
