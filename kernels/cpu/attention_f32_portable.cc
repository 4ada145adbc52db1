#define HW_ATTENTION kPortableAttention
#define HW_ATTENTION_ROWS kPortableRowKernels
#define HW_VEC_BYTES 16
#define HW_ROWS 4
#include "kernels/cpu/attention_f32.inc"
