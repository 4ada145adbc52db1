#!/usr/bin/env python3
"""Times Headwater's GPU layer operations at Llama-3-8B's shapes beside their floor and torch, and checks them on the same
inputs, in one process; appends rows to --output.

    cmake --preset release -DHW_CUDA=ON -DHW_SERVICE=OFF -DHW_CPU_KERNELS=OFF
    cmake --build --preset release --target headwater_kernels
    PYTHONPATH=python python3 bench/layer_ops_bench.py [--tokens 8192 65536] [--no_compile] --output rows.jsonl

The floor of what only moves memory is its bytes at 3.35 TB/s (an H100 SXM's HBM3), `floor_ms`; what this device reaches is
the peer "copy": a device copy that reads and writes as many bytes together. The floor of a linear layer is its FLOP at 989
TFLOP/s (dense bf16), in fp8 at 1979. Peers: torch as a model would spell the operation, eager and compiled;
torch.nn.functional.linear; in fp8 torch._scaled_mm, which does not add, and our bf16 layer.

Times are medians of 7 by CUDA events after warm-up; engines take turns, twice, and the lower of the two counts. Errors are
of the first and last 64 rows against float64, largest over the largest value wanted.
"""

import argparse
import datetime
import json
import math
import sys
import uuid
from pathlib import Path

import torch
import torch.nn.functional as functional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "python")]

from attention_bench import commit, in_turn  # noqa: E402
from headwater import ops  # noqa: E402

HIDDEN, Q_HEADS, KV_HEADS, DIM, MLP, VOCAB = 4096, 32, 8, 128, 14336, 128256
EPSILON, THETA = 1e-5, 500000.0
HBM_BYTES, TENSOR_FLOP, FP8_FLOP = 3.35e12, 989e12, 1979e12  # a second
ROWS = 64
TOLERANCE = 2**-7


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype) if math.prod(shape) < 2**28 else torch.cat(
        [torch.randn(part.numel(), *shape[1:], device="cuda").to(dtype) for part in torch.arange(shape[0]).chunk(16)])


def ends(x):
    """The rows that are checked, in float64."""
    return torch.cat([x[:ROWS], x[-ROWS:]]).double()


def error(got, wanted) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


def rms_norm(x, weight):
    return functional.rms_norm(x, x.shape[-1:], weight, EPSILON)


def add_rms_norm(x, delta, weight):
    x += delta
    return rms_norm(x, weight)


