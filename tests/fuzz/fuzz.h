// Fuzz targets: one parser of remote or file bytes each, with inputs to begin with.
//
// NAME_fuzz.cc defines one target. Under clang's libFuzzer (preset fuzz) each is a program of its own; in
// every other build fuzz_replay_test holds them all and runs the seeds and the committed inputs once.
// docs/fuzzing.md says how to run them.
#ifndef HW_TESTS_FUZZ_FUZZ_H_
#define HW_TESTS_FUZZ_FUZZ_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace headwater::fuzz {

struct Target {
  const char* name = nullptr;
  // Runs one input; ends the process where a promise is broken.
  void (*run)(absl::string_view input) = nullptr;
  std::vector<std::string> (*seeds)() = nullptr;
  // Inputs are messages of this type on the wire, which the mutator then takes apart; null: plain bytes.
  const google::protobuf::Message* (*prototype)() = nullptr;
};

// In order of registration.
std::vector<Target>& Targets();

struct Registration {
  explicit Registration(const Target& target) { Targets().push_back(target); }
};

// For `Target::prototype`.
template <typename Message>
const google::protobuf::Message* Prototype() {
  return &Message::default_instance();
}

// Keeps the compiler from leaving out what made `value`.
inline void Consume(uint64_t value) { asm volatile("" : : "r"(value)); }

// Every refusal of remote input says why: one of `codes`, and a reason of the closed set.
void ExpectRefusal(const absl::Status& status, std::initializer_list<absl::StatusCode> codes);

}  // namespace headwater::fuzz

// What the target promises whatever the input.
#define FUZZ_EXPECT(condition, what)                                                          \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      std::fprintf(stderr, "%s:%d: broken: %s (%s)\n", __FILE__, __LINE__, #condition, what); \
      std::abort();                                                                           \
    }                                                                                         \
  } while (false)

#endif  // HW_TESTS_FUZZ_FUZZ_H_
