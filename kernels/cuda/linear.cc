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

Status CheckFeatures(const char* name, int64_t features) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange(name, features, 1, kMostFeatures));
  if (features % 8 == 0) return {};
  return InvalidArgument(std::string(name) + " is " + std::to_string(features) +
                         "; a multiple of 8 is wanted");
}

std::string Describe(const CudaLinearArgs& a) {
  return std::to_string(a.num_tokens) + " tokens, " + std::to_string(a.in_features) + " to " +
         std::to_string(a.out_features) + " features, " + NameOf(a.y_dtype);
}

uint32_t AlignmentOf(const CudaLinearArgs& a) {
  const auto bits = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.weight) |
                    reinterpret_cast<uintptr_t>(a.bias) | reinterpret_cast<uintptr_t>(a.y);
  return bits % kBestAlignment == 0 ? kBestAlignment : kLeastAlignment;
}

using Key = std::tuple<int64_t, int64_t, int64_t, DType, bool, bool, uint32_t>;

Key KeyOf(const CudaLinearArgs& a) {
  return {a.num_tokens,      a.in_features, a.out_features, a.y_dtype,
          a.bias != nullptr, a.accumulate,  AlignmentOf(a)};
}

// cuBLASLt counts in columns: y^T [out, tokens] = W [out, in] x^T [in, tokens], where a row-major matrix is
// its transpose read by columns. Plain memory: nothing to release.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, x, y;
  cublasLtMatmulAlgo_t algorithm;
};

Status Shape(const CudaLinearArgs& a, Plan* plan) {
  const cudaDataType_t y_type = a.y_dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
  const auto in = static_cast<uint64_t>(a.in_features), out = static_cast<uint64_t>(a.out_features);
  const auto tokens = static_cast<uint64_t>(a.num_tokens);
  HW_RETURN_IF_CUBLAS_ERROR(
      Lt().MatmulDescInit_internal(&plan->operation, sizeof plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatmulDescSetAttribute(&plan->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                        &transpose, sizeof transpose));
  if (a.bias != nullptr) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    HW_RETURN_IF_CUBLAS_ERROR(Lt().MatmulDescSetAttribute(&plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
                                                          &epilogue, sizeof epilogue));
    // Its type is y's unless told otherwise.
    HW_RETURN_IF_CUBLAS_ERROR(Lt().MatmulDescSetAttribute(&plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                          &a.bias, sizeof a.bias));
  }
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatrixLayoutInit_internal(&plan->weight, sizeof plan->weight, CUDA_R_16BF,
                                                           in, out, static_cast<int64_t>(in)));
  HW_RETURN_IF_CUBLAS_ERROR(Lt().MatrixLayoutInit_internal(&plan->x, sizeof plan->x, CUDA_R_16BF, in, tokens,
                                                           static_cast<int64_t>(in)));
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
    HW_KERNELS_RETURN_IF_ERROR(Shape(args, &made));
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
  if (options.workspace == nullptr && options.workspace_bytes > 0) {
    HW_KERNELS_RETURN_IF_CUDA_ERROR(cudaMalloc(&state->workspace, options.workspace_bytes));
    state->owns_workspace = true;
  }
  linear->reset(new CudaLinear(std::move(state)));
  return {};
}

Status CudaLinear::Check(const CudaLinearArgs& a) {
  HW_KERNELS_RETURN_IF_ERROR(CheckRange("num_tokens", a.num_tokens, 0, INT32_MAX));
  HW_KERNELS_RETURN_IF_ERROR(CheckFeatures("in_features", a.in_features));
  HW_KERNELS_RETURN_IF_ERROR(CheckFeatures("out_features", a.out_features));
  if (a.y_dtype != DType::kF32 && a.y_dtype != DType::kBF16) {
    return {StatusCode::kUnimplemented,
            std::string("y_dtype is ") + NameOf(a.y_dtype) + "; bf16 or f32 is known"};
  }
  if (a.num_tokens == 0) return {};
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("x", a.x));
  HW_KERNELS_RETURN_IF_ERROR(CheckArray("weight", a.weight));
  HW_KERNELS_RETURN_IF_ERROR(CheckOptionalArray("bias", a.bias));
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
  if (args.bias != nullptr) {
    HW_RETURN_IF_CUBLAS_ERROR(Lt().MatmulDescSetAttribute(&plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                          &args.bias, sizeof args.bias));
  }
  const float alpha = 1, beta = args.accumulate ? 1.0f : 0.0f;
  const cublasStatus_t status = Lt().Matmul(
      state_->handle, &plan->operation, &alpha, args.weight, &plan->weight, args.x, &plan->x, &beta, args.y,
      &plan->y, args.y, &plan->y, &plan->algorithm, state_->workspace, state_->workspace_bytes, stream);
  Status result = CublasStatus(status, "cublasLtMatmul");
  return result.ok() ? result : Status(result.code(), result.message() + " for " + Describe(args));
}

}  // namespace headwater::kernels
