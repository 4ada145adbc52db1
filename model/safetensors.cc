#include "model/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

#include "base/status_macros.h"
#include "model/json.h"

namespace headwater {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// An entry is an object, a string, two arrays and at most rank + 2 numbers.
constexpr JsonLimits kHeaderLimits = {kMaxSafetensorsHeaderBytes, 4,
                                      kMaxSafetensorsTensors*(kMaxTensorRank + 6) + 4096};

struct NamedDType {
  const char* name;
  uint64_t bytes;
  std::optional<kernels::DType> element;
};
constexpr std::array<NamedDType, 16> kDTypes = {{
    {"F32", 4, kernels::DType::kF32},
    {"F16", 2, kernels::DType::kF16},
    {"BF16", 2, kernels::DType::kBF16},
    {"F64", 8, {}},
    {"F8_E4M3", 1, {}},
    {"F8_E5M2", 1, {}},
    {"F8_E8M0", 1, {}},
    {"I64", 8, {}},
    {"I32", 4, {}},
    {"I16", 2, {}},
    {"I8", 1, {}},
    {"U64", 8, {}},
    {"U32", 4, {}},
    {"U16", 2, {}},
    {"U8", 1, {}},
    {"BOOL", 1, {}},
}};

const NamedDType* FindDType(absl::string_view name) {
  const auto* const found =
      std::find_if(kDTypes.begin(), kDTypes.end(), [name](const NamedDType& d) { return name == d.name; });
  return found == kDTypes.end() ? nullptr : found;
}

absl::Status Malformed(absl::string_view tensor, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(tensor), ": ", what));
}

const json* Member(const json& object, const char* name) {
  const auto found = object.find(name);
  return found == object.end() ? nullptr : &*found;
}

absl::Status ParseShape(const std::string& name, const json& entry, Tensor* tensor) {
  const json* const shape = Member(entry, "shape");
  if (shape == nullptr || !shape->is_array() || shape->size() > kMaxTensorRank) {
    return Malformed(name, absl::StrCat("shape is ", shape == nullptr ? "absent" : Describe(*shape),
                                        "; must be a list of at most ", kMaxTensorRank, " sizes"));
  }
  for (const json& size : *shape) {
    if (!size.is_number_unsigned() || size.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
      return Malformed(
          name, absl::StrCat("shape is ", Describe(*shape), "; sizes must be integers from 0 to 2^63 - 1"));
    }
    tensor->shape.push_back(size.get<int64_t>());
  }
  return absl::OkStatus();
}

absl::Status ParseOffsets(const std::string& name, const json& entry, uint64_t data_bytes, uint64_t* begin,
                          uint64_t* end) {
  const json* const offsets = Member(entry, "data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return Malformed(name,
                     absl::StrCat("data_offsets is ", offsets == nullptr ? "absent" : Describe(*offsets),
                                  "; must be two integers from 0 to the data's size, ", data_bytes));
  }
  *begin = (*offsets)[0].get<uint64_t>();
  *end = (*offsets)[1].get<uint64_t>();
  if (*begin > *end || *end > data_bytes) {
    return Malformed(name, absl::StrCat("data_offsets is ", Describe(*offsets),
                                        "; must be a range inside the file's ", data_bytes, " data bytes"));
  }
  return absl::OkStatus();
}

absl::Status CheckByteCount(const std::string& name, const Tensor& tensor, uint64_t element_bytes) {
  // A zero anywhere makes the product zero, however large the other sizes are.
  const bool empty = std::count(tensor.shape.begin(), tensor.shape.end(), 0) > 0;
  uint64_t wanted = empty ? 0 : element_bytes;
  bool overflow = false;
  for (const int64_t size : tensor.shape) {
    overflow |= __builtin_mul_overflow(wanted, static_cast<uint64_t>(size), &wanted);
  }
  if (overflow || wanted != tensor.bytes) {
    return Malformed(name,
                     absl::StrCat("dtype ", tensor.dtype, " and shape [", absl::StrJoin(tensor.shape, ", "),
                                  "] take ", overflow ? "more than 2^64" : absl::StrCat(wanted),
                                  " bytes, data_offsets hold ", tensor.bytes));
  }
  return absl::OkStatus();
}

