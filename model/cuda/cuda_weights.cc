#include "model/cuda/cuda_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "base/status_macros.h"
#include "kernels/cuda/quantize.h"
#include "model/fingerprint.h"
#include "model/kernel_status.h"
#include "model/tensor_reader.h"

namespace headwater {
namespace {

using kernels::DType;

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kStageBytes = 8 << 20;
// Values of random weights before they come again; prime to every width.
constexpr size_t kRandomStretch = (1 << 20) + 7;
constexpr uint64_t kNone = ~uint64_t{0};

// Where a tensor's values go.
struct Copy {
  std::string name;
  const Tensor* tensor = nullptr;
  DType to = DType::kBF16;        // what is quantized is bf16 first
  uint64_t offset = 0;            // from the start of the weights' memory
  uint64_t scale_offset = kNone;  // of a matrix that is quantized: its first row's scale
  uint64_t elements = 0;
  int64_t width = 0;   // of a matrix; 0: a vector
  bool first = false;  // counts into the fingerprint
  uint32_t crc = 0;    // set where it does, when it has been read
};

// One matrix or vector, of one tensor or of several, row below row.
struct Part {
  std::string name;
  int64_t rows = 0;
};

// Rows of bf16 at `from` to their place in the weights, quantized: rows [first_row, first_row + num_rows).
absl::Status QuantizeRows(const Copy& copy, const char* from, int64_t first_row, int64_t num_rows, char* base,
                          cudaStream_t stream) {
  kernels::CudaQuantizeRowsArgs args;
  args.x = from;
  args.out = base + copy.offset + first_row * copy.width;
  args.scale = reinterpret_cast<float*>(base + copy.scale_offset) + first_row;
  args.num_rows = num_rows;
  args.width = copy.width;
  return FromKernels(kernels::CudaQuantizeRows(args, stream), copy.name);
}

// Lays the weights out. With a reader it also checks the tensors and notes what to copy.
class Layout {
 public:
  Layout(const ModelConfig& config, LinearType linear, TensorReader* reader)
      : config_(config), fp8_(linear == LinearType::kFP8), reader_(reader) {}

  absl::Status Run() {
    HW_RETURN_IF_ERROR(
        Add({{kEmbeddingName, config_.vocab_size}}, config_.hidden_size, DType::kBF16, &embedding_));
    layers_.resize(static_cast<size_t>(config_.num_layers));
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) HW_RETURN_IF_ERROR(AddLayer(layer));
    HW_RETURN_IF_ERROR(Add({{"model.norm.weight", config_.hidden_size}}, 0, DType::kF32, &final_norm_));
    if (!config_.tied_embeddings) {
      return Add({{kHeadName, config_.vocab_size}}, config_.hidden_size, DType::kBF16, &lm_head_);
    }
    lm_head_ = embedding_;
    return reader_ == nullptr ? absl::OkStatus() : reader_->CheckTiedHead();
  }

  uint64_t bytes() const { return bytes_; }
  std::vector<Copy>& copies() { return copies_; }

  void Fill(CudaWeights* weights) const {
    const char* const base = weights->memory.data();
    const auto at = [&](uint64_t offset) -> const void* { return offset == kNone ? nullptr : base + offset; };
    const auto f32 = [&](uint64_t offset) { return static_cast<const float*>(at(offset)); };
    const auto linear = [&](const LinearOffsets& o) {
      return CudaLinearWeights{at(o.weight), f32(o.scale), at(o.bias)};
    };
    weights->embedding = at(embedding_);
    weights->final_norm = f32(final_norm_);
    weights->lm_head = at(lm_head_);
    for (const Offsets& o : layers_) {
      weights->layers.push_back({f32(o.input_norm), linear(o.qkv), f32(o.q_norm), f32(o.k_norm),
                                 linear(o.output), f32(o.post_attention_norm), linear(o.gate_up),
                                 linear(o.down)});
    }
  }

 private:
  struct LinearOffsets {
    uint64_t weight = kNone, scale = kNone, bias = kNone;
  };
  struct Offsets {
    uint64_t input_norm = kNone, q_norm = kNone, k_norm = kNone, post_attention_norm = kNone;
    LinearOffsets qkv, output, gate_up, down;
  };

  // An aligned place of so many bytes.
  uint64_t Take(uint64_t bytes) {
    bytes_ = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    return std::exchange(bytes_, bytes_ + bytes);
  }

