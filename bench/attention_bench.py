#!/usr/bin/env python3
"""Times Headwater's GPU attention and pattern search beside cuDNN, FlashAttention-3 and FlashPrefill V2, and checks all of
them on the same inputs, in one process; appends rows to bench/results/attention.jsonl.

    cmake --preset release -DHW_CUDA=ON -DHW_SERVICE=OFF -DHW_CPU_KERNELS=OFF
    cmake --build --preset release --target headwater_kernels
    PYTHONPATH=python python3 bench/attention_bench.py [--tokens 4096 16384 ...]

cuDNN comes with torch. FA3 (flash_attn_3: Dao-AILab/flash-attention, hopper/) and V2 (flashprefill: qhfan/FlashPrefillv2,
built in place) are timed where PYTHONPATH has them; what is missing is said. V2 runs at alpha 0.18, sink 2, window 4, last
8 tiles dense, page size = the sequence.

Times are medians of 7 (above 64K tokens 3, above 256K 1) by CUDA events after warm-up; the engines take turns, twice, and
the lower of the two counts. Error and recall are of 64 rows per query head,
drawn after timing, against softmax in f32 of exact scores: rel_error over all rows; recall is the softmax mass on listed
keys, its mean and 1st percentile per head, averaged over the heads. Active FLOP: 4 * head_dim * rows * listed keys.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import uuid
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "python")]

from headwater import ops  # noqa: E402
from structured_qkv import gen, t  # noqa: E402

ROWS_PER_HEAD = 64
V2 = dict(k_block_m=128, k_block_n=128, abs_threshold=0.18, attention_sink=2, window_size=4, last_n_blocks=8)


class Peers:
    """What is there to compare with."""

    def __init__(self):
        self.fa3 = self.v2 = None
        try:
            from flash_attn_3.flash_attn_interface import flash_attn_func
            self.fa3 = flash_attn_func
        except ImportError as error:
            print(f"FlashAttention-3 is not here ({error})")
        try:
            from flashprefill.prefill import FlashPrefill
            self.v2 = FlashPrefill
        except ImportError as error:
            print(f"FlashPrefill V2 is not here ({error})")


def cudnn(q, k, v):
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


class FlashPrefillV2:
    """FlashPrefill V2 on one sequence in one page."""

    def __init__(self, peer, q, k, v, correction: bool):
        n = q.shape[0]
        self.q, self.caches, self.n = q, (k[None], v[None]), n
        self.prefill = peer(**V2, use_mean_correction=correction)
        i32 = dict(dtype=torch.int32, device=q.device)
        self.arguments = dict(page_table=torch.zeros(1, 1, **i32), cache_seqlens=torch.tensor([n], **i32),
                              cu_seqlens_q=torch.tensor([0, n], **i32))
        self.extra = dict(v_cache=self.caches[1]) if correction else {}

    def index(self):
        return self.prefill.index_select(self.q, self.caches[0], **self.arguments, **self.extra, q_lens=[self.n],
                                         max_cache_seqlen=self.n)

    def attention(self, index):
        return self.prefill.block_sparse_attention(self.q, *self.caches, **self.arguments, index=index,
                                                   max_seqlen_q=self.n)

    def lists(self, index) -> ops.BlockIndex:
        """Its lists of 64-token tiles, which come in pairs, as blocks of 128."""
        starts = index.block_sparse_cu.long()
        tiles = index.block_sparse_idx[:int(starts[-1])]
        if not bool((tiles[1::2] == tiles[::2] + 1).all()) or bool((starts % 2).any()):
            raise ValueError("V2's tiles do not pair into blocks of 128")
        heads = self.caches[0].shape[2]
        pack = self.q.shape[1] // heads
        return ops.BlockIndex(heads, (starts.numel() - 1) // heads, 128 // pack, ((starts[1:] - starts[:-1]) // 2).int(),
                              (starts[:-1] // 2).contiguous(), (tiles[::2] // 2).int().contiguous())


class Rows:
    """Exact attention of some rows of every head."""

    def __init__(self, q, k, v, seed: int):
        generator = torch.Generator(device=q.device).manual_seed(seed)
        n, heads, d = q.shape
        self.group = heads // k.shape[1]
        self.positions = torch.randint(0, n, (heads, ROWS_PER_HEAD), generator=generator, device=q.device)
        self.blocks = -(-n // ops.BLOCK_KEYS)
        self.out, self.mass = [], []
        for head in range(heads):
            at = self.positions[head]
            keys, values = k[:, head // self.group].float(), v[:, head // self.group].float()
            scores = q[at, head].float() @ keys.T / math.sqrt(d)
            scores.masked_fill_(torch.arange(n, device=q.device)[None] > at[:, None], -math.inf)
            weights = torch.softmax(scores, 1)
            self.out.append(weights @ values)
            padded = functional.pad(weights, (0, self.blocks * ops.BLOCK_KEYS - n))
            self.mass.append(padded.view(ROWS_PER_HEAD, self.blocks, -1).sum(-1))

    def error(self, out) -> float:
        wrong = size = 0.0
        for head, exact in enumerate(self.out):
            wrong += float((out[self.positions[head], head].float() - exact).square().sum())
            size += float(exact.square().sum())
        return math.sqrt(wrong / size)

    def recall(self, index: ops.BlockIndex) -> tuple:
        """(mean, 1st percentile), each averaged over the heads."""
        means, lows = [], []
        for head, mass in enumerate(self.mass):
            own = head * index.num_lists // len(self.mass)
            got = []
            for row, position in enumerate(self.positions[head].tolist()):
                segment = own * index.tiles + position // index.tile_positions
                count, offset = int(index.counts[segment]), int(index.offsets[segment])
                listed = mass[row] if count < 0 else mass[row, index.blocks[offset:offset + count].long()]
                got.append(float(listed.sum()))
            got = torch.tensor(got)
            means.append(float(got.mean()))
            lows.append(float(got.quantile(0.01)))
        return sum(means) / len(means), sum(lows) / len(lows)


def in_turn(engines: dict, n: int) -> dict:
    """Median milliseconds of each engine; they take turns, twice, and the lower of two medians counts."""
    repeats, warm = (7, 2) if n <= 65536 else (3, 1) if n <= 262144 else (1, 1)
    times = {}
    for _ in range(2):
        for name, run in engines.items():
            times.setdefault(name, []).append(t(run, repeats, warm))
    return {name: min(values) for name, values in times.items()}


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


class Bench:
    def __init__(self, arguments):
        self.arguments, self.peers = arguments, Peers()
        self.run = uuid.uuid4().hex[:12]
        self.commit = arguments.commit or commit()

    def row(self, n: int, policy: str, stage: str, metrics: dict, peers: dict) -> None:
        a = self.arguments
        rounded = lambda values: {key: float(f"{value:.5g}") for key, value in values.items()}  # noqa: E731
        row = {"bench": "attention", "device": torch.cuda.get_device_name(), "commit": self.commit,
               "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
               "params": {"tokens": n, "q_heads": a.q_heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "dtype": "bf16",
                          "policy": policy, "stage": stage, "inputs": "structured", "run": self.run},
               "metrics": rounded(metrics), "peers": {name: rounded(values) for name, values in peers.items()}}
        with open(a.output, "a", encoding="utf-8") as output:
            output.write(json.dumps(row) + "\n")
        beside = "  ".join(f"{name} {values['ms']:.3f} ms ({values['ms'] / metrics['ms']:.2f}x)" for name, values in peers.items())
        extra = "  ".join(f"{key} {metrics[key]:.4g}" for key in metrics if key != "ms")
        print(f"{n:8d} {policy:11s} {stage:6s} {metrics['ms']:9.3f} ms  {extra}  | {beside}", flush=True)

    def dense(self, n: int, q, k, v) -> dict:
        """Dense rows; returns the outputs' reference rows and the peers' times."""
        a, out = self.arguments, torch.empty_like(q)
        flop = 2.0 * a.q_heads * a.head_dim * n * n
        engines = {"headwater": lambda: ops.prefill_attention(q, k, v, out=out), "cudnn": lambda: cudnn(q, k, v)}
        if self.peers.fa3:
            engines["fa3"] = lambda: self.peers.fa3(q[None], k[None], v[None], causal=True)
        times = in_turn(engines, n)
        rows = Rows(q, k, v, seed=n)
        results = {name: {"ms": ms, "tflops": flop / ms / 1e9} for name, ms in times.items()}
        results["headwater"]["rel_error"] = rows.error(out)
        results["cudnn"]["rel_error"] = rows.error(cudnn(q, k, v))
        mine = results.pop("headwater")
        self.row(n, "dense", "dense", mine, results)
        return {"rows": rows, "cudnn": results["cudnn"]}

    def active_tflops(self, index: ops.BlockIndex, n: int, ms: float) -> float:
        a = self.arguments
        rows = index.tile_positions * (a.q_heads // index.num_lists)
        return float(index.listed(n, n).sum()) * 4 * a.head_dim * rows * ops.BLOCK_KEYS / ms / 1e9

    def given_index(self, n: int, q, k, v) -> None:
        """The kernel alone on V2's exported index, correction off on both sides."""
        peer = FlashPrefillV2(self.peers.v2, q, k, v, correction=False)
        theirs = peer.index()
        index, out = peer.lists(theirs), torch.empty_like(q)
        times = in_turn({"headwater": lambda: ops.prefill_attention(q, k, v, index=index, out=out),
                         "v2": lambda: peer.attention(theirs)}, n)
        density = index.density(n, n)
        self.row(n, "flash2", "kernel", {"ms": times["headwater"], "density": density,
                                         "tflops": self.active_tflops(index, n, times["headwater"])},
                 {"flashprefill_v2": {"ms": times["v2"], "density": density,
                                      "tflops": self.active_tflops(index, n, times["v2"])}})

    def probe(self, n: int, q, k, v, dense: dict) -> None:
        """Search, kernel and both, beside V2 with mean correction and cuDNN's dense attention."""
        out = torch.empty_like(q)
        index = ops.select_blocks(q, k)
        engines = {"index": lambda: ops.select_blocks(q, k),
                   "kernel": lambda: ops.prefill_attention(q, k, v, index=index, out=out),
                   "total": lambda: ops.prefill_attention(q, k, v, policy="probe", out=out)}
        peer = None
        if self.peers.v2 and dense:
            peer = FlashPrefillV2(self.peers.v2, q, k, v, correction=True)
            theirs = peer.index()
            engines.update(v2_index=peer.index, v2_kernel=lambda: peer.attention(theirs),
                           v2_total=lambda: peer.attention(peer.index()))
        times = in_turn(engines, n)
        metrics = {stage: {"ms": times[stage]} for stage in ("index", "kernel", "total")}
        others = {stage: {} for stage in metrics}
        metrics["kernel"]["tflops"] = self.active_tflops(index, n, times["kernel"])
        metrics["total"]["density"] = metrics["kernel"]["density"] = index.density(n, n)
        if n < ops.MIN_SPARSE_TOKENS:  # the whole is dense attention then
            metrics["total"]["density"] = 1.0
        if dense:
            rows = dense["rows"]
            recall = rows.recall(index) if n >= ops.MIN_SPARSE_TOKENS else (1.0, 1.0)
            metrics["total"].update(rel_error=rows.error(out), recall_mean=recall[0], recall_p1=recall[1])
            others["total"]["cudnn"] = dense["cudnn"]
        if peer:
            lists = peer.lists(theirs)
            recall = rows.recall(lists)
            for stage in metrics:
                others[stage]["flashprefill_v2"] = {"ms": times[f"v2_{stage}"]}
            others["total"]["flashprefill_v2"].update(density=lists.density(n, n), rel_error=rows.error(peer.attention(theirs)),
                                                      recall_mean=recall[0], recall_p1=recall[1])
        overflows = int(index.overflows)
        if overflows:
            print(f"{overflows} tiles went dense for want of room")
        for stage in metrics:
            self.row(n, "probe", stage, metrics[stage], others[stage])

    def corrected(self, n: int, q, k, v, dense: dict) -> None:
        """With mean correction. The means come with K and V in prefill (split_qkv makes them); their cost alone is told."""
        out = torch.empty_like(q)
        tables = lambda: ops.mean_tables(ops.block_statistics(k, v, bounds=False), n)  # noqa: E731
        means = tables()
        times = in_turn({"statistics": tables,
                         "total": lambda: ops.prefill_attention(q, k, v, policy="probe", means=means, out=out)}, n)
        metrics, others = {"ms": times["total"], "statistics_ms": times["statistics"]}, {}
        if dense:
            metrics["rel_error"] = dense["rows"].error(out)
            others["cudnn"] = dense["cudnn"]
        self.row(n, "probe+means", "total", metrics, others)

    def all(self, n: int) -> None:
        a = self.arguments
        torch.cuda.empty_cache()
        q, k, v = gen(n, Hq=a.q_heads, Hk=a.kv_heads, D=a.head_dim, seed=a.seed)
        dense = self.dense(n, q, k, v) if n <= a.dense_up_to else {}
        if dense and self.peers.v2 and a.head_dim == 128:
            self.given_index(n, q, k, v)
        self.probe(n, q, k, v, dense if a.head_dim == 128 else {})
        if n >= ops.MIN_SPARSE_TOKENS:
            self.corrected(n, q, k, v, dense if a.head_dim == 128 else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 65536, 131072, 262144, 524288, 1048576])
    parser.add_argument("--q_heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense_up_to", type=int, default=524288, help="longest sequence that dense attention is timed on")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "attention.jsonl")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_bench: no GPU", file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    for n in arguments.tokens:
        bench.all(n)
    return 0


if __name__ == "__main__":
    sys.exit(main())
