// libFuzzer's entry points for the one target that is linked in.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "base/log.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/proto_mutator.h"

// libFuzzer's own mutation of plain bytes.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using headwater::fuzz::Target;
using headwater::fuzz::Targets;

void MutateText(std::string* text) {
  constexpr size_t kLongest = 512;
  const size_t size = std::min(text->size(), kLongest);
  text->resize(kLongest);
  text->resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text->data()), size, kLongest));
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  HW_CHECK(Targets().size() == 1);
  // What input brings about may be logged; a million lines of it help nobody.
  headwater::InitLogging(headwater::LogFormat::kText, headwater::LogSeverity::kERROR, "fuzz");
  google::protobuf::SetLogHandler(nullptr);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Targets().front().run(absl::string_view(reinterpret_cast<const char*>(data), size));
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  const Target& target = Targets().front();
  std::mt19937_64 random(seed);
  // Now and then protobuf's own parser gets nonsense, too.
  if (target.prototype == nullptr || random() % 16 == 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::unique_ptr<google::protobuf::Message> message(target.prototype()->New());
  if (!message->ParsePartialFromArray(data, static_cast<int>(size))) message->Clear();
  headwater::fuzz::MutateMessage(message.get(), &random, MutateText);
  const size_t bytes = message->ByteSizeLong();
  if (bytes == 0 || bytes > max_size) return LLVMFuzzerMutate(data, size, max_size);
  message->SerializePartialToArray(data, static_cast<int>(bytes));
  return bytes;
}
