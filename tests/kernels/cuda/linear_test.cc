// What CudaLinear refuses before it touches a device: runs without a GPU.
#include "kernels/cuda/linear.h"

#include "kernels/cuda/cublaslt.h"
#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

void Scale(CudaLinearArgs* args) { args->x_scale = args->weight_scale = static_cast<const float*>(kAligned); }

Refusal Run(const char* name, void (*change)(CudaLinearArgs*), const char* says,
            StatusCode code = StatusCode::kInvalidArgument) {
  CudaLinearArgs args;
  args.x = args.weight = args.y = kAligned;
  args.num_tokens = 100;
  args.in_features = 64;
  args.out_features = 128;
  change(&args);
  return {name, [args] { return CudaLinear::Check(args); }, code, says};
}

Refusal Options(const char* name, void (*change)(CudaLinearOptions*), const char* says) {
  CudaLinearOptions options;
  change(&options);
  return {name,
          [options] {
            std::unique_ptr<CudaLinear> linear;
            return CudaLinear::Create(options, &linear);
          },
          StatusCode::kInvalidArgument, says};
}

INSTANTIATE_TEST_SUITE_P(
    Linear, RefusalTest,
    ::testing::Values(
        Run(
            "null_x", [](auto* a) { a->x = nullptr; }, "x is null"),
        Run(
            "null_weight", [](auto* a) { a->weight = nullptr; }, "weight is null"),
        Run(
            "null_y", [](auto* a) { a->y = nullptr; }, "y is null"),
        Run(
            "misaligned_x", [](auto* a) { a->x = kMisaligned; }, "x is not 16-byte"),
        Run(
            "misaligned_bias", [](auto* a) { a->bias = kMisaligned; }, "bias is not 16-byte"),
        Run(
            "tokens", [](auto* a) { a->num_tokens = int64_t{1} << 31; }, "num_tokens is 2147483648"),
        Run(
            "negative_tokens", [](auto* a) { a->num_tokens = -1; }, "num_tokens is -1"),
        Run(
            "in_features", [](auto* a) { a->in_features = 60; }, "in_features is 60; a multiple of 8"),
        Run(
            "no_features", [](auto* a) { a->out_features = 0; }, "out_features is 0; 1 to 16777216"),
        Run(
            "one_scale", [](auto* a) { a->x_scale = static_cast<const float*>(kAligned); },
            "weight_scale is null and x_scale is not"),
        Run(
            "other_scale", [](auto* a) { a->weight_scale = static_cast<const float*>(kAligned); },
            "x_scale is null and weight_scale is not"),
        Run(
            "misaligned_scale",
            [](auto* a) { Scale(a), a->x_scale = static_cast<const float*>(kMisaligned); },
            "x_scale is not 16-byte"),
        Run(
            "fp8_in_features", [](auto* a) { Scale(a), a->in_features = 72; },
            "in_features is 72; a multiple of 16"),
        Run(
            "fp8_out_features", [](auto* a) { Scale(a), a->out_features = 136; },
            "out_features is 136; a multiple of 16"),
        Run(
            "type", [](auto* a) { a->y_dtype = DType::kF16; }, "y_dtype is f16", StatusCode::kUnimplemented),
        Options(
            "workspace", [](auto* o) { o->workspace = kMisaligned; }, "256-byte"),
        Options(
            "workspace_bytes", [](auto* o) { o->workspace_bytes = size_t{2} << 30; }, "at most 1073741824"),
        Options(
            "no_plans", [](auto* o) { o->max_plans = 0; }, "max_plans is 0; 1 to 4096")),
    [](const auto& test) { return test.param.name; });

TEST(CudaLinearTest, NoTokensAreFine) {
  CudaLinearArgs args;
  args.in_features = args.out_features = 64;

  EXPECT_TRUE(CudaLinear::Check(args).ok());
}

TEST(CublasLtTest, LoadsWhereTheToolkitIs) {
  const CublasLt* library = nullptr;

  const Status status = CublasLt::Load(&library);

  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_STREQ(library->GetStatusName(CUBLAS_STATUS_NOT_SUPPORTED), "CUBLAS_STATUS_NOT_SUPPORTED");
}

}  // namespace
}  // namespace headwater::kernels
