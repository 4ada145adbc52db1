// The C interface of the layer operations.
#include <algorithm>
#include <memory>

#include "kernels/c_api_support.h"
#include "kernels/cuda/block_stats.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/quantize.h"
#include "kernels/headwater_kernels.h"

using namespace headwater::kernels;  // NOLINT: everything here names it

struct hw_linear {
  std::unique_ptr<CudaLinear> object;
};

namespace {

using capi::Guarded;
using capi::WithArgs;

static_assert(static_cast<int>(DType::kF32) == HW_F32 && static_cast<int>(DType::kF16) == HW_F16 &&
              static_cast<int>(DType::kBF16) == HW_BF16);
static_assert(sizeof(hw_token_run) == sizeof(CudaTokenRun));

// False: not a value of hw_dtype.
bool TypeOf(int32_t value, DType* dtype) {
  if (value < HW_F32 || value > HW_BF16) return false;
  *dtype = static_cast<DType>(value);
  return true;
}

Status BadType(const char* name, int32_t value) {
  return InvalidArgument(std::string(name) + " is " + std::to_string(value) +
                         "; 0 (f32), 1 (f16) or 2 (bf16)");
}

CudaBlockStats FromC(const hw_block_stats& c) {
  return {c.k_mean, c.v_mean, c.k_min, c.k_max, c.k_mean_square, c.v_mean_square, c.k_max_norm, c.v_max_norm};
}

Status BlockStatistics(const hw_block_statistics_args& c, cudaStream_t stream) {
  return CudaBlockStatistics({c.k, c.v, c.total_k, c.num_kv_heads, c.head_dim, c.first_token, FromC(c.stats)},
                             stream);
}

Status MeanTables(const hw_mean_tables_args& c, cudaStream_t stream) {
  return CudaMeanTables({c.k_mean, c.v_mean, c.k_table, c.v_table, c.total_k, c.num_kv_heads, c.head_dim},
                        stream);
}

Status EmbedTokens(const hw_embed_tokens_args& c, cudaStream_t stream) {
  DType dtype{};
  if (!TypeOf(c.out_dtype, &dtype)) return BadType("out_dtype", c.out_dtype);
  return CudaEmbedTokens({c.table, c.ids, c.out, dtype, c.num_tokens, c.vocab, c.width}, stream);
}

Status RmsNorm(const hw_rms_norm_args& c, cudaStream_t stream) {
  DType x{}, weight{};
  if (!TypeOf(c.x_dtype, &x)) return BadType("x_dtype", c.x_dtype);
  if (!TypeOf(c.weight_dtype, &weight)) return BadType("weight_dtype", c.weight_dtype);
  return CudaRmsNorm({c.x, x, c.delta, c.weight, weight, c.out, c.epsilon, c.num_tokens, c.width, c.scale},
                     stream);
}

Status RopeTable(const hw_rope_table_args& c, cudaStream_t stream) {
  CudaRopeTableArgs args;
  if ((c.inverse == nullptr) == (c.inverse_device == nullptr)) {
    return InvalidArgument("one of inverse and inverse_device is wanted");
  }
  if (c.inverse != nullptr && c.head_dim > 0) {
    std::copy_n(c.inverse, std::min(c.head_dim / 2, kMaxRotaryPairs), args.inverse);
  }
  args.inverse_device = c.inverse_device;
  args.attention_factor = c.attention_factor;
  args.head_dim = c.head_dim;
  args.num_tokens = c.num_tokens;
  args.begin = c.begin;
  args.positions_i32 = c.positions_i32;
  args.positions_i64 = c.positions_i64;
  args.cos = c.cos;
  args.sin = c.sin;
  return CudaRopeTable(args, stream);
}

Status SplitQkv(const hw_split_qkv_args& c, cudaStream_t stream) {
  CudaSplitQkvArgs args;
  if (!TypeOf(c.norm_dtype, &args.norm_dtype)) return BadType("norm_dtype", c.norm_dtype);
  args.qkv = c.qkv;
  args.num_tokens = c.num_tokens;
  args.num_q_heads = c.num_q_heads;
  args.num_kv_heads = c.num_kv_heads;
  args.head_dim = c.head_dim;
  args.q_norm = c.q_norm;
  args.k_norm = c.k_norm;
  args.epsilon = c.epsilon;
  args.cos = c.cos;
  args.sin = c.sin;
  args.q = c.q;
  args.k = c.k;
  args.v = c.v;
  args.stats = FromC(c.stats);
  args.first_token = c.first_token;
  return CudaSplitQkv(args, stream);
}

Status SiluMul(const hw_silu_mul_args& c, cudaStream_t stream) {
  return CudaSiluMul({c.gate_up, c.out, c.num_tokens, c.width, c.scale}, stream);
}

Status QuantizeRows(const hw_quantize_rows_args& c, cudaStream_t stream) {
  return CudaQuantizeRows({c.x, c.out, c.scale, c.num_rows, c.width}, stream);
}

Status FirstNonFiniteRow(const hw_first_nonfinite_row_args& c, cudaStream_t stream) {
  DType dtype{};
  if (!TypeOf(c.dtype, &dtype)) return BadType("dtype", c.dtype);
  return CudaFirstNonFiniteRow({c.x, dtype, c.num_tokens, c.width, c.row}, stream);
}

Status PackKv(const hw_pack_kv_args& c, cudaStream_t stream) {
  CudaPackKvArgs args;
  if (!TypeOf(c.wire_dtype, &args.wire_dtype)) return BadType("wire_dtype", c.wire_dtype);
  args.k = c.k;
  args.v = c.v;
  args.num_tokens = c.num_tokens;
  args.num_kv_heads = c.num_kv_heads;
  args.head_dim = c.head_dim;
  args.k_destination = c.k_destination;
  args.v_destination = c.v_destination;
  args.destination_bytes = c.destination_bytes;
  args.runs = reinterpret_cast<const CudaTokenRun*>(c.runs);
  args.num_runs = c.num_runs;
  args.problems = c.problems;
  return CudaPackKv(args, stream);
}

Status RunLinear(CudaLinear* linear, const hw_linear_args& c, cudaStream_t stream) {
  CudaLinearArgs args;
  if (!TypeOf(c.y_dtype, &args.y_dtype)) return BadType("y_dtype", c.y_dtype);
  args.x = c.x;
  args.weight = c.weight;
  args.bias = c.bias;
  args.y = c.y;
  args.accumulate = c.accumulate != 0;
  args.num_tokens = c.num_tokens;
  args.in_features = c.in_features;
  args.out_features = c.out_features;
  args.x_scale = c.x_scale;
  args.weight_scale = c.weight_scale;
  HW_KERNELS_RETURN_IF_ERROR(CudaLinear::Check(args));
  if (linear == nullptr) return InvalidArgument("linear is null");
  return linear->Run(args, stream);
}

Status CreateLinear(const CudaLinearOptions& options, hw_linear** linear) {
  auto made = std::make_unique<hw_linear>();
  HW_KERNELS_RETURN_IF_ERROR(CudaLinear::Create(options, &made->object));
  *linear = made.release();
  return {};
}

template <typename Args>
hw_status Call(const Args* args, void* stream, Status (*call)(const Args&, cudaStream_t)) {
  return WithArgs(args, [&](const Args& c) { return call(c, static_cast<cudaStream_t>(stream)); });
}

}  // namespace