absl::Status ParseEntry(const std::string& name, const json& entry, const uint8_t* data, uint64_t data_bytes,
                        Tensor* tensor) {
  if (name.size() > kMaxTensorNameBytes) {
    return Malformed(name, absl::StrCat("a name of ", name.size(), " bytes; at most ", kMaxTensorNameBytes));
  }
  if (!entry.is_object()) return Malformed(name, absl::StrCat("is ", Describe(entry), "; must be an object"));
  const json* const dtype = Member(entry, "dtype");
  if (dtype == nullptr || !dtype->is_string()) {
    return Malformed(name, absl::StrCat("dtype is ", dtype == nullptr ? "absent" : Describe(*dtype),
                                        "; must be a string"));
  }
  tensor->dtype = dtype->get<std::string>();
  HW_RETURN_IF_ERROR(ParseShape(name, entry, tensor));
  uint64_t begin = 0;
  uint64_t end = 0;
  HW_RETURN_IF_ERROR(ParseOffsets(name, entry, data_bytes, &begin, &end));
  tensor->data = data + begin;
  tensor->bytes = end - begin;
  const NamedDType* const known = FindDType(tensor->dtype);
  if (known == nullptr) return absl::OkStatus();
  tensor->element = known->element;
  return CheckByteCount(name, *tensor, known->bytes);
}

// The tensors must tile the data part.
absl::Status CheckCover(const TensorMap& tensors, const uint8_t* data, uint64_t data_bytes) {
  std::vector<const TensorMap::value_type*> order;
  for (const auto& entry : tensors) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.data, a->second.bytes) < std::pair(b->second.data, b->second.bytes);
  });
  uint64_t reached = 0;
  for (const auto* const entry : order) {
    const uint64_t begin = static_cast<uint64_t>(entry->second.data - data);
    if (begin != reached) {
      return Malformed(entry->first,
                       absl::StrCat("begins at data byte ", begin, ", the tensors before it end at ", reached,
                                    begin < reached ? ": they overlap" : ": a hole"));
    }
    reached += entry->second.bytes;
  }
  if (reached != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the tensors take ", reached, " data bytes, the file has ", data_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TensorMap> ParseSafetensors(const uint8_t* file, uint64_t size) {
  if (size < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file has ", size, " bytes; a header length alone takes ", kLengthBytes));
  }
  uint64_t header_bytes = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) header_bytes |= static_cast<uint64_t>(file[i]) << (8 * i);
  if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > size - kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the header length is ", header_bytes, "; at most ",
                                                   kMaxSafetensorsHeaderBytes, " and the file's ",
                                                   size - kLengthBytes, " bytes after it"));
  }
  const absl::string_view text(reinterpret_cast<const char*>(file) + kLengthBytes,
                               static_cast<size_t>(header_bytes));
  HW_ASSIGN_OR_RETURN(const json header, ParseJsonObject(text, kHeaderLimits, "header"));

  const uint8_t* const data = file + kLengthBytes + header_bytes;
  const uint64_t data_bytes = size - kLengthBytes - header_bytes;
  TensorMap tensors;
  for (const auto& [name, entry] : header.get_ref<const json::object_t&>()) {
    if (name == "__metadata__") {
      const bool strings =
          entry.is_object() &&
          std::all_of(entry.begin(), entry.end(), [](const json& value) { return value.is_string(); });
      if (!strings) return Malformed(name, "must be an object of strings");
      continue;
    }
    if (tensors.size() == kMaxSafetensorsTensors) {
      return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxSafetensorsTensors, " tensors"));
    }
    Tensor tensor;
    HW_RETURN_IF_ERROR(ParseEntry(name, entry, data, data_bytes, &tensor));
    tensors.emplace(name, std::move(tensor));
  }
  HW_RETURN_IF_ERROR(CheckCover(tensors, data, data_bytes));
  return tensors;
}

}  // namespace headwater
