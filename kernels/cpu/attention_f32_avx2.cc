#define HW_ATTENTION kAvx2Attention
#define HW_ATTENTION_ROWS kAvx2RowKernels
#define HW_VEC_BYTES 32
#define HW_ROWS 4
#include "kernels/cpu/attention_f32.inc"
