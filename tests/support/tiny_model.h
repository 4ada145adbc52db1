// A small random Llama checkpoint, written on the spot: for tests of the service that need a model's cost,
// not its sense.
#ifndef HW_TESTS_SUPPORT_TINY_MODEL_H_
#define HW_TESTS_SUPPORT_TINY_MODEL_H_

#include <cstdint>
#include <string>

namespace headwater::testing {

struct TinyModel {
  int layers = 4;
  int hidden = 64;
  int q_heads = 4;
  int kv_heads = 2;
  int head_dim = 32;
  int intermediate = 128;
  int vocab = 256;
  int64_t max_position = 65536;
  uint64_t seed = 1;
};

// Writes config.json and model.safetensors (bf16) into `directory`, which must exist. The same arguments
// write the same bytes.
void WriteTinyModel(const TinyModel& model, const std::string& directory);

}  // namespace headwater::testing

#endif  // HW_TESTS_SUPPORT_TINY_MODEL_H_
