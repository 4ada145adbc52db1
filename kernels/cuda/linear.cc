#include "kernels/cuda/linear.h"

#include <algorithm>
#include <list>
#include <new>
#include <tuple>
#include <utility>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/cuda_status.h"

namespace headwater::kernels {
namespace {

constexpr int64_t kMostFeatures = 1 << 24;
constexpr size_t kMostWorkspace = size_t{1} << 30;
constexpr uint32_t kBestAlignment = 256;  // what cuBLASLt assumes of pointers unless told
constexpr uint32_t kLeastAlignment = 16;

// After a successful CudaLinear::Create().
const CublasLt& Lt() {
  static const CublasLt* const library = [] {
    const CublasLt* loaded = nullptr;
    (void)CublasLt::Load(&loaded);
    return loaded;
  }();
  return *library;
}

Status CublasStatus(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  const StatusCode code = status == CUBLAS_STATUS_ALLOC_FAILED    ? StatusCode::kResourceExhausted
                          : status == CUBLAS_STATUS_NOT_SUPPORTED ? StatusCode::kUnimplemented
                                                                  : StatusCode::kInternal;
  return {code, std::string(call) + ": " + Lt().GetStatusName(status)};
}

#define HW_RETURN_IF_CUBLAS_ERROR(call) HW_KERNELS_RETURN_IF_ERROR(CublasStatus((call), #call))

bool IsFp8(const CudaLinearArgs& a) { return a.x_scale != nullptr; }

Status CheckFeatures(const char* name, int64_t features, int64_t multiple) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange(name, features, 1, kMostFeatures));
  if (features % multiple == 0) return {};
  return InvalidArgument(std::string(name) + " is " + std::to_string(features) + "; a multiple of " +
                         std::to_string(multiple) + " is wanted");
}

std::string Describe(const CudaLinearArgs& a) {
  return std::to_string(a.num_tokens) + " tokens, " + std::to_string(a.in_features) + " to " +
         std::to_string(a.out_features) + " features, " + (IsFp8(a) ? "e4m3" : "bf16") + " to " +
         NameOf(a.y_dtype) + (a.bias != nullptr ? ", with bias" : "") + (a.accumulate ? ", accumulated" : "");
}

uint32_t AlignmentOf(const CudaLinearArgs& a) {
  const auto bits = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.weight) |
                    reinterpret_cast<uintptr_t>(a.bias) | reinterpret_cast<uintptr_t>(a.y);
  return bits % kBestAlignment == 0 ? kBestAlignment : kLeastAlignment;
}

using Key = std::tuple<int64_t, int64_t, int64_t, bool, DType, bool, bool, uint32_t>;

Key KeyOf(const CudaLinearArgs& a) {
  return {a.num_tokens, a.in_features,     a.out_features, IsFp8(a),
          a.y_dtype,    a.bias != nullptr, a.accumulate,   AlignmentOf(a)};
}

// cuBLASLt counts in columns: y^T [out, tokens] = W [out, in] x^T [in, tokens], where a row-major matrix is
// its transpose read by columns. Plain memory: nothing to release.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, x, y;
  cublasLtMatmulAlgo_t algorithm;
};

template <typename T>
Status Set(Plan* plan, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  const cublasStatus_t status =
      Lt().MatmulDescSetAttribute(&plan->operation, attribute, &value, sizeof value);
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  return CublasStatus(status, ("cublasLtMatmulDescSetAttribute " + std::to_string(attribute)).c_str());
}

// Of one call; the rest of a plan serves all of its shape.
Status SetPointers(const CudaLinearArgs& a, Plan* plan) {
  if (a.bias != nullptr) HW_KERNELS_RETURN_IF_ERROR(Set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, a.bias));
  if (!IsFp8(a)) return {};
  HW_KERNELS_RETURN_IF_ERROR(Set(plan, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, a.weight_scale));
  return Set(plan, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, a.x_scale);
}

