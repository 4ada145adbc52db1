// Mutates protobuf messages by reflection, so that fuzzing reaches behind the parser of protobuf.
#ifndef HW_TESTS_FUZZ_PROTO_MUTATOR_H_
#define HW_TESTS_FUZZ_PROTO_MUTATOR_H_

#include <cstdint>
#include <random>

#include "google/protobuf/message.h"

namespace headwater::fuzz {

// Changes one to four fields somewhere in `message`: values at and around limits, enums that do not exist,
// fields and elements that come, go, or come twice. `mutate_bytes` changes the text of a string field.
void MutateMessage(google::protobuf::Message* message, std::mt19937_64* random,
                   void (*mutate_bytes)(std::string*));

}  // namespace headwater::fuzz

#endif  // HW_TESTS_FUZZ_PROTO_MUTATOR_H_
