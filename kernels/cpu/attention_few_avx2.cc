#define HW_FEW kAvx2Few
#define HW_FEW_ROWS kAvx2RowKernels
#define HW_VEC_BYTES 32
#include "kernels/cpu/attention_few.inc"
