// bench: runs the benchmark programs that lie beside this one. They link what the command must not.
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include <signal.h>
#include <unistd.h>

#include "base/flags.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

struct Benchmark {
  const char* name;
  const char* program;
  const char* help;
};

constexpr Benchmark kBenchmarks[] = {
    {"prefill", "headwater-bench-prefill", "what one GPU makes of prompts of given lengths"},
};

std::string Help() {
  std::string help = "usage: headwater bench NAME [flags]\n\nbenchmarks:\n";
  for (const Benchmark& benchmark : kBenchmarks) {
    absl::StrAppendFormat(&help, "  %-9s %s\n", benchmark.name, benchmark.help);
  }
  return help + "\n'headwater bench NAME --help' lists its flags with their defaults.\n";
}

// Of this program, with a slash at its end.
absl::StatusOr<std::string> OwnDirectory() {
  std::string path(4096, '\0');
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size());
  if (length <= 0) return absl::InternalError(absl::StrCat("/proc/self/exe: ", std::strerror(errno)));
  path.resize(static_cast<size_t>(length));
  return path.substr(0, path.rfind('/') + 1);
}

// Becomes the program; returns only where that fails.
int Become(const Benchmark& benchmark, absl::Span<const std::string> flags, const Console& console) {
  const std::string command = absl::StrCat("bench ", benchmark.name);
  const auto directory = OwnDirectory();
  if (!directory.ok()) return UsageError(command, directory.status().message(), console);
  std::vector<std::string> words = {absl::StrCat(*directory, benchmark.program)};
  words.insert(words.end(), flags.begin(), flags.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  console.out.flush();
  // A program inherits the mask and what is ignored; see BlockTerminationSignals().
  sigset_t none;
  sigset_t before;
  sigemptyset(&none);
  pthread_sigmask(SIG_SETMASK, &none, &before);
  const auto pipe_before = signal(SIGPIPE, SIG_DFL);
  execv(argv[0], argv.data());
  const int error = errno;
  signal(SIGPIPE, pipe_before);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  console.err << "headwater " << command << ": cannot run " << words[0] << ": " << std::strerror(error)
              << " (it belongs beside this program)\n";
  return kExitUsage;
}

}  // namespace

int RunBench(absl::Span<const std::string> arguments, const Console& console) {
  if (arguments.empty()) {
    console.err << Help();
    return kExitUsage;
  }
  if (arguments[0] == "--help" || arguments[0] == "-h") {
    console.out << Help();
    return kExitOk;
  }
  std::vector<std::string> known;
  for (const Benchmark& benchmark : kBenchmarks) {
    if (arguments[0] == benchmark.name) return Become(benchmark, arguments.subspan(1), console);
    known.emplace_back(benchmark.name);
  }
  const std::string nearest = NearestWord(arguments[0], known);
  return UsageError("bench",
                    absl::StrCat("unknown benchmark '", Printable(arguments[0]), "'",
                                 nearest.empty() ? "" : absl::StrCat("; did you mean '", nearest, "'?")),
                    console);
}

}  // namespace headwater