extern "C" {

hw_status hw_block_statistics(const hw_block_statistics_args* args, void* stream) {
  return Call(args, stream, BlockStatistics);
}
hw_status hw_mean_tables(const hw_mean_tables_args* args, void* stream) {
  return Call(args, stream, MeanTables);
}
int64_t hw_mean_table_rows(int64_t total_k) { return CudaMeanTableRows(total_k); }
int64_t hw_mean_table_coarse_row(int64_t total_k) { return CudaMeanTableCoarseRow(total_k); }

hw_status hw_embed_tokens(const hw_embed_tokens_args* args, void* stream) {
  return Call(args, stream, EmbedTokens);
}
hw_status hw_rms_norm(const hw_rms_norm_args* args, void* stream) { return Call(args, stream, RmsNorm); }
hw_status hw_rope_table(const hw_rope_table_args* args, void* stream) {
  return Call(args, stream, RopeTable);
}
hw_status hw_split_qkv(const hw_split_qkv_args* args, void* stream) { return Call(args, stream, SplitQkv); }
hw_status hw_silu_mul(const hw_silu_mul_args* args, void* stream) { return Call(args, stream, SiluMul); }
hw_status hw_quantize_rows(const hw_quantize_rows_args* args, void* stream) {
  return Call(args, stream, QuantizeRows);
}
hw_status hw_first_nonfinite_row(const hw_first_nonfinite_row_args* args, void* stream) {
  return Call(args, stream, FirstNonFiniteRow);
}
hw_status hw_pack_kv(const hw_pack_kv_args* args, void* stream) { return Call(args, stream, PackKv); }

hw_status hw_linear_create(const hw_linear_options* options, hw_linear** linear) {
  if (linear == nullptr) return Guarded([] { return InvalidArgument("linear is null"); });
  *linear = nullptr;
  if (options == nullptr) return Guarded([&] { return CreateLinear({}, linear); });
  return WithArgs(options, [&](const hw_linear_options& c) {
    CudaLinearOptions made;
    made.workspace = c.workspace;
    made.workspace_bytes = c.workspace_bytes;
    if (c.max_plans != 0) made.max_plans = c.max_plans;
    return CreateLinear(made, linear);
  });
}
hw_status hw_linear_run(hw_linear* linear, const hw_linear_args* args, void* stream) {
  return WithArgs(args, [&](const hw_linear_args& c) {
    return RunLinear(linear == nullptr ? nullptr : linear->object.get(), c,
                     static_cast<cudaStream_t>(stream));
  });
}
void hw_linear_destroy(hw_linear* linear) { delete linear; }

}  // extern "C"