  // width 0: vectors. scale: where the parts are quantized to, or null.
  absl::Status Add(const std::vector<Part>& parts, int64_t width, DType to, uint64_t* offset,
                   uint64_t* scale = nullptr) {
    uint64_t next_scale = kNone;
    if (scale != nullptr) {
      uint64_t rows = 0;
      for (const Part& part : parts) rows += static_cast<uint64_t>(part.rows);
      *scale = next_scale = Take(rows * sizeof(float));
    }
    *offset = Take(0);
    for (const Part& part : parts) {
      Copy copy;
      copy.name = part.name;
      copy.to = to;
      copy.offset = bytes_;
      copy.elements = static_cast<uint64_t>(part.rows) * static_cast<uint64_t>(std::max<int64_t>(1, width));
      bytes_ += copy.elements * (scale != nullptr ? 1 : kernels::SizeOf(to));
      copy.width = width;
      if (scale != nullptr) {
        copy.scale_offset = next_scale;
        next_scale += static_cast<uint64_t>(part.rows) * sizeof(float);
      }
      if (reader_ == nullptr) {
        copies_.push_back(copy);
        continue;
      }
      const std::vector<int64_t> shape =
          width == 0 ? std::vector<int64_t>{part.rows} : std::vector<int64_t>{part.rows, width};
      HW_ASSIGN_OR_RETURN(copy.tensor, reader_->Take(part.name, shape, &copy.first));
      copies_.push_back(copy);
    }
    return absl::OkStatus();
  }

  absl::Status AddLinear(const std::string& prefix, const std::vector<Part>& parts, int64_t in_features,
                         bool has_bias, DType bias_type, LinearOffsets* o) {
    std::vector<Part> matrices, vectors;
    for (const Part& part : parts) {
      matrices.push_back({absl::StrCat(prefix, part.name, ".weight"), part.rows});
      vectors.push_back({absl::StrCat(prefix, part.name, ".bias"), part.rows});
    }
    HW_RETURN_IF_ERROR(Add(matrices, in_features, DType::kBF16, &o->weight, fp8_ ? &o->scale : nullptr));
    // What cuBLASLt adds to products of e4m3 is bf16.
    return has_bias ? Add(vectors, 0, fp8_ ? DType::kBF16 : bias_type, &o->bias) : absl::OkStatus();
  }

  absl::Status AddLayer(int32_t layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const int64_t hidden = config_.hidden_size, inner = config_.intermediate_size,
                  head_dim = config_.head_dim;
    const int64_t q_rows = config_.num_q_heads * head_dim, kv_rows = config_.num_kv_heads * head_dim;
    Offsets& o = layers_[static_cast<size_t>(layer)];
    const auto vector = [&](const char* name, int64_t size, uint64_t* offset) {
      return Add({{absl::StrCat(prefix, name, ".weight"), size}}, 0, DType::kF32, offset);
    };
    HW_RETURN_IF_ERROR(vector("input_layernorm", hidden, &o.input_norm));
    HW_RETURN_IF_ERROR(AddLinear(absl::StrCat(prefix, "self_attn."),
                                 {{"q_proj", q_rows}, {"k_proj", kv_rows}, {"v_proj", kv_rows}}, hidden,
                                 config_.qkv_bias, DType::kBF16, &o.qkv));
    if (config_.qk_norm) {
      HW_RETURN_IF_ERROR(vector("self_attn.q_norm", head_dim, &o.q_norm));
      HW_RETURN_IF_ERROR(vector("self_attn.k_norm", head_dim, &o.k_norm));
    }
    HW_RETURN_IF_ERROR(AddLinear(absl::StrCat(prefix, "self_attn."), {{"o_proj", hidden}}, q_rows,
                                 config_.output_bias, DType::kF32, &o.output));
    HW_RETURN_IF_ERROR(vector("post_attention_layernorm", hidden, &o.post_attention_norm));
    HW_RETURN_IF_ERROR(AddLinear(absl::StrCat(prefix, "mlp."), {{"gate_proj", inner}, {"up_proj", inner}},
                                 hidden, config_.mlp_bias, DType::kBF16, &o.gate_up));
    return AddLinear(absl::StrCat(prefix, "mlp."), {{"down_proj", hidden}}, inner, config_.mlp_bias,
                     DType::kF32, &o.down);
  }

