// Runs every target's seeds and the inputs of tests/fuzz/inputs/TARGET/, which once broke something, as an
// ordinary test.
//
//   fuzz_replay_test INPUTS_DIR          runs them all
//   fuzz_replay_test --write DIR         writes the seeds to DIR/TARGET/ for libFuzzer to begin with
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"

#include "base/log.h"
#include "tests/fuzz/fuzz.h"

namespace fs = std::filesystem;
using headwater::fuzz::Target;
using headwater::fuzz::Targets;

namespace {

// A target that is missing from the build would pass unseen.
constexpr size_t kTargets = 13;

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

int WriteSeeds(const fs::path& directory) {
  for (const Target& target : Targets()) {
    fs::create_directories(directory / target.name);
    int number = 0;
    for (const std::string& seed : target.seeds()) {
      std::ofstream(directory / target.name / absl::StrCat("seed", number++), std::ios::binary) << seed;
    }
  }
  return 0;
}

int Replay(const fs::path& inputs) {
  size_t total = 0;
  for (const Target& target : Targets()) {
    const std::vector<std::string> seeds = target.seeds();
    HW_CHECK(!seeds.empty());
    for (const std::string& seed : seeds) {
      // Whole, cut short, and with a flipped bit.
      target.run(seed);
      target.run(absl::string_view(seed).substr(0, seed.size() / 2));
      std::string flipped = seed;
      if (!flipped.empty()) flipped[flipped.size() / 3] ^= 0x10;
      target.run(flipped);
    }
    size_t files = 0;
    if (fs::is_directory(inputs / target.name)) {
      for (const fs::directory_entry& entry : fs::directory_iterator(inputs / target.name)) {
        std::printf("%s: %s\n", target.name, entry.path().filename().c_str());
        std::fflush(stdout);
        target.run(ReadFile(entry.path()));
        ++files;
      }
    }
    std::printf("%s: %zu seeds, %zu committed inputs\n", target.name, seeds.size(), files);
    total += seeds.size() * 3 + files;
  }
  std::printf("%zu targets, %zu inputs, nothing broke\n", Targets().size(), total);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  headwater::InitLogging(headwater::LogFormat::kText, headwater::LogSeverity::kERROR, "fuzz");
  HW_CHECK(Targets().size() == kTargets);
  if (argc == 3 && std::string(argv[1]) == "--write") return WriteSeeds(argv[2]);
  if (argc == 2 && fs::is_directory(argv[1])) return Replay(argv[1]);
  std::fprintf(stderr, "usage: fuzz_replay_test INPUTS_DIR | --write DIR\n");
  return 2;
}
