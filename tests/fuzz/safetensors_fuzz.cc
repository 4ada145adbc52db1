// Weight files.
#include <cstring>
#include <memory>
#include <string>

#include "model/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace headwater::fuzz {
namespace {

std::string File(absl::string_view header, absl::string_view data) {
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(uint64_t{header.size()} >> (8 * i));
  file.append(header.data(), header.size());
  file.append(data.data(), data.size());
  return file;
}

// First byte: 0, a whole file follows; else a header follows, and so many bytes of data are added.
void Run(absl::string_view input) {
  if (input.empty()) return;
  const auto data_bytes = static_cast<unsigned char>(input.front());
  const absl::string_view rest = input.substr(1);
  const std::string text =
      data_bytes == 0 ? std::string(rest) : File(rest, std::string(data_bytes - size_t{1}, 'd'));
  // On the heap and of the exact size, so that a read past its end is seen.
  const auto file = std::make_unique<uint8_t[]>(text.size());
  std::memcpy(file.get(), text.data(), text.size());
  const absl::StatusOr<TensorMap> tensors = ParseSafetensors(file.get(), text.size());
  if (!tensors.ok()) {
    FUZZ_EXPECT(absl::IsInvalidArgument(tensors.status()), tensors.status().ToString().c_str());
    return;
  }
  FUZZ_EXPECT(tensors->size() <= kMaxSafetensorsTensors, "bounded tensors");
  uint64_t sum = 0;
  unsigned char seen = 0;
  for (const auto& [name, tensor] : *tensors) {
    FUZZ_EXPECT(name.size() <= kMaxTensorNameBytes, "a bounded name");
    FUZZ_EXPECT(tensor.shape.size() <= kMaxTensorRank, "a bounded rank");
    FUZZ_EXPECT(tensor.data >= file.get() && tensor.data + tensor.bytes <= file.get() + text.size(),
                "tensors lie in the file");
    if (tensor.element.has_value()) {
      uint64_t wanted = *tensor.element == kernels::DType::kF32 ? 4 : 2;
      for (const int64_t size : tensor.shape) {
        const bool wraps = __builtin_mul_overflow(wanted, static_cast<uint64_t>(size), &wanted);
        FUZZ_EXPECT(!wraps || tensor.bytes == 0, "sizes that multiply");
      }
      FUZZ_EXPECT(wanted == tensor.bytes || tensor.bytes == 0, "as many bytes as the shape says");
    }
    for (uint64_t i = 0; i < tensor.bytes; ++i) seen = static_cast<unsigned char>(seen + tensor.data[i]);
    sum += tensor.bytes;
  }
  FUZZ_EXPECT(sum <= text.size(), "tensors do not lie on each other");
  Consume(seen);
}

std::vector<std::string> Seeds() {
  const std::string one = R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})";
  const std::string two =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
      R"("b":{"dtype":"F16","shape":[],"data_offsets":[4,6]},"c":{"dtype":"I64","shape":[0],)"
      R"("data_offsets":[6,6]}})";
  return {std::string(1, '\0') + File(one, std::string(24, 'x')), std::string(1, '\x19') + one,
          std::string(1, '\x07') + two, std::string(1, '\x01') + "{}"};
}

const Registration kTarget({"safetensors", Run, Seeds, nullptr});

}  // namespace
}  // namespace headwater::fuzz
