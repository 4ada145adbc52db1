// The product of two rows in double precision, which is most of what the references do.
#ifndef HW_KERNELS_REFERENCE_DOT_H_
#define HW_KERNELS_REFERENCE_DOT_H_

#include <cstdint>

namespace headwater::kernels::reference {

// Sum of x[i] * y[i]: products are exact, sixteen partial sums are added in a fixed order. Equal on every
// machine: the instruction sets differ in width alone.
double Dot(const float* x, const float* y, int64_t count);

// out[row] = Dot(x + row * count, y, count), to the bit, of kDotRows rows of floats that are given as
// doubles: three times as fast.
inline constexpr int64_t kDotRows = 8;
void DotRows(const double* x, const float* y, int64_t count, double* out);

}  // namespace headwater::kernels::reference

#endif  // HW_KERNELS_REFERENCE_DOT_H_
