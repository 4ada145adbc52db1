#include "kernels/cuda/cublaslt.h"

#include <string>
#include <type_traits>

#include <dlfcn.h>

namespace headwater::kernels {
namespace {

struct Loaded {
  CublasLt functions{};
  Status status;
};

Loaded LoadLibrary() {
  Loaded loaded;
  const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  const auto find = [&](auto* function, const char* symbol) {
    if (handle != nullptr && loaded.status.ok()) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(handle, symbol));
      if (*function != nullptr) return;
    }
    const char* const why = dlerror();
    if (loaded.status.ok())
      loaded.status = {StatusCode::kUnimplemented, name + ": " + (why != nullptr ? why : symbol)};
  };
  find(&loaded.functions.Create, "cublasLtCreate");
  find(&loaded.functions.Destroy, "cublasLtDestroy");
  find(&loaded.functions.GetStatusName, "cublasLtGetStatusName");
  find(&loaded.functions.Matmul, "cublasLtMatmul");
  find(&loaded.functions.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(&loaded.functions.MatmulDescInit_internal, "cublasLtMatmulDescInit_internal");
  find(&loaded.functions.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
  find(&loaded.functions.MatmulPreferenceInit_internal, "cublasLtMatmulPreferenceInit_internal");
  find(&loaded.functions.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
  find(&loaded.functions.MatrixLayoutInit_internal, "cublasLtMatrixLayoutInit_internal");
  return loaded;
}

}  // namespace

Status CublasLt::Load(const CublasLt** library) {
  static const Loaded loaded = LoadLibrary();
  *library = loaded.status.ok() ? &loaded.functions : nullptr;
  return loaded.status;
}

}  // namespace headwater::kernels