// A scale for each row of both operands.
Status SetFp8(const CudaLinearArgs& a, bool fast_accumulation, Plan* plan) {
  constexpr auto kPerRow = static_cast<int32_t>(CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
  HW_KERNELS_RETURN_IF_ERROR(Set(plan, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, kPerRow));
  HW_KERNELS_RETURN_IF_ERROR(Set(plan, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, kPerRow));
  HW_KERNELS_RETURN_IF_ERROR(
      Set(plan, CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(fast_accumulation ? 1 : 0)));
  if (a.bias == nullptr) return {};
  return Set(plan, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(CUDA_R_16BF));
}

Status Shape(const CudaLinearArgs& a, bool fast_accumulation, Plan* plan) {
  const cudaDataType_t y_type = a.y_dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
  const cudaDataType_t x_type = IsFp8(a) ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
  const auto in = static_cast<uint64_t>(a.in_features), out = static_cast<uint64_t>(a.out_features);
  const auto tokens = static_cast<uint64_t>(a.num_tokens);
  HW_RETURN_IF_CUBLAS_ERROR(
      Lt().MatmulDescInit_internal(&plan->operation, sizeof plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  HW_KERNELS_RETURN_IF_ERROR(Set(plan, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T));
  // A bias's type is y's unless told otherwise.
  if (a.bias != nullptr) {
    HW_KERNELS_RETURN_IF_ERROR(Set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS));
  }
  if (IsFp8(a)) HW_KERNELS_RETURN_IF_ERROR(SetFp8(a, fast_accumulation, plan));
  HW_KERNELS_RETURN_IF_ERROR(SetPointers(a, plan));
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatrixLayoutInit_internal(&plan->weight, sizeof plan->weight, x_type, in,
                                                           out, static_cast<int64_t>(in)));
  HW_RETURN_IF_CUBLAS_ERROR(
      Lt().MatrixLayoutInit_internal(&plan->x, sizeof plan->x, x_type, in, tokens, static_cast<int64_t>(in)));
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatrixLayoutInit_internal(&plan->y, sizeof plan->y, y_type, out, tokens,
                                                           static_cast<int64_t>(out)));
  return {};
}

Status ChooseAlgorithm(cublasLtHandle_t handle, size_t workspace_bytes, const CudaLinearArgs& a, Plan* plan) {
  cublasLtMatmulPreferenceOpaque_t preference;
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatmulPreferenceInit_internal(&preference, sizeof preference));
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatmulPreferenceSetAttribute(
      &preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes));
  const uint32_t alignment = AlignmentOf(a);
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    HW_RETURN_IF_CUBLAS_ERROR(
        Lt().MatmulPreferenceSetAttribute(&preference, attribute, &alignment, sizeof alignment));
  }
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  const cublasStatus_t status = Lt().MatmulAlgoGetHeuristic(
      handle, &plan->operation, &plan->weight, &plan->x, &plan->y, &plan->y, &preference, 1, &found, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && count == 0)) {
    return {StatusCode::kUnimplemented, "cuBLASLt has no kernel for " + Describe(a)};
  }
  HW_RETURN_IF_CUBLAS_ERROR(status);
  plan->algorithm = found.algo;
  return {};
}

}  // namespace

struct CudaLinear::State {
  cublasLtHandle_t handle = nullptr;
  int device = 0;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  bool owns_workspace = false;
  size_t max_plans = 0;
  bool fast_accumulation = false;
  std::list<std::pair<Key, Plan>> plans;  // last used first

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (owns_workspace) (void)cudaFree(workspace);
    if (handle != nullptr) (void)Lt().Destroy(handle);
  }

  Status Find(const CudaLinearArgs& args, Plan** plan) {
    const Key key = KeyOf(args);
    const auto found =
        std::find_if(plans.begin(), plans.end(), [&](const auto& entry) { return entry.first == key; });
    if (found != plans.end()) {
      plans.splice(plans.begin(), plans, found);
      *plan = &plans.front().second;
      return {};
    }
    Plan made;
    HW_KERNELS_RETURN_IF_ERROR(Shape(args, fast_accumulation, &made));
    HW_KERNELS_RETURN_IF_ERROR(ChooseAlgorithm(handle, workspace_bytes, args, &made));
    try {
      plans.emplace_front(key, made);
    } catch (const std::bad_alloc&) {
      return {StatusCode::kResourceExhausted, "no memory for a linear layer of " + Describe(args)};
    }
    if (plans.size() > max_plans) plans.pop_back();
    *plan = &plans.front().second;
    return {};
  }
};

