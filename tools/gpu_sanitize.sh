#!/usr/bin/env bash
# Runs the GPU tests under compute-sanitizer: memcheck, synccheck, initcheck and racecheck.
#
#   tools/gpu_sanitize.sh [FOLDER]      where the kernels_cuda_*_gpu_test programs lie (default: build/release/tests)
#
# Exit status 1: a report, a failed test, or a tool that ran over its time. Arrays of gigabytes (*Large*) are left out.
# Linear layers launch cuBLASLt's kernels only, which are not ours to mend: racecheck calls the reuse of shared memory in
# its split-K products (nvjet_*_splitK) a hazard, and initcheck the partial sums that cublasLt::splitKreduce_kernel reads,
# which were written by copies that it does not see. For them memcheck and synccheck run.
set -euo pipefail

folder=${1:-build/release/tests}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

check() { # program tool
  local log status=0
  log="$logs/$(basename "$1").$2"
  OMP_NUM_THREADS=4 timeout 600 compute-sanitizer --tool "$2" --error-exitcode 9 --print-limit 5 \
    "$1" --gtest_filter=-*Large* > "$log" 2>&1 || status=$?
  echo "$2 $(basename "$1"): status $status, $(grep -oE 'SUMMARY.*' "$log" | tail -1), $(grep -E '^\[  (PASSED|SKIPPED)' "$log" | head -1)"
  [ "$status" -eq 0 ] || { tail -40 "$log"; return 1; }
}

programs=("$folder"/kernels_cuda_*_gpu_test)
[ -x "${programs[0]}" ] || { echo "no GPU tests in $folder" >&2; exit 1; }
export -f check
export logs
for program in "${programs[@]}"; do
  case $program in
    *_large_gpu_test) continue ;;
    *_linear_gpu_test | *_linear_fp8_gpu_test) printf '%s\n' "$program memcheck" "$program synccheck" ;;
    *) printf '%s\n' "$program racecheck" "$program memcheck" "$program synccheck" "$program initcheck" ;;
  esac
done | xargs -P 8 -L 1 bash -c 'check "$@"' _ || { echo "not clean" >&2; exit 1; }