  const ModelConfig& config_;
  const bool fp8_;
  TensorReader* const reader_;
  uint64_t bytes_ = 0;
  uint64_t embedding_ = kNone, final_norm_ = kNone, lm_head_ = kNone;
  std::vector<Offsets> layers_;
  std::vector<Copy> copies_;
};

// One thread's way to the device: two pinned buffers on a stream.
class Stager {
 public:
  ~Stager() {
    if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
    for (const cudaEvent_t event : free_) {
      if (event != nullptr) (void)cudaEventDestroy(event);
    }
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }

  // quantizes: some of the copies do.
  absl::Status Init(int device, bool quantizes) {
    HW_RETURN_IF_ERROR(FromCuda(cudaSetDevice(device), "cudaSetDevice"));
    HW_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"));
    HW_ASSIGN_OR_RETURN(memory_, DeviceBuffer::AllocatePinned(2 * kStageBytes, "loading weights"));
    if (quantizes) {
      HW_ASSIGN_OR_RETURN(rows_, DeviceBuffer::Allocate(kStageBytes, "quantizing weights"));
    }
    for (cudaEvent_t& event : free_) {
      HW_RETURN_IF_ERROR(FromCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event"));
    }
    return absl::OkStatus();
  }

  absl::Status Put(const Copy& copy, char* base) {
    const uint64_t from_size = kernels::SizeOf(*copy.tensor->element), to_size = kernels::SizeOf(copy.to);
    const bool quantizes = copy.scale_offset != kNone;
    uint64_t most = kStageBytes / std::max(from_size, to_size);
    // Whole rows, by fours: their scales are then 16-byte aligned.
    if (quantizes) most -= most % (4 * static_cast<uint64_t>(copy.width));
    for (uint64_t done = 0; done < copy.elements; done += most, turn_ ^= 1) {
      const uint64_t count = std::min(most, copy.elements - done);
      char* const stage = memory_.data() + turn_ * kStageBytes;
      HW_RETURN_IF_ERROR(FromCuda(cudaEventSynchronize(free_[turn_]), "loading weights"));
      // The map has no alignment.
      const uint8_t* const from = copy.tensor->data + done * from_size;
      if (*copy.tensor->element == copy.to) {
        std::memcpy(stage, from, count * from_size);
      } else {
        aligned_.assign(from, from + count * from_size);
        kernels::Convert(aligned_.data(), *copy.tensor->element, stage, copy.to, count);
      }
      char* const to = quantizes ? rows_.data() : base + copy.offset + done * to_size;
      HW_RETURN_IF_ERROR(FromCuda(
          cudaMemcpyAsync(to, stage, count * to_size, cudaMemcpyHostToDevice, stream_), "loading weights"));
      if (quantizes) {
        const auto width = static_cast<uint64_t>(copy.width);
        HW_RETURN_IF_ERROR(QuantizeRows(copy, to, static_cast<int64_t>(done / width),
                                        static_cast<int64_t>(count / width), base, stream_));
      }
      HW_RETURN_IF_ERROR(FromCuda(cudaEventRecord(free_[turn_], stream_), "loading weights"));
    }
    return absl::OkStatus();
  }

  absl::Status Finish() { return FromCuda(cudaStreamSynchronize(stream_), "loading weights"); }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t free_[2] = {nullptr, nullptr};
  DeviceBuffer memory_;
  DeviceBuffer rows_;  // of a matrix that is quantized, in bf16; the stream's order guards it
  std::vector<uint8_t> aligned_;
  int turn_ = 0;
};

absl::Status CopyAll(std::vector<Copy>* copies, char* base, int num_threads) {
  int device = 0;
  HW_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), "cudaGetDevice"));
  const bool quantizes = std::any_of(copies->begin(), copies->end(),
                                     [](const Copy& copy) { return copy.scale_offset != kNone; });
  std::atomic<size_t> next{0};
  absl::Mutex mutex;
  absl::Status first_error;
  const auto work = [&] {
    Stager stager;
    absl::Status status = stager.Init(device, quantizes);
    while (status.ok()) {
      const size_t i = next.fetch_add(1);
      if (i >= copies->size()) break;
      Copy& copy = (*copies)[i];
      if (copy.first) copy.crc = Crc32c(copy.tensor->data, copy.tensor->bytes);
      status = stager.Put(copy, base);
      ReleasePages(copy.tensor->data, copy.tensor->bytes);
    }
    if (status.ok()) status = stager.Finish();
    if (status.ok()) return;
    next.store(copies->size());
    const absl::MutexLock lock(&mutex);
    first_error.Update(status);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < std::max(1, num_threads); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  return first_error;
}

}  // namespace

