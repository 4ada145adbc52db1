#define HW_ATTENTION kAvx512Attention
#define HW_ATTENTION_ROWS kAvx512RowKernels
#define HW_VEC_BYTES 64
#define HW_ROWS 8
#include "kernels/cpu/attention_f32.inc"
