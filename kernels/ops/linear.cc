#include "kernels/ops/linear.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "oneapi/dnnl/dnnl.hpp"
#include <omp.h>

#include "kernels/cpu/cpu_features.h"

namespace headwater::kernels {
namespace {

// The packed layout is the one that oneDNN prefers for this many tokens; it serves any number.
constexpr int64_t kTypicalTokens = 512;
// Callers use a few chunk sizes; a primitive is a few KiB of code that oneDNN shares between equal shapes.
constexpr size_t kMaxPrimitives = 16;
constexpr int64_t kMaxFeatures = int64_t{1} << 31;

dnnl::memory::data_type DataType(DType dtype) {
  return dtype == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

dnnl::memory::desc Plain(int64_t rows, int64_t columns, DType dtype) {
  return {{rows, columns}, DataType(dtype), dnnl::memory::format_tag::ab};
}

const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

Status FromOneDnn(const dnnl::error& error, const std::string& what) {
  const auto code =
      error.status == dnnl_out_of_memory ? StatusCode::kResourceExhausted : StatusCode::kInternal;
  return {code,
          what + ": oneDNN status " + std::to_string(static_cast<int>(error.status)) + ", " + error.what()};
}

// Scratch memory of the calling thread, grown to the largest that any primitive asked for.
class Scratchpad {
 public:
  ~Scratchpad() { std::free(data_); }
  void* Get(size_t bytes) {
    if (bytes <= bytes_) return data_;
    std::free(data_);
    bytes_ = 0;
    data_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (data_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};
thread_local Scratchpad scratchpad;

class OneDnnLinear final : public Linear {
 public:
  OneDnnLinear(int64_t in_features, int64_t out_features, DType compute)
      : in_features_(in_features), out_features_(out_features), compute_(compute) {}

  // Throws dnnl::error and std::bad_alloc.
  void Pack(const LinearSpec& spec) {
    if (spec.bias != nullptr) {
      bias_.assign(spec.bias, spec.bias + out_features_);
    }
    const dnnl::memory::desc any({out_features_, in_features_}, DataType(compute_),
                                 dnnl::memory::format_tag::any);
    weight_desc_ = MakePrimitive(any, kTypicalTokens, DType::kF32, false).weights_desc();

    const dnnl::memory::desc plain = Plain(out_features_, in_features_, compute_);
    dnnl::memory stacked;
    const WeightRows& first = spec.weight.front();
    if (spec.weight.size() == 1 && first.dtype == compute_) {
      stacked = dnnl::memory(plain, Engine(), const_cast<void*>(first.data));
    } else {
      stacked = dnnl::memory(plain, Engine());
      Stack(spec, static_cast<char*>(stacked.get_data_handle()));
    }
    weight_ = dnnl::memory(weight_desc_, Engine());
    dnnl::stream stream(Engine());
    dnnl::reorder(stacked, weight_).execute(stream, stacked, weight_);
    stream.wait();
  }

  Status Run(const void* x, int64_t num_tokens, void* y, DType y_dtype, bool accumulate) const override {
    HW_KERNELS_RETURN_IF_ERROR(Check(x, num_tokens, y, y_dtype, accumulate));
    if (num_tokens == 0) return {};
    try {
      const std::shared_ptr<const Prepared> prepared = Find(num_tokens, y_dtype, accumulate);
      const auto& desc = prepared->desc;
      dnnl::stream stream(Engine());
      std::unordered_map<int, dnnl::memory> arguments = {
          {DNNL_ARG_SRC, dnnl::memory(desc.src_desc(), Engine(), const_cast<void*>(x))},
          {DNNL_ARG_WEIGHTS, weight_},
          {DNNL_ARG_DST, dnnl::memory(desc.dst_desc(), Engine(), y)},
          {DNNL_ARG_SCRATCHPAD, dnnl::memory(desc.scratchpad_desc(), Engine(),
                                             scratchpad.Get(desc.scratchpad_desc().get_size()))}};
      if (!bias_.empty()) {
        arguments.emplace(DNNL_ARG_BIAS,
                          dnnl::memory(desc.bias_desc(), Engine(), const_cast<float*>(bias_.data())));
      }
      prepared->primitive.execute(stream, arguments);
      stream.wait();
    } catch (const dnnl::error& error) {
      return FromOneDnn(error, "linear layer of " + std::to_string(num_tokens) + " tokens");
    } catch (const std::bad_alloc&) {
      return {StatusCode::kResourceExhausted,
              "no memory for a linear layer of " + std::to_string(num_tokens) + " tokens"};
    }
    return {};
  }

  int64_t in_features() const override { return in_features_; }
  int64_t out_features() const override { return out_features_; }
  uint64_t packed_bytes() const override { return weight_desc_.get_size() + bias_.size() * sizeof(float); }

 private:
  using Key = std::tuple<int64_t, DType, bool>;
  struct Prepared {
    dnnl::inner_product_forward::primitive_desc desc;
    dnnl::inner_product_forward primitive;
  };

  Status Check(const void* x, int64_t num_tokens, const void* y, DType y_dtype, bool accumulate) const {
    if (num_tokens < 0 || num_tokens > kMaxFeatures) {
      return InvalidArgument("num_tokens " + std::to_string(num_tokens) + " is outside 0 to " +
                             std::to_string(kMaxFeatures));
    }
    if (num_tokens > 0 && (x == nullptr || y == nullptr)) return InvalidArgument("x or y is null");
    if (y_dtype != DType::kF32 && (y_dtype != compute_ || accumulate)) {
      return InvalidArgument(std::string("y of type ") + NameOf(y_dtype) + " with compute type " +
                             NameOf(compute_) + (accumulate ? " and accumulate" : "") + " is not supported");
    }
    return {};
  }

  void Stack(const LinearSpec& spec, char* to) const {
    const size_t row_bytes = static_cast<size_t>(in_features_) * SizeOf(compute_);
    for (const WeightRows& part : spec.weight) {
      const size_t from_bytes = static_cast<size_t>(in_features_) * SizeOf(part.dtype);
#pragma omp parallel for schedule(static)
      for (int64_t row = 0; row < part.rows; ++row) {
        Convert(static_cast<const char*>(part.data) + static_cast<size_t>(row) * from_bytes, part.dtype,
                to + static_cast<size_t>(row) * row_bytes, compute_, static_cast<size_t>(in_features_));
      }
      to += static_cast<size_t>(part.rows) * row_bytes;
    }
  }

  dnnl::inner_product_forward::primitive_desc MakePrimitive(const dnnl::memory::desc& weight,
                                                            int64_t num_tokens, DType y_dtype,
                                                            bool accumulate) const {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (accumulate) {
      dnnl::post_ops post_ops;
      post_ops.append_sum(1.0f);
      attributes.set_post_ops(post_ops);
    }
    const auto x = Plain(num_tokens, in_features_, compute_);
    const auto y = Plain(num_tokens, out_features_, y_dtype);
    constexpr auto kKind = dnnl::prop_kind::forward_inference;
    if (bias_.empty()) {
      return {dnnl::inner_product_forward::desc(kKind, x, weight, y), attributes, Engine()};
    }
    const dnnl::memory::desc bias({out_features_}, dnnl::memory::data_type::f32, dnnl::memory::format_tag::a);
    return {dnnl::inner_product_forward::desc(kKind, x, weight, bias, y), attributes, Engine()};
  }

  // The primitive for these arguments, made on first use; the least recently used of too many goes.
  std::shared_ptr<const Prepared> Find(int64_t num_tokens, DType y_dtype, bool accumulate) const {
    const Key key(num_tokens, y_dtype, accumulate);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found =
        std::find_if(cache_.begin(), cache_.end(), [&](const auto& entry) { return entry.first == key; });
    if (found != cache_.end()) {
      cache_.splice(cache_.begin(), cache_, found);
      return cache_.front().second;
    }
    const auto desc = MakePrimitive(weight_desc_, num_tokens, y_dtype, accumulate);
    auto prepared = std::make_shared<const Prepared>(Prepared{desc, dnnl::inner_product_forward(desc)});
    cache_.emplace_front(key, prepared);
    if (cache_.size() > kMaxPrimitives) cache_.pop_back();
    return prepared;
  }

  const int64_t in_features_;
  const int64_t out_features_;
  const DType compute_;
  std::vector<float> bias_;
  dnnl::memory::desc weight_desc_;
  dnnl::memory weight_;
  mutable std::mutex mutex_;
  mutable std::list<std::pair<Key, std::shared_ptr<const Prepared>>> cache_;
};

Status CheckSpec(const LinearSpec& spec, int64_t* out_features) {
  if (spec.compute == DType::kF16)
    return InvalidArgument("compute type f16 is not supported, use f32 or bf16");
  if (spec.in_features < 1 || spec.in_features > kMaxFeatures) {
    return InvalidArgument("in_features " + std::to_string(spec.in_features) + " is outside 1 to " +
                           std::to_string(kMaxFeatures));
  }
  *out_features = 0;
  for (const WeightRows& part : spec.weight) {
    if (part.data == nullptr) return InvalidArgument("a weight's data is null");
    if (part.rows < 1 || part.rows > kMaxFeatures - *out_features) {
      return InvalidArgument("a weight of " + std::to_string(part.rows) + " rows after " +
                             std::to_string(*out_features) + " is outside 1 to " +
                             std::to_string(kMaxFeatures));
    }
    *out_features += part.rows;
  }
  if (*out_features == 0) return InvalidArgument("no weight");
  return {};
}

}  // namespace

Status Linear::Create(const LinearSpec& spec, std::unique_ptr<Linear>* linear) {
  int64_t out_features = 0;
  HW_KERNELS_RETURN_IF_ERROR(CheckSpec(spec, &out_features));
  const std::string what = "packing a linear layer from " + std::to_string(spec.in_features) + " to " +
                           std::to_string(out_features) + " features";
  try {
    auto made = std::make_unique<OneDnnLinear>(spec.in_features, out_features, spec.compute);
    made->Pack(spec);
    *linear = std::move(made);
  } catch (const dnnl::error& error) {
    return FromOneDnn(error, what);
  } catch (const std::bad_alloc&) {
    return {StatusCode::kResourceExhausted, what + ": no memory"};
  }
  return {};
}

DType PreferredComputeType() {
  return cpu::ActivePath() >= cpu::CpuPath::kAvx512Bf16 ? DType::kBF16 : DType::kF32;
}

void SetNumThreads(int num_threads) { omp_set_num_threads(std::max(num_threads, 1)); }

}  // namespace headwater::kernels