def silu_mul(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def quantize(x):
    """e4m3 and a scale for each row, from any float type; torch divides by a number less exactly than by a tensor."""
    x = x.float()
    most = x.abs().amax(1, keepdim=True).clamp(min=2**-64)
    top = torch.full_like(most, 448)
    return (x * (top / most)).clamp(-448, 448).to(torch.float8_e4m3fn), (most / top).squeeze(1)


def dequantized_ends(values, scale):
    return torch.cat([part.float() for part in (values[:ROWS], values[-ROWS:])]).double() * ends(scale[:, None])


def split_qkv(qkv, cos, sin):
    q, k, v = qkv.view(qkv.shape[0], -1, DIM).split((Q_HEADS, KV_HEADS, KV_HEADS), 1)
    turned = []
    for x in (q, k):
        a, b = x.to(cos.dtype).chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        turned.append(torch.cat((a * c - b * s, b * c + a * s), -1).to(qkv.dtype))
    return turned[0], turned[1], v.contiguous()


def block_statistics(k, v):
    """Means, bounds, mean squares and norms of whole blocks."""
    k, v = (x.view(-1, ops.layers.BLOCK_TOKENS, *x.shape[1:]).float() for x in (k, v))
    squares = [x.square().sum(-1) for x in (k, v)]
    return (k.mean(1), v.mean(1), k.amin(1), k.amax(1), squares[0].mean(1), squares[1].mean(1), squares[0].amax(1).sqrt(),
            squares[1].amax(1).sqrt())


def rope_table(inverse, positions):
    angle = positions.double()[:, None] * inverse
    return angle.cos().float(), angle.sin().float()


def first_nonfinite_row(x):
    bad = ~torch.isfinite(x).all(1)
    return torch.where(bad.any(), bad.int().argmax(), -1)


class Bench:
    def __init__(self, arguments):
        self.arguments, self.failed = arguments, 0
        self.run, self.commit = uuid.uuid4().hex[:12], arguments.commit or commit()
        self.scratch = torch.empty(0, dtype=torch.uint8)

    def compiled(self, function):
        """function compiled for one shape, or None."""
        return None if self.arguments.no_compile else torch.compile(function, dynamic=False)

    def copy(self, moved: int):
        """A device copy that moves as many bytes."""
        size = moved // 32 * 16
        if self.scratch.numel() < 2 * size:
            self.scratch = torch.empty(0, dtype=torch.uint8)
            self.scratch = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
        return lambda: self.scratch[:size].copy_(self.scratch[size:2 * size])

    def time(self, n: int, op: str, ours, peers: dict, wrong: float, *, moved: int = 0, flop: float = 0.0,
             tolerance: float = TOLERANCE, dtype: str = "bf16") -> None:
        """One row; moved: bytes read and written at least."""
        engines = {"headwater": ours}
        for name, peer in peers.items():
            if peer is None:
                continue
            try:
                peer()
                engines[name] = peer
            except Exception as problem:  # noqa: BLE001: a peer that does not run is said, not fatal
                print(f"{op}: {name} does not run here: {str(problem).splitlines()[0][:200]}")
        if moved:
            engines["copy"] = self.copy(moved)
        times = in_turn(engines, n)
        mine = times.pop("headwater")
        metrics = {"ms": mine, "max_error": wrong}
        if moved:
            metrics.update(floor_ms=moved / HBM_BYTES * 1e3, tb_per_s=moved / mine / 1e9, of_copy=times["copy"] / mine)
        if flop:
            peak = FP8_FLOP if dtype == "fp8" else TENSOR_FLOP
            metrics.update(floor_ms=flop / peak * 1e3, tflops=flop / mine / 1e9)
        self.row(n, op, dtype, metrics, {name: {"ms": ms} for name, ms in times.items()})
        if not wrong <= tolerance:
            self.failed += 1
            print(f"FAILED {op}: error {wrong:.2e}, at most {tolerance:.0e} is wanted")

    def row(self, n: int, op: str, dtype: str, metrics: dict, peers: dict) -> None:
        rounded = lambda values: {key: float(f"{value:.5g}") for key, value in values.items()}  # noqa: E731
        row = {"bench": "layer_ops", "device": torch.cuda.get_device_name(), "commit": self.commit,
               "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
               "params": {"op": op, "tokens": n, "model": "llama-3-8b", "dtype": dtype, "inputs": "random", "run": self.run},
               "metrics": rounded(metrics), "peers": {name: rounded(values) for name, values in peers.items()}}
        with open(self.arguments.output, "a", encoding="utf-8") as output:
            output.write(json.dumps(row) + "\n")
        extra = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "ms")
        beside = "  ".join(f"{name} {values['ms']:.3f} ({values['ms'] / metrics['ms']:.2f}x)" for name, values in peers.items())
        print(f"{n:8d} {op:22s} {dtype:4s} {metrics['ms']:8.3f} ms  {extra}  | {beside}", flush=True)

    def embed(self, n: int) -> None:
        table, ids = random(VOCAB, HIDDEN), torch.randint(0, VOCAB, (n,), device="cuda", dtype=torch.int32)
        wrong = error(ends(ops.embed_tokens(table, ids)), ends(table[ids.long()]))
        self.time(n, "embed_tokens", lambda: ops.embed_tokens(table, ids), {"torch": lambda: functional.embedding(ids, table)},
                  wrong, moved=n * (4 * HIDDEN + 4), tolerance=0)

    def norm(self, n: int) -> None:
        x, delta, weight, out = random(n, HIDDEN), random(n, HIDDEN), random(HIDDEN), torch.empty(
            n, HIDDEN, device="cuda", dtype=torch.bfloat16)
        wanted = rms_norm(ends(x), weight.double())
        compiled = self.compiled(rms_norm)
        self.time(n, "rms_norm", lambda: ops.rms_norm(x, weight, EPSILON, out=out),
                  {"torch": lambda: rms_norm(x, weight), "compile": compiled and (lambda: compiled(x, weight))},
                  error(ends(ops.rms_norm(x, weight, EPSILON)), wanted), moved=4 * n * HIDDEN)
        added = x.clone()
        got = ops.rms_norm(added, weight, EPSILON, delta=delta)
        wrong = error(ends(got), rms_norm(ends(x + delta), weight.double()))
        if not torch.equal(added, x + delta):
            wrong = math.inf
        added_compiled = self.compiled(add_rms_norm)
        self.time(n, "rms_norm_residual", lambda: ops.rms_norm(x, weight, EPSILON, delta=delta, out=out),
                  {"torch": lambda: add_rms_norm(x, delta, weight),
                   "compile": added_compiled and (lambda: added_compiled(x, delta, weight))}, wrong, moved=8 * n * HIDDEN)

    def rotary(self, n: int) -> None:
        inverse = THETA ** (-torch.arange(DIM // 2, device="cuda", dtype=torch.float64) / (DIM // 2))
        positions = torch.arange(n, device="cuda")
        compiled = self.compiled(rope_table)
        cos, sin = ops.rope_table(inverse, range(n))
        wanted = positions.double()[:, None] * inverse
        wrong = max(error(cos, wanted.cos()), error(sin, wanted.sin()))
        self.time(n, "rope_table", lambda: ops.rope_table(inverse, range(n)),
                  {"torch": lambda: rope_table(inverse, positions),
                   "compile": compiled and (lambda: compiled(inverse, positions))}, wrong, moved=4 * n * DIM, tolerance=1e-7)

    def split(self, n: int) -> None:
        width = (Q_HEADS + 2 * KV_HEADS) * DIM
        qkv = random(n, width)
        inverse = THETA ** (-torch.arange(DIM // 2, device="cuda", dtype=torch.float64) / (DIM // 2))
        cos, sin = ops.rope_table(inverse, range(n))
        stats = ops.BlockStats.empty(n, KV_HEADS, DIM, "cuda")
        out = ops.split_qkv(qkv, Q_HEADS, KV_HEADS, cos, sin, stats=stats)
        wanted = split_qkv(ends(qkv), ends(cos), ends(sin))
        wrong = max(error(ends(got), want) for got, want in zip(out, wanted))
        alone = ops.block_statistics(*out[1:])
        same = all(torch.equal(getattr(stats, name), getattr(alone, name)) for name in vars(stats))
        moved, stats_bytes = n * (4 * width + 4 * DIM), sum(x.numel() for x in vars(stats).values()) * 4
        compiled = self.compiled(split_qkv)
        peers = {"torch": lambda: split_qkv(qkv, cos, sin), "compile": compiled and (lambda: compiled(qkv, cos, sin))}
        self.time(n, "split_qkv", lambda: ops.split_qkv(qkv, Q_HEADS, KV_HEADS, cos, sin, out=out), peers, wrong, moved=moved)
        self.time(n, "split_qkv_stats", lambda: ops.split_qkv(qkv, Q_HEADS, KV_HEADS, cos, sin, out=out, stats=stats), {},
                  wrong if same else math.inf, moved=moved + stats_bytes)
        self.statistics(n, *out[1:], alone, stats_bytes)
        self.pack(n, *out[1:])

    def statistics(self, n: int, k, v, stats, stats_bytes: int) -> None:
        compiled = self.compiled(block_statistics)
        peers = {"torch": lambda: block_statistics(k, v), "compile": compiled and (lambda: compiled(k, v))}
        last = slice(n - ops.layers.BLOCK_TOKENS, n)
        wanted = block_statistics(k[last], v[last])
        wrong = max(error(got[-1:], want.double()) for got, want in zip(vars(stats).values(), wanted))
        self.time(n, "block_statistics", lambda: ops.block_statistics(k, v, stats=stats), peers, wrong,
                  moved=4 * k.numel() + stats_bytes, tolerance=1e-5)
        k_table, _ = ops.mean_tables(stats, n)
        blocks = stats.k_mean.shape[0]
        coarse = stats.k_mean[:8].double().mean(0)
        wrong = max(error(k_table[:, :blocks].transpose(0, 1), stats.k_mean.double()),
                    error(k_table[:, ops.mean_table_coarse_row(n)], coarse))
        self.time(n, "mean_tables", lambda: ops.mean_tables(stats, n), {}, wrong,
                  moved=2 * (4 * stats.k_mean.numel() + 2 * k_table.numel()))

    def pack(self, n: int, k, v) -> None:
        tokens = ops.layers.BLOCK_TOKENS
        order = torch.randperm(n // tokens, device="cuda")
        row = KV_HEADS * DIM * 2
        runs = torch.stack((order * tokens, torch.full_like(order, tokens),
                            torch.arange(len(order), device="cuda") * tokens * row), 1).contiguous()
        to_k, to_v = (torch.empty(n * KV_HEADS * DIM, dtype=torch.float16, device="cuda") for _ in range(2))

        def gathered(x):
            return x.view(-1, tokens * KV_HEADS * DIM)[order].half()

        ops.pack_kv(k, v, runs, to_k, to_v)
        wrong = max(error(to_k, gathered(k).flatten().double()), error(to_v, gathered(v).flatten().double()))
        self.time(n, "pack_kv_f16", lambda: ops.pack_kv(k, v, runs, to_k, to_v),
                  {"torch": lambda: (gathered(k), gathered(v))}, wrong, moved=8 * k.numel(), tolerance=0)

    def activation(self, n: int) -> None:
        gate_up, out = random(n, 2 * MLP), torch.empty(n, MLP, device="cuda", dtype=torch.bfloat16)
        wrong = error(ends(ops.silu_mul(gate_up)), silu_mul(ends(gate_up)))
        compiled = self.compiled(silu_mul)
        self.time(n, "silu_mul", lambda: ops.silu_mul(gate_up, out=out),
                  {"torch": lambda: silu_mul(gate_up), "compile": compiled and (lambda: compiled(gate_up))}, wrong,
                  moved=6 * n * MLP)
        x = gate_up.view(-1, HIDDEN)[:n]
        wrong = float(ops.first_nonfinite_row(x)) + 1
        compiled_find = self.compiled(first_nonfinite_row)
        self.time(n, "first_nonfinite_row", lambda: ops.first_nonfinite_row(x),
                  {"torch": lambda: first_nonfinite_row(x), "compile": compiled_find and (lambda: compiled_find(x))}, wrong,
                  moved=2 * x.numel(), tolerance=0)

    def linear(self, n: int) -> None:
        linear = ops.Linear()
        for name, inside, outside, accumulate in (("qkv", HIDDEN, (Q_HEADS + 2 * KV_HEADS) * DIM, False),
                                                  ("attention_out", Q_HEADS * DIM, HIDDEN, True),
                                                  ("gate_up", HIDDEN, 2 * MLP, False), ("down", MLP, HIDDEN, True)):
            x, weight = random(n, inside), random(outside, inside)
            y = random(n, outside)
            wanted = ends(x) @ weight.double().T + (ends(y) if accumulate else 0)
            linear(x, weight, out=y, accumulate=accumulate)
            peer = (lambda: torch.addmm(y, x, weight.T)) if accumulate else (lambda: functional.linear(x, weight))
            wrong = error(ends(y), wanted)
            self.time(n, f"linear_{name}", lambda: linear(x, weight, out=y, accumulate=accumulate), {"torch": peer}, wrong,
                      flop=2.0 * n * inside * outside)
            del x, weight, y, peer

    def quantized(self, n: int) -> None:
        """Rows to e4m3, alone and where they are made."""
        x, weight, scale = random(n, HIDDEN), random(HIDDEN), torch.empty(n, device="cuda")
        out = torch.empty(n, HIDDEN, device="cuda", dtype=torch.float8_e4m3fn)
        compiled = self.compiled(quantize)
        got, got_scale = ops.quantize_rows(x)
        wrong = error(dequantized_ends(got, got_scale), dequantized_ends(*quantize(x)))
        self.time(n, "quantize", lambda: ops.quantize_rows(x, out=out, scale=scale),
                  {"torch": lambda: quantize(x), "compile": compiled and (lambda: compiled(x))}, wrong,
                  moved=n * (3 * HIDDEN + 4), tolerance=0, dtype="fp8")
        compiled_norm = self.compiled(lambda x, weight: quantize(rms_norm(x, weight)))
        ops.rms_norm(x, weight, EPSILON, out=out, scale=scale)
        wrong = error(dequantized_ends(out, scale), rms_norm(ends(x), weight.double()))
        self.time(n, "rms_norm", lambda: ops.rms_norm(x, weight, EPSILON, out=out, scale=scale),
                  {"compile": compiled_norm and (lambda: compiled_norm(x, weight))}, wrong,
                  moved=n * (3 * HIDDEN + 4), tolerance=2**-4, dtype="fp8")
        gate_up, out = random(n, 2 * MLP), torch.empty(n, MLP, device="cuda", dtype=torch.float8_e4m3fn)
        compiled_silu = self.compiled(lambda gate_up: quantize(silu_mul(gate_up)))
        ops.silu_mul(gate_up, out=out, scale=scale)
        wrong = error(dequantized_ends(out, scale), silu_mul(ends(gate_up)))
        self.time(n, "silu_mul", lambda: ops.silu_mul(gate_up, out=out, scale=scale),
                  {"compile": compiled_silu and (lambda: compiled_silu(gate_up))}, wrong, moved=n * (5 * MLP + 4),
                  tolerance=2**-4, dtype="fp8")

    def linear_fp8(self, n: int) -> None:
        linear = ops.Linear()
        for name, inside, outside, accumulate in (("qkv", HIDDEN, (Q_HEADS + 2 * KV_HEADS) * DIM, False),
                                                  ("attention_out", Q_HEADS * DIM, HIDDEN, True),
                                                  ("gate_up", HIDDEN, 2 * MLP, False), ("down", MLP, HIDDEN, True)):
            x, weight = random(n, inside), random(outside, inside)
            (xq, x_scale), (wq, w_scale) = ops.quantize_rows(x), ops.quantize_rows(weight)
            y = torch.zeros(n, outside, device="cuda", dtype=torch.float32 if accumulate else torch.bfloat16)
            scales = dict(x_scale=x_scale, weight_scale=w_scale)
            linear(xq, wq, out=y, accumulate=accumulate, **scales)
            wanted = dequantized_ends(xq, x_scale) @ (wq.float().double() * w_scale[:, None]).T
            wrong = error(ends(y), wanted)
            peers = {"torch": lambda: torch._scaled_mm(xq, wq.t(), scale_a=x_scale[:, None], scale_b=w_scale[None, :],
                                                       out_dtype=y.dtype, use_fast_accum=True),
                     "bf16": lambda: linear(x, weight, out=y, accumulate=accumulate)}
            self.time(n, f"linear_{name}", lambda: linear(xq, wq, out=y, accumulate=accumulate, **scales), peers, wrong,
                      flop=2.0 * n * inside * outside, tolerance=TOLERANCE + inside / 32 * 2**-13, dtype="fp8")
            del x, weight, xq, wq, y, peers

    def all(self, n: int) -> None:
        for part in (self.embed, self.norm, self.rotary, self.split, self.activation, self.linear, self.quantized,
                     self.linear_fp8):
            torch.cuda.empty_cache()
            part(n)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536], help="multiples of 1024")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "layer_ops.jsonl")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("layer_ops_bench: no GPU", file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    bench = Bench(arguments)
    for n in arguments.tokens:
        if n < 1024 or n % 1024:
            parser.error(f"--tokens {n}: a multiple of 1024 is wanted")
        bench.all(n)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
