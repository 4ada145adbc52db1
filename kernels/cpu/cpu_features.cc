#include "kernels/cpu/cpu_features.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headwater::kernels::cpu {
namespace {

constexpr int kUnforced = -1;
std::atomic<int> forced_path{kUnforced};

#if defined(__x86_64__)
constexpr bool Has(uint32_t word, int bit) { return ((word >> bit) & 1u) != 0; }

uint64_t Xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only on request.
bool RequestTiles() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

CpuPath Detect() {
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
  uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return CpuPath::kPortable;
  const bool osxsave = Has(c, 27);
  const bool avx2_part = Has(c, 12) && Has(c, 28) && Has(c, 29);  // FMA, AVX, F16C
  if (!osxsave || !avx2_part) return CpuPath::kPortable;
  const uint64_t xcr0 = Xcr0();
  uint32_t b7 = 0;
  uint32_t d7 = 0;
  if ((xcr0 & 0x6) != 0x6 || __get_cpuid_count(7, 0, &a, &b7, &c, &d7) == 0 || !Has(b7, 5)) {
    return CpuPath::kPortable;
  }
  const bool avx512 = Has(b7, 16) && Has(b7, 17) && Has(b7, 30) && Has(b7, 31);  // F, DQ, BW, VL
  if (!avx512 || (xcr0 & 0xe6) != 0xe6) return CpuPath::kAvx2;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || !Has(a, 5)) return CpuPath::kAvx512;
  const bool amx = Has(d7, 22) && Has(d7, 24) && (xcr0 & 0x60000) == 0x60000;
  if (!amx || !RequestTiles()) return CpuPath::kAvx512Bf16;
  return CpuPath::kAmx;
}
#else
CpuPath Detect() { return CpuPath::kPortable; }
#endif

CpuPath BestPath() {
  static const CpuPath best = Detect();
  return best;
}

}  // namespace

const char* NameOf(CpuPath path) {
  switch (path) {
    case CpuPath::kPortable:
      return "portable";
    case CpuPath::kAvx2:
      return "avx2";
    case CpuPath::kAvx512:
      return "avx512";
    case CpuPath::kAvx512Bf16:
      return "avx512_bf16";
    case CpuPath::kAmx:
      return "amx";
  }
  return "unknown";
}

bool IsSupported(CpuPath path) { return path <= BestPath(); }

CpuPath ActivePath() {
  const int forced = forced_path.load(std::memory_order_relaxed);
  return forced == kUnforced ? BestPath() : static_cast<CpuPath>(forced);
}

ScopedCpuPath::ScopedCpuPath(CpuPath path) : previous_(forced_path.exchange(static_cast<int>(path))) {}
ScopedCpuPath::~ScopedCpuPath() { forced_path.store(previous_); }

}  // namespace headwater::kernels::cpu
