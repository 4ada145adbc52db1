#!/usr/bin/env bash
# clang-tidy over the host sources of build/dev (or the files named), then layering and protos. Device code is left out:
# clang-tidy 14 cannot read CUDA 13's headers.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 tools/check_layering.py
bash tools/python.sh tools/lint_protos.py || [ $? -eq 77 ]
tidy=$(command -v clang-tidy-14 || command -v clang-tidy || true)
[ -n "$tidy" ] || { echo "clang-tidy is not installed (apt-get install clang-tidy-14)"; exit 1; }
[ -f build/dev/compile_commands.json ] || cmake --preset dev -DHW_CUDA=OFF
files=("$@")
[ ${#files[@]} -gt 0 ] || mapfile -t files < <(git ls-files '*.cc' | grep -v '_gpu_test.cc$')
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" "$tidy" -p build/dev --quiet
