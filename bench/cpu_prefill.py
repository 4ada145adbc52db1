#!/usr/bin/env python3
"""Sets Headwater's CPU prefill beside llama.cpp's, on the same weights, in one run; appends rows to bench/results/.

    cmake --preset release && cmake --build --preset release --target headwater-bench-prefill
    python3 -m venv .venv-bench
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON" .venv-bench/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0
    .venv-bench/bin/python bench/cpu_prefill.py --model .cache/smollm2-135m-instruct-bf16

llama.cpp is timed in every combination of weights (f16, bf16), flash attention (on, off) and n_ubatch (512, 2048), and
its fastest one counts. The two programs take turns: in each round every llama.cpp combination is preceded by a run of
ours, and medians over the rounds are compared.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu_prefill.jsonl"
RUN_TIMEOUT_S = 900


class BenchError(Exception):
    pass


def run_json(command: list, stdin: str = "") -> list:
    """Runs a program; returns the objects of its JSON lines."""
    try:
        done = subprocess.run([str(part) for part in command], input=stdin, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(str(error)) from error
    if done.returncode != 0:
        raise BenchError(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def ours(arguments, tokens: int) -> dict:
    command = [arguments.bench, "--json", "--device=cpu", "--model", arguments.model, "--tokens", tokens,
               "--threads", arguments.threads, "--repeat", arguments.repeat]
    result = run_json(command)[-1]
    return {"tokens_per_s": result["metrics"]["tokens_per_s"], "compute": result["params"]["linear"],
            "peak_rss_bytes": result["metrics"]["peak_device_bytes"]}


def llama_cpp(arguments, run: dict) -> dict:
    command = [sys.executable, ROOT / "tools" / "llama_cpp_bench.py", "--model", arguments.model, "--cache", arguments.cache]
    return run_json(command, json.dumps([run]))[0]


def combinations(arguments, tokens: int) -> list:
    sizes = [size for size in (512, 2048) if size == 512 or size <= max(tokens, 512)]
    return [{"tokens": tokens, "threads": arguments.threads, "weights": weights, "flash_attn": flash_attn,
             "n_ubatch": n_ubatch, "repeat": arguments.repeat}
            for weights, flash_attn, n_ubatch in itertools.product(("f16", "bf16"), (True, False), sizes)]


def measure(arguments, tokens: int) -> tuple:
    """Returns (our runs, llama.cpp's runs by combination)."""
    mine, theirs = [], {}
    for round_number in range(1, arguments.rounds + 1):
        for run in combinations(arguments, tokens):
            mine.append(ours(arguments, tokens))
            result = llama_cpp(arguments, run)
            theirs.setdefault((run["weights"], run["flash_attn"], run["n_ubatch"]), []).append(result)
            print(f"  {tokens} tokens, round {round_number}: headwater {mine[-1]['tokens_per_s']:.0f}, llama.cpp "
                  f"{result['tokens_per_s']:.0f} tokens/s ({run['weights']}, flash attention "
                  f"{'on' if run['flash_attn'] else 'off'}, n_ubatch {run['n_ubatch']})", flush=True)
    return mine, theirs


def median(runs: list, field: str) -> float:
    return statistics.median(run[field] for run in runs)


def row(arguments, tokens: int, mine: list, theirs: dict) -> dict:
    best = max(theirs, key=lambda key: median(theirs[key], "tokens_per_s"))
    return {
        "bench": "cpu_prefill",
        "device": device_name(),
        "commit": arguments.commit,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "params": {"model": arguments.model.name, "tokens": tokens, "threads": arguments.threads, "policy": "dense",
                   "compute": mine[0]["compute"], "rounds": arguments.rounds},
        "metrics": {"tokens_per_s": round(median(mine, "tokens_per_s"), 2),
                    "peak_rss_bytes": max(run["peak_rss_bytes"] for run in mine)},
        "peers": {"llama_cpp": {
            "tokens_per_s": round(median(theirs[best], "tokens_per_s"), 2),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in theirs[best]),
            "version": theirs[best][0]["version"], "weights": best[0], "flash_attn": best[1], "n_ubatch": best[2]}},
    }


def device_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} CPUs"
    return platform.processor()


def commit() -> str:
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--bench", type=Path, default=ROOT / "build" / "release" / "bin" / "headwater-bench-prefill")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3, help="timed prefills a run, after one that warms up")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where GGUF files are kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        arguments.commit = commit()  # once: the rows written below change a tracked file
        for tokens in arguments.tokens:
            result = row(arguments, tokens, *measure(arguments, tokens))
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with open(arguments.output, "a", encoding="utf-8") as output:
                output.write(json.dumps(result) + "\n")
            peer = result["peers"]["llama_cpp"]["tokens_per_s"]
            print(f"{tokens} tokens: headwater {result['metrics']['tokens_per_s']:.0f}, llama.cpp {peer:.0f} tokens/s, "
                  f"ratio {result['metrics']['tokens_per_s'] / peer:.2f}", flush=True)
    except BenchError as error:
        print(f"cpu_prefill: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
