#!/usr/bin/env bash
# make test: packages, Python environment, demo model, configure, build, ctest without the slow tests.
# make test-full (--full): slow tests too, fault tests 20 times, then the asan and tsan builds.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
full=no
[ "${1:-}" = --full ] && full=yes
jobs=${JOBS:-$(nproc)}
steps=6
[ $full = yes ] && steps=8

step() { printf '\n[%s/%s] %s\n' "$1" "$steps" "$2"; }

cuda=${HW_CUDA:-OFF}
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then cuda=AUTO; fi

step 1 "Debian packages"
bash tools/deps.sh
step 2 "Python environment"
bash tools/venv.sh
step 3 "Model of the demo and of its tests"
if ! .venv/bin/python tools/fetch_model.py; then
  echo "The model is not here: the tests that need it will be skipped."
fi
step 4 "Configure (preset dev, CUDA $cuda)"
cmake --preset dev -DHW_CUDA=$cuda
step 5 "Build"
cmake --build --preset dev -j "$jobs"
step 6 "Tests"
if [ $full = no ]; then
  exec python3 tools/run_ctest.py --preset dev -j "$jobs" -LE slow
fi

export HW_FAULT_RUNS=${HW_FAULT_RUNS:-20}
python3 tools/run_ctest.py --preset dev -j "$jobs"
number=7
for preset in asan tsan; do
  step $number "Tests of the $preset build"
  cmake --preset $preset
  cmake --build --preset $preset -j "$jobs"
  # Fault tests are repeated in the plain build; the sanitizers see each once. The demo is too slow for them.
  HW_FAULT_RUNS=1 python3 tools/run_ctest.py --preset $preset -j "$jobs" -LE 'slow|tools|demo'
  number=$((number + 1))
done
