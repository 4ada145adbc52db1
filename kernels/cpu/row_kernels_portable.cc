#define HW_ROW_KERNELS kPortableRowKernels
#include "kernels/cpu/row_kernels.inc"
