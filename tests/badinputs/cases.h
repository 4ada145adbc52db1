// The catalogue of bad inputs: literal cases in *_cases.inc, one BAD(name, code, reason, "text") each, and
// the drivers that bring them to a live surface. <x*n> in a text stands for n times x, a '#' in x for its
// number.
#ifndef HW_TESTS_BADINPUTS_CASES_H_
#define HW_TESTS_BADINPUTS_CASES_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace headwater::testing {

struct BadInput {
  const char* name;
  absl::StatusCode code;
  // Of ErrorReason, without its prefix; "" where the surface gives none (files, command lines).
  const char* reason;
  const char* text;
};

// All of the catalogue.
extern const std::vector<BadInput> kPrefillCases, kPrefillWholeCases, kBatchCases, kWorkerCases, kDecodeCases,
    kOpenSessionCases, kCommitSessionCases, kAssignmentCases, kFlagCases, kConfigCases, kSafetensorsCases,
    kRolesCases;
size_t NumCases();

std::string Expand(absl::string_view text);

// Puts the fields of `text` (protobuf's text format) over `message`.
void Override(absl::string_view text, google::protobuf::Message* message);

// Brings every case to `surface` and expects its refusal: code, reason, a message that is bounded, and
// nothing of the prompt in what the process logs meanwhile.
void ExpectRefusals(const std::vector<BadInput>& cases,
                    const std::function<absl::Status(const BadInput&)>& surface);

}  // namespace headwater::testing

#endif  // HW_TESTS_BADINPUTS_CASES_H_
