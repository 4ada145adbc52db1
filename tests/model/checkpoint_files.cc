#include "tests/model/checkpoint_files.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "base/log.h"

namespace headwater::testing {

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "headwater_model_XXXXXX").string();
  HW_CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TempDir::File(absl::string_view name) const { return absl::StrCat(path_, "/", name); }

void WriteFile(const std::string& path, absl::string_view contents) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(contents.data(), static_cast<std::streamsize>(contents.size()));
  file.close();
  HW_CHECK(file.good());
}

std::string ReadWholeFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  HW_CHECK(file.good());
  return std::string(std::istreambuf_iterator<char>(file), {});
}

std::string RawSafetensors(absl::string_view header, absl::string_view data) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>((uint64_t{header.size()} >> (8 * i)) & 0xff);
  absl::StrAppend(&file, header, data);
  return file;
}

OwnedTensors ReadTensors(const std::string& file) {
  const std::string contents = ReadWholeFile(file);
  const auto tensors = ParseSafetensors(reinterpret_cast<const uint8_t*>(contents.data()), contents.size());
  HW_CHECK(tensors.ok());
  OwnedTensors owned;
  for (const auto& [name, tensor] : *tensors) {
    owned[name] = {tensor.dtype, tensor.shape,
                   std::string(reinterpret_cast<const char*>(tensor.data), tensor.bytes)};
  }
  return owned;
}

std::string Serialize(const OwnedTensors& tensors) {
  std::vector<std::string> entries;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    entries.push_back(absl::StrCat("\"", name, "\":{\"dtype\":\"", tensor.dtype, "\",\"shape\":[",
                                   absl::StrJoin(tensor.shape, ","), "],\"data_offsets\":[", begin, ",",
                                   data.size(), "]}"));
  }
  return RawSafetensors(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), data);
}

OwnedTensors ConvertTensors(const OwnedTensors& tensors, kernels::DType dtype) {
  OwnedTensors converted;
  for (const auto& [name, tensor] : tensors) {
    HW_CHECK(tensor.dtype == "F32");
    OwnedTensor to = tensor;
    to.dtype = dtype == kernels::DType::kBF16 ? "BF16" : dtype == kernels::DType::kF16 ? "F16" : "F32";
    const size_t count = tensor.bytes.size() / sizeof(float);
    to.bytes.assign(count * kernels::SizeOf(dtype), '\0');
    kernels::Convert(tensor.bytes.data(), kernels::DType::kF32, to.bytes.data(), dtype, count);
    converted[name] = std::move(to);
  }
  return converted;
}

}  // namespace headwater::testing
