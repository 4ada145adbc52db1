#!/usr/bin/env python3
"""Times prefill of Llama-3-8B's shape on one GPU beside its floor and transformers, in one run; appends rows to
bench/results/prefill.jsonl.

    cmake --preset release -DHW_CUDA=ON && cmake --build --preset release --target headwater-bench-prefill
    python3 bench/prefill_bench.py [--cases dense peer ...] [--dry_run]

Cases: dense (policy dense at --dense_tokens), peer (the same at --peer_tokens, and transformers), sparse_bf16 and
sparse_fp8 (policy probe forced to --density at --sparse_tokens, every KV block checked by a receiver). First cuDNN's dense
attention is timed at the cases' lengths, or at --cudnn_up_to where they are longer: attention's part of the floor is what it
executes at that rate. Each program runs in a process of its own, so that the GPU is another's when it has ended, and at most
--limit_s. bench/prefill_peers.py (torch, transformers) does what is not Headwater.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "prefill.jsonl"
PEERS = ROOT / "bench" / "prefill_peers.py"
PRESET = "llama-3-8b"  # prefill_peers.py has its shape


class BenchError(Exception):
    pass


@dataclasses.dataclass
class Case:
    name: str
    tokens: int
    flags: list
    peer: bool = False


def dense(arguments) -> list:
    return [Case("dense", n, ["--policy=dense", "--sink=none"]) for n in arguments.dense_tokens]


def peer(arguments) -> list:
    return [Case("peer", n, ["--policy=dense", "--sink=none"], peer=True) for n in arguments.peer_tokens]


def sparse(linear: str):
    def cases(arguments) -> list:
        flags = ["--policy=probe", f"--density={arguments.density}", "--sink=verify", f"--linear={linear}"]
        return [Case(f"sparse_{linear}", n, flags) for n in arguments.sparse_tokens]
    return cases


CASES = {"dense": dense, "peer": peer, "sparse_bf16": sparse("bf16"), "sparse_fp8": sparse("fp8")}


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments
        self.commit = arguments.commit or git_commit()
        self.rates = {}  # cuDNN's TFLOP/s by length

    def json_of(self, command: list) -> list:
        """Runs a program, showing what it says; returns the objects of its JSON lines. [] in a dry run."""
        words = [str(word) for word in command]
        print("$ " + " ".join(words), flush=True)
        if self.arguments.dry_run:
            return []
        start = time.monotonic()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=self.arguments.limit_s)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{words[0]} took more than --limit_s={self.arguments.limit_s:g}") from error
        except OSError as error:
            raise BenchError(str(error)) from error
        if done.returncode != 0:
            raise BenchError(f"{words[0]} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not rows:
            raise BenchError(f"{words[0]} printed no row: {done.stdout[-500:]}")
        print(f"  {time.monotonic() - start:.1f} s", flush=True)
        return rows

    def attention_length(self, case: Case) -> int:
        return min(case.tokens, self.arguments.cudnn_up_to)

    def measure_cudnn(self, cases: list) -> None:
        lengths = sorted({self.attention_length(case) for case in cases})
        if self.arguments.attention_tflops:
            self.rates = {n: self.arguments.attention_tflops for n in lengths}
            return
        for row in self.json_of([self.arguments.python, PEERS, "cudnn", "--tokens", *lengths]):
            self.rates[row["tokens"]] = row["tflops"]
            print(f"  cuDNN, {row['tokens']} tokens: {row['ms']:.2f} ms, {row['tflops']:.0f} TFLOP/s", flush=True)

    def run(self, case: Case) -> None:
        peers = {}
        if case.peer:
            for result in self.json_of([self.arguments.python, PEERS, "transformers", "--tokens", case.tokens]):
                peers["transformers"] = {key: value for key, value in result.items() if key != "tokens"}
        rate = self.rates.get(self.attention_length(case))
        command = [self.arguments.program, "--json", f"--preset={PRESET}", f"--tokens={case.tokens}", *case.flags,
                   f"--repeat={self.arguments.repeat}", f"--commit={self.commit}",
                   f"--attention_tflops={'RATE' if rate is None else format(rate, '.6g')}"]
        for row in self.json_of(command):
            if not self.arguments.attention_tflops:
                peers["cudnn"] = {"tokens": self.attention_length(case), "tflops": round(rate, 2)}
            row["peers"] = peers
            self.arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with open(self.arguments.output, "a", encoding="utf-8") as output:
                output.write(json.dumps(row) + "\n")
            show(case, row)


def show(case: Case, row: dict) -> None:
    metrics = row["metrics"]
    floor = metrics.get("floor_s")
    text = (f"{case.name:12s} {case.tokens:8d} tokens  first token {metrics['ttft_s']:.3f} s  density {metrics['density']:.4f}  "
            f"{metrics['tflops_per_gpu']:.0f} TFLOP/s  peak {metrics['peak_device_bytes'] / 2**30:.1f} GiB")
    if floor:
        text += f"  floor {floor:.3f} s ({100 * floor / metrics['ttft_s']:.1f} %)"
    if "kv_acked_s" in metrics:
        text += f"  KV acknowledged {metrics['kv_acked_s']:.3f} s"
    if "transformers" in row["peers"]:
        theirs = row["peers"]["transformers"]["ttft_s"]
        text += f"  transformers {theirs:.3f} s ({theirs / metrics['ttft_s']:.2f}x)"
    print(text, flush=True)


def git_commit() -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip()
    except OSError:
        return ""


def parse(words: list):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--dense_tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--peer_tokens", type=int, nargs="+", default=[65536])
    parser.add_argument("--sparse_tokens", type=int, nargs="+", default=[1048576])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--cudnn_up_to", type=int, default=131072, help="longest sequence that cuDNN is timed on")
    parser.add_argument("--attention_tflops", type=float, help="cuDNN's rate, in place of measuring it")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit_s", type=float, default=300, help="for each program")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "release" / "bin" / "headwater-bench-prefill")
    parser.add_argument("--python", default=sys.executable, help="one that has torch and transformers")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the commands and run none")
    return parser.parse_args(words)


def main(words: list) -> int:
    arguments = parse(words)
    bench = Bench(arguments)
    cases = [case for name in arguments.cases for case in CASES[name](arguments)]
    failed = []
    try:
        bench.measure_cudnn(cases)
    except BenchError as error:
        print(f"prefill_bench: cuDNN: {error}", file=sys.stderr)
        return 1
    for case in cases:
        try:
            bench.run(case)
        except BenchError as error:
            print(f"prefill_bench: {case.name}, {case.tokens} tokens: {error}", file=sys.stderr, flush=True)
            failed.append(f"{case.name} at {case.tokens}")
    if failed:
        print(f"prefill_bench: no row of {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
