#include "tools/cli/cli.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "base/version.h"
#include "tools/cli/command.h"
#include "tools/cli/exit_code.h"

namespace headwater {
namespace {

struct Subcommand {
  const char* name;
  const char* help;
  int (*run)(absl::Span<const std::string>, const Console&);
};

constexpr Subcommand kSubcommands[] = {
    {"submit", "prefill one prompt, show progress and the result; generate from it", RunSubmit},
    {"batch", "prefill many prompts from a file", RunBatch},
    {"watch", "show progress and the result of a request that was submitted before", RunWatch},
    {"status", "say how far a request is", RunStatus},
    {"cancel", "cancel a request", RunCancel},
    {"generate", "generate from a prefilled cache", RunGenerate},
    {"release", "free a prefilled cache", RunRelease},
    {"workers", "list workers", RunWorkers},
    {"drain", "have a worker finish what it has and leave", RunDrain},
    {"nodes", "list decode nodes", RunNodes},
    {"trace", "write a request's timeline for Perfetto", RunTrace},
    {"bench", "time this machine: 'bench prefill'", RunBench},
};

std::string Help() {
  std::string help = "usage: headwater SUBCOMMAND [flags]\n\nsubcommands:\n";
  for (const Subcommand& subcommand : kSubcommands) {
    absl::StrAppendFormat(&help, "  %-9s %s\n", subcommand.name, subcommand.help);
  }
  absl::StrAppend(
      &help,
      "  version   show the version\n"
      "  help      show this text, or a subcommand's flags\n\n"
      "'headwater SUBCOMMAND --help' lists its flags with their defaults.\n"
      "exit codes: 0 success, 1 other failure, 2 wrong usage, 3 refused by the service, 4 unavailable for\n"
      "now (deadline, no room), 5 cancelled, 130 interrupted\n");
  return help;
}

int Version(const Console& console) {
  console.out << VersionText("headwater");
  return kExitOk;
}

int Dispatch(absl::Span<const std::string> arguments, const Console& console) {
  const std::string& name = arguments[0];
  if (name == "version" || name == "--version") return Version(console);
  if (name == "--help" || name == "-h" || (name == "help" && arguments.size() == 1)) {
    console.out << Help();
    return kExitOk;
  }
  if (name == "help") {
    const std::vector<std::string> asked = {arguments[1], "--help"};
    if (arguments[1] == "help") return Dispatch({"--help"}, console);
    return Dispatch(asked, console);
  }
  std::vector<std::string> known = {"version", "help"};
  for (const Subcommand& subcommand : kSubcommands) {
    if (name == subcommand.name) return subcommand.run(arguments.subspan(1), console);
    known.emplace_back(subcommand.name);
  }
  const std::string nearest = NearestWord(name, known);
  console.err << "headwater: unknown subcommand '" << Printable(name) << "'"
              << (nearest.empty() ? "" : absl::StrCat("; did you mean '", nearest, "'?"))
              << "\nrun 'headwater help' for the list\n";
  return kExitUsage;
}

}  // namespace

int RunCli(absl::Span<const std::string> arguments, const Console& console) {
  if (arguments.empty()) {
    console.err << Help();
    return kExitUsage;
  }
  return Dispatch(arguments, console);
}

}  // namespace headwater
