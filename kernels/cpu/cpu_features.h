// Which instruction sets the CPU kernels use. Internal to kernels/ and its tests.
#ifndef HW_KERNELS_CPU_CPU_FEATURES_H_
#define HW_KERNELS_CPU_CPU_FEATURES_H_

namespace headwater::kernels::cpu {

// In rising order; each includes the ones before it.
enum class CpuPath {
  kPortable,    // what the compiler's baseline has (x86-64: SSE2)
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // and AVX512-BF16
  kAmx,         // and AMX-TILE, AMX-BF16, with the kernel's permission to use tiles
};

const char* NameOf(CpuPath path);

// True if this build, this CPU and this operating system can run `path`. The first call asks Linux for the
// use of AMX tiles, which holds for the whole process.
bool IsSupported(CpuPath path);

// The path that kernels take: the highest supported one, unless a ScopedCpuPath says otherwise.
CpuPath ActivePath();

// For tests: forces `path`, which must be supported, on the whole process during its lifetime.
class ScopedCpuPath {
 public:
  explicit ScopedCpuPath(CpuPath path);
  ~ScopedCpuPath();
  ScopedCpuPath(const ScopedCpuPath&) = delete;
  ScopedCpuPath& operator=(const ScopedCpuPath&) = delete;

 private:
  int previous_;
};

}  // namespace headwater::kernels::cpu

#endif  // HW_KERNELS_CPU_CPU_FEATURES_H_
