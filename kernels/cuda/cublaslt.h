// cuBLASLt, loaded when it is first needed. Linking it would cost every program half a gigabyte of mappings
// and, by its 94 KB of thread-local storage, every small thread stack: glibc takes it from the stack, and
// civetweb's 100 KB are then too few.
#ifndef HW_KERNELS_CUDA_CUBLASLT_H_
#define HW_KERNELS_CUDA_CUBLASLT_H_

#include <cublasLt.h>

#include "kernels/status.h"

namespace headwater::kernels {

// Its functions that are used; each as in cublasLt.h.
struct CublasLt {
  decltype(&cublasLtCreate) Create;
  decltype(&cublasLtDestroy) Destroy;
  decltype(&cublasLtGetStatusName) GetStatusName;
  decltype(&cublasLtMatmul) Matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic;
  decltype(&cublasLtMatmulDescInit_internal) MatmulDescInit_internal;
  decltype(&cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute;
  decltype(&cublasLtMatmulPreferenceInit_internal) MatmulPreferenceInit_internal;
  decltype(&cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute;
  decltype(&cublasLtMatrixLayoutInit_internal) MatrixLayoutInit_internal;

  // The library of the version that this was compiled for, from where the loader looks; stays loaded.
  // Thread-safe. UNIMPLEMENTED with the loader's reason: it is not there, or lacks a function.
  static Status Load(const CublasLt** library);
};

}  // namespace headwater::kernels

#endif  // HW_KERNELS_CUDA_CUBLASLT_H_
