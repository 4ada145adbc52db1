// Weight files.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "fuzz.pb.h"
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

// The quotes of names are the mutator's business.
std::string Header(const WeightFile& file) {
  std::string out = "{";
  for (const WeightTensor& tensor : file.tensors()) {
    absl::StrAppend(&out, out.size() > 1 ? "," : "", "\"", tensor.name(), "\":{\"dtype\":\"", tensor.dtype(),
                    "\",\"shape\":[", absl::StrJoin(tensor.shape(), ","), "],\"data_offsets\":[",
                    tensor.begin(), ",", tensor.end(), "]}");
  }
  return out + "}";
}

void Run(absl::string_view input) {
  WeightFile spec;
  if (!spec.ParseFromArray(input.data(), static_cast<int>(input.size()))) return;
  const std::string data(spec.data_bytes() % 4096, 'd');
  // What has tensors stays a file of tensors, whatever the mutator makes of the other fields.
  const std::string text = spec.tensors_size() > 0 ? File(Header(spec), data)
                           : spec.header().empty() ? spec.raw()
                                                   : File(spec.header(), data);
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
      // A zero anywhere makes it empty, whatever the others are.
      const bool empty = std::count(tensor.shape.begin(), tensor.shape.end(), 0) > 0;
      uint64_t wanted = empty ? 0 : *tensor.element == kernels::DType::kF32 ? 4 : 2;
      bool wraps = false;
      for (const int64_t size : tensor.shape) {
        wraps |= __builtin_mul_overflow(wanted, static_cast<uint64_t>(size), &wanted);
      }
      FUZZ_EXPECT(!wraps && wanted == tensor.bytes, "as many bytes as the shape says");
    }
    for (uint64_t i = 0; i < tensor.bytes; ++i) seen = static_cast<unsigned char>(seen + tensor.data[i]);
    sum += tensor.bytes;
  }
  FUZZ_EXPECT(sum <= text.size(), "tensors do not lie on each other");
  Consume(seen);
}

WeightTensor* Add(WeightFile* file, const char* name, const char* dtype, uint64_t begin, uint64_t end) {
  WeightTensor* const tensor = file->add_tensors();
  tensor->set_name(name);
  tensor->set_dtype(dtype);
  tensor->set_begin(begin);
  tensor->set_end(end);
  return tensor;
}

std::vector<std::string> Seeds() {
  WeightFile raw, text, tensors, nothing;
  raw.set_raw(File(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})", std::string(24, 'x')));
  text.set_header(R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
                  R"("c":{"dtype":"I64","shape":[0],"data_offsets":[4,4]}})");
  text.set_data_bytes(4);
  tensors.set_data_bytes(30);
  Add(&tensors, "a", "F32", 0, 24)->add_shape(6);
  Add(&tensors, "b", "F16", 24, 30)->add_shape(3);
  WeightTensor* const empty = Add(&tensors, "c", "F32", 30, 30);
  empty->add_shape(0);
  empty->add_shape(5);
  *nothing.add_tensors() = *empty;
  nothing.mutable_tensors(0)->set_begin(0);
  nothing.mutable_tensors(0)->set_end(0);
  return {raw.SerializeAsString(), text.SerializeAsString(), tensors.SerializeAsString(),
          nothing.SerializeAsString()};
}

const Registration kTarget({"safetensors", Run, Seeds, Prototype<WeightFile>});

}  // namespace
}  // namespace headwater::fuzz
