#define HW_ROW_KERNELS kAvx2RowKernels
#include "kernels/cpu/row_kernels.inc"
