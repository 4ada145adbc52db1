#!/usr/bin/env python3
"""Writes kernels/cuda/device/wgmma.cuh: typed wrappers of wgmma.mma_async for bf16 operands and f32 accumulators.

    python3 tools/gen_wgmma.py > kernels/cuda/device/wgmma.cuh
"""

HEAD = """// clang-format off
//
// wgmma.mma_async m64nNk16, bf16 x bf16 -> f32 (PTX ISA 9.0, 9.7.15.5). Written by tools/gen_wgmma.py.
//
// d: accumulators of this thread; `accumulate` 0 overwrites them. A: a matrix descriptor (K-major) or four registers.
// B: a descriptor, K-major, or MN-major (the operand lies transposed in shared memory). Descriptors are given by their
// low words (DescriptorLow() of ptx.cuh). High words: 128-byte swizzle, and the distance of 8-row groups; 1024 bytes for A,
// and for B unless said.
#pragma once

#include <cstdint>

namespace headwater::kernels::device {

template <uint32_t kGroupBytes>
inline constexpr uint32_t kDescriptorHighFor = 1u << 30 | kGroupBytes >> 4;
inline constexpr uint32_t kDescriptorHigh = kDescriptorHighFor<1024>;

template <int kN>
struct Wgmma;
"""


def function(n: int, registers: bool, mn_major: bool) -> str:
    count = n // 2
    outs = ", ".join(f"%{i}" for i in range(count))
    if registers:
        name, signature = "Rs", "const uint32_t* a"
        operand, predicate = "{%s}, db" % ", ".join(f"%{count + i}" for i in range(4)), count + 5
        moves = f"mov.b64 db, {{%{count + 4}, %{count + 6}}}; "
        inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate), "r"(b_high)'
        immediates = f"p, 1, 1, {int(mn_major)}"
    else:
        name, signature = "Ss", "uint32_t a"
        operand, predicate = "da, db", count + 2
        moves = f"mov.b64 da, {{%{count}, %{count + 3}}}; mov.b64 db, {{%{count + 1}, %{count + 4}}}; "
        inputs = '"r"(a), "r"(b), "r"(accumulate), "r"(kDescriptorHigh), "r"(b_high)'
        immediates = f"p, 1, 1, 0, {int(mn_major)}"
    bound = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""  static __device__ __forceinline__ void {name}{"MnMajor" if mn_major else "KMajor"}(float (&d)[{count}], {signature}, uint32_t b, int accumulate, uint32_t b_high = kDescriptorHigh) {{
    asm volatile(
        "{{.reg .pred p; .reg .b64 da, db; setp.ne.b32 p, %{predicate}, 0; {moves}\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{outs}}}, {operand}, {immediates};}}\\n"
        : {bound}
        : {inputs});
  }}
"""


def main() -> None:
    print(HEAD)
    for n in (64, 128, 160):
        print(f"template <>\nstruct Wgmma<{n}> {{")
        print(function(n, False, False) + (function(n, True, True) if n <= 128 else ""), end="")
        print("};\n")
    print("}  // namespace headwater::kernels::device")


if __name__ == "__main__":
    main()
