#define HW_ROW_KERNELS kAvx512RowKernels
#include "kernels/cpu/row_kernels.inc"
