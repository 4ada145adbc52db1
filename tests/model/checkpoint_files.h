// Checkpoint directories for tests: temporary folders and a writer of safetensors files.
#ifndef HW_TESTS_MODEL_CHECKPOINT_FILES_H_
#define HW_TESTS_MODEL_CHECKPOINT_FILES_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

#include "kernels/dtype.h"
#include "model/safetensors.h"

namespace headwater::testing {

// A fresh folder; removed with its contents by the destructor.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string File(absl::string_view name) const;

 private:
  std::string path_;
};

void WriteFile(const std::string& path, absl::string_view contents);
std::string ReadWholeFile(const std::string& path);

// Header length, header, data: whatever they are.
std::string RawSafetensors(absl::string_view header, absl::string_view data);

// Tensors that own their bytes; changed and written again by tests.
struct OwnedTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using OwnedTensors = std::map<std::string, OwnedTensor>;

OwnedTensors ReadTensors(const std::string& file);
// A valid file with the tensors in the order of their names.
std::string Serialize(const OwnedTensors& tensors);

// Float tensors in another type, rounded.
OwnedTensors ConvertTensors(const OwnedTensors& tensors, kernels::DType dtype);

}  // namespace headwater::testing

#endif  // HW_TESTS_MODEL_CHECKPOINT_FILES_H_
