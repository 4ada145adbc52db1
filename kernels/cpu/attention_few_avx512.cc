#define HW_FEW kAvx512Few
#define HW_FEW_ROWS kAvx512RowKernels
#define HW_VEC_BYTES 64
#include "kernels/cpu/attention_few.inc"
