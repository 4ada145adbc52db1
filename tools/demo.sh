#!/usr/bin/env bash
# make demo: what is needed, then tools/demo.py. MODEL, PROMPT, QUESTION, WORKERS and TLS come from the environment.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
steps=8
step() { printf '[%s/%s] %s\n' "$1" "$steps" "$2"; }

step 1 "Debian packages"
bash tools/deps.sh --build
step 2 "Python environment"
bash tools/venv.sh
step 3 "Build the four programs (preset release)"
cuda=OFF
gpus=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || gpus=
case $gpus in
  "") ;;
  *9.0*) cuda=AUTO ;;
  *) echo "    the GPUs here are of compute capability" $gpus "and not 9.0: workers compute on the CPU" ;;
esac
mkdir -p .demo
if ! cmake --preset release -DHW_CUDA=$cuda -DBUILD_TESTING=OFF >.demo/configure.log 2>&1; then
  tail -n 30 .demo/configure.log >&2
  echo "the configuration failed; all of its output is in .demo/configure.log" >&2
  exit 1
fi
cmake --build --preset release --target headwater-coordinator headwater-worker headwater-decode headwater

arguments=(--first_step=4 --steps=$steps)
[ -z "${MODEL:-}" ] || arguments+=("--model=$MODEL")
[ -z "${PROMPT:-}" ] || arguments+=("--prompt=$PROMPT")
[ -z "${QUESTION:-}" ] || arguments+=("--question=$QUESTION")
[ -z "${WORKERS:-}" ] || arguments+=("--workers=$WORKERS")
[ -z "${TLS:-}" ] || arguments+=(--tls)
if [ "$cuda" = AUTO ]; then
  if grep -q '^CMAKE_CUDA_COMPILER:[A-Z]*=/' build/release/CMakeCache.txt; then
    arguments+=(--device=cuda)
  else
    echo "    there is a GPU, but no nvcc to build for it: workers compute on the CPU"
  fi
fi
exec .venv/bin/python tools/demo.py "${arguments[@]}"