CudaLinear::CudaLinear(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudaLinear::~CudaLinear() = default;

size_t CudaLinear::workspace_bytes() const { return state_->workspace_bytes; }

Status CudaLinear::Create(const CudaLinearOptions& options, std::unique_ptr<CudaLinear>* linear) {
  if (reinterpret_cast<uintptr_t>(options.workspace) % kBestAlignment != 0) {
    return InvalidArgument("the workspace is not 256-byte aligned");
  }
  if (options.workspace_bytes > kMostWorkspace) {
    return InvalidArgument("workspace_bytes is " + std::to_string(options.workspace_bytes) + "; at most " +
                           std::to_string(kMostWorkspace) + " is wanted");
  }
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("max_plans", options.max_plans, 1, 4096));
  int num_sms = 0;
  HW_KERNELS_RETURN_IF_ERROR(RequireSm90(&num_sms));
  auto state = std::make_unique<State>();
  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaGetDevice(&state->device));
  const CublasLt* library = nullptr;
  HW_KERNELS_RETURN_IF_ERROR(CublasLt::Load(&library));
  HW_RETURN_IF_CUBLAS_ERROR(Lt().Create(&state->handle));
  state->workspace = options.workspace;
  state->workspace_bytes = options.workspace_bytes;
  state->max_plans = static_cast<size_t>(options.max_plans);
  state->fast_accumulation = options.fast_accumulation;
  if (options.workspace == nullptr && options.workspace_bytes > 0) {
    HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMalloc(&state->workspace, options.workspace_bytes));
    state->owns_workspace = true;
  }
  linear->reset(new CudaLinear(std::move(state)));
  return {};
}

Status CudaLinear::Check(const CudaLinearArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 0, INT32_MAX));
  if ((a.x_scale == nullptr) != (a.weight_scale == nullptr)) {
    return InvalidArgument(a.x_scale == nullptr ? "x_scale is null and weight_scale is not"
                                                : "weight_scale is null and x_scale is not");
  }
  const int64_t multiple = IsFp8(a) ? 16 : 8;
  HW_KERNELS_RETURN_IF_ERROR(CheckFeatures("in_features", a.in_features, multiple));
  HW_KERNELS_RETURN_IF_ERROR(CheckFeatures("out_features", a.out_features, multiple));
  if (a.y_dtype != DType::kF32 && a.y_dtype != DType::kBF16) {
    return {StatusCode::kUnimplemented,
            std::string("y_dtype is ") + NameOf(a.y_dtype) + "; bf16 or f32 is known"};
  }
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("x", a.x));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("weight", a.weight));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("bias", a.bias));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("x_scale", a.x_scale));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("weight_scale", a.weight_scale));
  return CheckArray("y", a.y);
}

Status CudaLinear::Run(const CudaLinearArgs& args, cudaStream_t stream) {
  HW_KERNELS_RETURN_IF_ERROR(Check(args));
  if (args.num_tokens == 0) return {};
  int device = 0;
  HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  if (device != state_->device) {
    return InvalidArgument("device " + std::to_string(device) + " is current; device " +
                           std::to_string(state_->device) + " is wanted");
  }
  Plan* plan = nullptr;
  HW_KERNELS_RETURN_IF_ERROR(state_->Find(args, &plan));
  HW_KERNELS_RETURN_IF_ERROR(SetPointers(args, plan));
  const float alpha = 1, beta = args.accumulate ? 1.0f : 0.0f;
  const cublasStatus_t status = Lt().Matmul(
      state_->handle, &plan->operation, &alpha, args.weight, &plan->weight, args.x, &plan->x, &beta, args.y,
      &plan->y, args.y, &plan->y, &plan->algorithm, state_->workspace, state_->workspace_bytes, stream);
  Status result = CublasStatus(status, "cublasLtMatmul");
  return result.ok() ? result : Status(result.code(), result.message() + " for " + Describe(args));
}

}  // namespace headwater::kernels
