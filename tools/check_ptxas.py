#!/usr/bin/env python3
"""Compiles the project's CUDA files and fails where ptxas gave up on asynchronous matrix instructions.

    check_ptxas.py NVCC FILE.cu...

ptxas reports it as information, not as a warning: C7510 to C7519, wgmma serialised or waits injected; C7508, setmaxnreg
ignored. Each costs a large part of a kernel's speed and none of its results, so that no other test would notice. Spilled
bytes per kernel are printed; a kernel may spill MOST_SPILLS bytes (outside its main loop: its one-thread roles run on 24
registers).
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_SPILLS = 128
GIVEN_UP = re.compile(r"\(C75\d\d\).*")
KERNEL = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores")


def problems(log: str) -> list:
    """What is wrong in ptxas's verbose output; prints each kernel's spills."""
    found, kernel = [], ""
    for line in log.splitlines():
        if match := GIVEN_UP.search(line):
            found.append(match.group(0))
        elif match := KERNEL.search(line):
            kernel = match.group(1)
        elif match := SPILLS.search(line):
            spilled = int(match.group(1))
            print(f"{spilled:4d} bytes spilled  {kernel}")
            if spilled > MOST_SPILLS:
                found.append(f"{kernel} spills {spilled} bytes; at most {MOST_SPILLS}")
    return found


def main() -> int:
    nvcc, *files = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        def compile_one(file: str) -> list:
            done = subprocess.run([nvcc, "-O3", "-std=c++20", f"-I{ROOT}", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v",
                                   "-c", file, "-o", f"{scratch}/{Path(file).stem}.o"], capture_output=True, text=True, cwd=ROOT)
            failed = [f"{file}: {done.stderr.strip()}"] if done.returncode else []
            return failed + [f"{file}: {problem}" for problem in problems(done.stdout + done.stderr)]

        bad = [line for lines in threads.map(compile_one, files) for line in lines]
    print("\n".join(bad) if bad else f"{len(files)} files: nothing serialised")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
