#define HW_FEW kPortableFew
#define HW_FEW_ROWS kPortableRowKernels
#define HW_VEC_BYTES 16
#include "kernels/cpu/attention_few.inc"
