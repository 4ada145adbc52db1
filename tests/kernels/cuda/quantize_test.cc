// What CudaQuantizeRows refuses before it touches a device: runs without a GPU.
#include "kernels/cuda/quantize.h"

#include "tests/kernels/cuda/refusals.h"

namespace headwater::kernels {
namespace {

Refusal Run(const char* name, void (*change)(CudaQuantizeRowsArgs*), const char* says) {
  CudaQuantizeRowsArgs args{kAligned, kAligned, static_cast<float*>(kAligned), 100, 64};
  change(&args);
  return {name, [args] { return CudaQuantizeRows(args, nullptr); }, StatusCode::kInvalidArgument, says};
}

INSTANTIATE_TEST_SUITE_P(
    Quantize, RefusalTest,
    ::testing::Values(Run(
                          "x", [](auto* a) { a->x = nullptr; }, "x is null"),
                      Run(
                          "out", [](auto* a) { a->out = kMisaligned; }, "out is not 16-byte"),
                      Run(
                          "scale", [](auto* a) { a->scale = nullptr; }, "scale is null"),
                      Run(
                          "rows", [](auto* a) { a->num_rows = int64_t{1} << 31; }, "num_rows is 2147483648"),
                      Run(
                          "negative_rows", [](auto* a) { a->num_rows = -1; }, "num_rows is -1"),
                      Run(
                          "wide", [](auto* a) { a->width = 32776; }, "width is 32776; 1 to 32768"),
                      Run(
                          "width", [](auto* a) { a->width = 60; }, "width is 60; a multiple of 8")),
    [](const auto& test) { return test.param.name; });

TEST(CudaQuantizeRowsTest, NoRowsAreFine) {
  CudaQuantizeRowsArgs args;
  args.width = 64;

  EXPECT_TRUE(CudaQuantizeRows(args, nullptr).ok());
}

}  // namespace
}  // namespace headwater::kernels