uint64_t CudaWeightBytes(const ModelConfig& config, LinearType linear) {
  Layout layout(config, linear, nullptr);
  (void)layout.Run();  // cannot fail without a reader
  return layout.bytes();
}

absl::StatusOr<CudaWeights> LoadCudaWeights(const ModelConfig& config, const Checkpoint& checkpoint,
                                            LinearType linear, int num_threads, uint64_t budget_bytes) {
  TensorReader reader(checkpoint);
  Layout layout(config, linear, &reader);
  HW_RETURN_IF_ERROR(layout.Run());
  reader.LogUnused();
  if (budget_bytes != 0 && layout.bytes() > budget_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("the weights take ", layout.bytes(), " bytes, ",
                                                     budget_bytes, " are available to them"));
  }
  CudaWeights weights;
  HW_ASSIGN_OR_RETURN(weights.memory, DeviceBuffer::Allocate(layout.bytes(), "weights"));
  HW_RETURN_IF_ERROR(CopyAll(&layout.copies(), weights.memory.data(), num_threads));
  layout.Fill(&weights);
  Fingerprint fingerprint;
  for (const Copy& copy : layout.copies()) {
    if (copy.first) fingerprint.Add(copy.name, *copy.tensor, copy.crc);
  }
  weights.fingerprint = fingerprint.Finish(config);
  return weights;
}

absl::StatusOr<CudaWeights> RandomCudaWeights(const ModelConfig& config, LinearType linear, uint32_t seed) {
  Layout layout(config, linear, nullptr);
  HW_RETURN_IF_ERROR(layout.Run());
  CudaWeights weights;
  HW_ASSIGN_OR_RETURN(weights.memory, DeviceBuffer::Allocate(layout.bytes(), "weights"));
  uint64_t most = 0;
  for (const Copy& copy : layout.copies()) {
    if (copy.scale_offset != kNone) most = std::max(most, copy.elements * kernels::SizeOf(copy.to));
  }
  HW_ASSIGN_OR_RETURN(const DeviceBuffer rows, DeviceBuffer::Allocate(most, "quantizing weights"));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> stretch(kRandomStretch), scaled(kRandomStretch);
  for (float& value : stretch) value = normal(random);
  std::vector<char> bytes(kRandomStretch * sizeof(float));
  for (const Copy& copy : layout.copies()) {
    const bool is_norm = absl::EndsWith(copy.name, "norm.weight");
    const float size = is_norm ? 0 : copy.width > 0 ? 1 / std::sqrt(static_cast<float>(copy.width)) : 0.02f;
    for (size_t i = 0; i < stretch.size(); ++i) scaled[i] = size * stretch[i] + (is_norm ? 1.0f : 0.0f);
    kernels::Convert(scaled.data(), DType::kF32, bytes.data(), copy.to, scaled.size());
    const uint64_t element = kernels::SizeOf(copy.to);
    const bool quantizes = copy.scale_offset != kNone;
    char* const to = quantizes ? rows.data() : weights.memory.data() + copy.offset;
    // The stretch once from here, then as often as it takes from what is there.
    uint64_t done = std::min<uint64_t>(copy.elements, kRandomStretch);
    HW_RETURN_IF_ERROR(
        FromCuda(cudaMemcpy(to, bytes.data(), done * element, cudaMemcpyHostToDevice), "weights"));
    while (done < copy.elements) {
      const uint64_t count = std::min(done, copy.elements - done);
      HW_RETURN_IF_ERROR(FromCuda(
          cudaMemcpy(to + done * element, to, count * element, cudaMemcpyDeviceToDevice), "weights"));
      done += count;
    }
    if (quantizes) {
      HW_RETURN_IF_ERROR(QuantizeRows(copy, to, 0, static_cast<int64_t>(copy.elements) / copy.width,
                                      weights.memory.data(), nullptr));
    }
  }
  HW_RETURN_IF_ERROR(FromCuda(cudaDeviceSynchronize(), "quantizing weights"));
  layout.Fill(&weights);
  weights.fingerprint = Fingerprint().Finish(config);
  return weights;
}

}  // namespace headwater
