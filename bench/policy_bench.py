#!/usr/bin/env python3
"""Times every policy's search and attention beside dense attention, ours and cuDNN's, on the same inputs in one process;
appends rows to bench/results/policies.jsonl (set "speed"), and names the policies that are slower than dense.

    PYTHONPATH=python python3 bench/policy_bench.py [--tokens 1024 2048 ...] [--policy flash:alpha=0.1 ...]

Inputs: bench/structured_qkv.py. A layer is timed as it runs in a prefill: search, lists and attention of layer 5 (flash2's first
four layers are dense) of a prompt that begins with it, so that `share` has no pivots of earlier layers. `search_ms` is that
less attention over the same lists alone. Times are medians by CUDA events after warm-up, engines in turn, twice, the lower
counts. The stream is busy while a call is enqueued: the host's part of it, which a prefill hides, does not count.
"""

import argparse
import datetime
import json
import sys
import uuid
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "python")]

from attention_bench import commit, cudnn  # noqa: E402
from headwater import ops  # noqa: E402
from structured_qkv import gen  # noqa: E402

LAYER, LAYERS = 5, 6
POLICIES = ["a_shape", "flash", "flash2", "flex", "headwater", "probe", "share:pivots_per_layer=1", "skeleton", "vertical_slash",
            "xattention", "xattention:stride=8"]
BUSY_CYCLES = 2_000_000  # 1 ms and more
SLOWER = 1.03  # than dense: what no policy may be


def make(spec: str, a) -> ops.PatternPolicy:
    name, _, rest = spec.partition(":")
    values = {key: float(value) for key, value in (part.split("=") for part in filter(None, rest.split(",")))}
    if a.no_crossover:
        values.setdefault("dense_below_tokens", 0)
    return ops.PatternPolicy(name, values, layers=LAYERS, q_heads=a.q_heads, kv_heads=a.kv_heads, head_dim=a.head_dim)


def queued_ms(run, repeats: int) -> float:
    """Median of what the stream takes for run()."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def in_turn(engines: dict, n: int) -> dict:
    rounds = [{name: queued_ms(run, 9 if n <= 65536 else 3) for name, run in engines.items()} for _ in range(2)]
    return {name: min(times[name] for times in rounds) for name in engines}


def measure(n: int, specs: list, a, failed: list):
    """Yields (spec, metrics, peers) of one length; what did not run joins `failed`."""
    q, k, v = gen(n, a.q_heads, a.kv_heads, a.head_dim, seed=a.seed)
    out = torch.empty_like(q)
    dense = {"headwater": lambda: ops.prefill_attention(q, k, v, out=out), "cudnn": lambda: cudnn(q, k, v)}
    for spec in specs:
        policy = make(spec, a)

        def run(policy=policy):
            policy.begin(n)  # a prompt's state goes; copies nothing
            return policy.attention(LAYER, q, k, v, out=out)

        try:
            found = run()[1]
        except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
            print(f"{n:8d} {spec}: {type(error).__name__}: {error}", flush=True)
            failed.append(f"{spec} at {n} tokens did not run")
            continue
        engines = {"policy": run, **dense}
        if found.index is not None:
            index = found.index
            engines["lists"] = lambda: ops.prefill_attention(q, k, v, index=index, out=out)
        times = in_turn(engines, n)
        metrics = {"ms": times["policy"], "density": found.density(), "overflows": found.overflows(),
                   "speedup": times["headwater"] / times["policy"]}
        if "lists" in times:
            metrics["search_ms"] = times["policy"] - times["lists"]
        peers = {"headwater_dense": {"ms": times["headwater"]}, "cudnn": {"ms": times["cudnn"]}}
        print(f"{n:8d} {spec:26s} {metrics['ms']:9.3f} ms  search {metrics.get('search_ms', 0):8.3f}  density "
              f"{metrics['density']:.4f}  dense {times['headwater']:9.3f} ms ({metrics['speedup']:.2f}x)  cudnn "
              f"{times['cudnn']:9.3f} ms", flush=True)
        yield spec, metrics, peers
        del policy, found, engines, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**power for power in range(10, 18)])
    parser.add_argument("--policy", nargs="+", default=POLICIES)
    parser.add_argument("--q_heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_crossover", action="store_true",
                        help="short prompts are searched too: shows where dense_below_tokens of kernels/pattern/parameters.cc belongs")
    parser.add_argument("--commit", default="", help="recorded in the rows, where this is no git checkout")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "policies.jsonl")
    a = parser.parse_args()
    run, revision, slow = uuid.uuid4().hex[:12], a.commit or commit(), []
    a.output.parent.mkdir(parents=True, exist_ok=True)
    for n in a.tokens:
        for spec, metrics, peers in measure(n, a.policy, a, slow):
            name, _, values = spec.partition(":")
            row = {"bench": "policies", "device": torch.cuda.get_device_name(), "commit": revision,
                   "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                   "params": {"tokens": n, "q_heads": a.q_heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "policy": name,
                              "parameters": values, "set": "crossover" if a.no_crossover else "speed", "inputs": "structured", "run": run},
                   "metrics": {key: float(f"{value:.5g}") for key, value in metrics.items()},
                   "peers": {name: {key: float(f"{value:.5g}") for key, value in of.items()} for name, of in peers.items()}}
            with open(a.output, "a", encoding="utf-8") as output:
                output.write(json.dumps(row) + "\n")
            if metrics["ms"] > SLOWER * peers["headwater_dense"]["ms"]:
                slow.append(f"{spec} at {n} tokens: {1 / metrics['speedup']:.2f} times dense")
    print("\n".join(slow) if slow else f"none is slower than dense by more than {SLOWER - 1:.0%}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
