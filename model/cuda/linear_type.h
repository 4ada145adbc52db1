// How a GPU model's linear layers multiply.
#ifndef HW_MODEL_CUDA_LINEAR_TYPE_H_
#define HW_MODEL_CUDA_LINEAR_TYPE_H_

#include <cstdint>

namespace headwater {

// kFP8: e4m3 operands, a scale for each output channel made at load and one for each token; f32 sums. Twice
// the rate, half the weights' memory. A product is 3 to 4 % off, so K, V and logits differ from bf16's.
// Embedding, norms, attention and the LM head are bf16's.
enum class LinearType : uint8_t { kBF16, kFP8 };

constexpr const char* NameOf(LinearType type) { return type == LinearType::kFP8 ? "fp8" : "bf16"; }

}  // namespace headwater

#endif  // HW_MODEL_CUDA_LINEAR_TYPE_H_
