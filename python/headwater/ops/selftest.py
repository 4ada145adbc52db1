"""python -m headwater.ops.selftest: checks the GPU kernels against float64, then prints the table of times.

The table is bench/attention_bench.py's and needs a checkout; arguments are passed on to it. Exit status 1: a check failed.
"""

import itertools
import math
import runpy
import sys
from pathlib import Path

import torch

from headwater import ops

TOLERANCE = 4e-3


def reference(q, k, v, offset: int, allowed=None):
    """Causal attention in float64, rows that see nothing 0."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) / math.sqrt(q.shape[2])
    seen = torch.arange(k.shape[0], device=q.device)[None] <= torch.arange(q.shape[0], device=q.device)[:, None] + offset
    seen = seen[None].expand(heads, -1, -1)
    if allowed is not None:
        seen = seen & allowed
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values)


def mask_of(index: ops.BlockIndex, heads: int, q_len: int, kv_len: int):
    """bool [heads, q_len, kv_len]: keys in listed blocks."""
    mask = torch.zeros(heads, q_len, kv_len, dtype=torch.bool, device=index.counts.device)
    pack = heads // index.num_lists
    for segment, (count, offset) in enumerate(zip(index.counts.tolist(), index.offsets.tolist())):
        own, tile = divmod(segment, index.tiles)
        rows = slice(tile * index.tile_positions, (tile + 1) * index.tile_positions)
        if count < 0:
            mask[own * pack:(own + 1) * pack, rows] = True
        for block in index.blocks[offset:offset + max(count, 0)].tolist():
            mask[own * pack:(own + 1) * pack, rows, block * ops.BLOCK_KEYS:(block + 1) * ops.BLOCK_KEYS] = True
    return mask


def random_inputs(q_len: int, kv_len: int, q_heads: int, kv_heads: int, d: int):
    shapes = ((q_len, q_heads, d), (kv_len, kv_heads, d), (kv_len, kv_heads, d))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]


def checks():
    """Yields (name, relative error)."""
    torch.manual_seed(0)
    for d in (128, 64):
        for q_heads, kv_heads in ((8, 2), (9, 3), (5, 1), (7, 1), (4, 4)):
            for q_len, kv_len in ((1, 1), (129, 129), (1000, 1000), (300, 1000)):
                q, k, v = random_inputs(q_len, kv_len, q_heads, kv_heads, d)
                out, _ = ops.prefill_attention(q, k, v)
                wanted = reference(q, k, v, kv_len - q_len)
                yield f"dense d{d} {q_heads}/{kv_heads} {q_len}x{kv_len}", float((out - wanted).norm() / wanted.norm())
                for search in (dict(threshold=0.5), dict(forced_density=0.9, sink_blocks=0, window_blocks=1)):
                    index = ops.select_blocks(q, k, **search)
                    index.validate(q_len, kv_len)
                    out, _ = ops.prefill_attention(q, k, v, index=index)
                    wanted = reference(q, k, v, kv_len - q_len, mask_of(index, q_heads, q_len, kv_len))
                    yield (f"listed by {next(iter(search))} d{d} {q_heads}/{kv_heads} {q_len}x{kv_len}",
                           float((out - wanted).norm() / wanted.norm()))


def mass_checks():
    """The same of masses, and of recall by masses and by lse."""
    for tokens, q_heads, kv_heads, d in ((1000, 8, 2, 128), (1024, 4, 4, 64)):
        name = f"d{d} {q_heads}/{kv_heads} {tokens}"
        q, k, v = random_inputs(tokens, tokens, q_heads, kv_heads, d)
        lse = ops.prefill_attention(q, k, v, return_lse=True)[1].lse_ln
        keys = k.double().repeat_interleave(q_heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->qhk", q.double(), keys) / math.sqrt(d)
        rows = torch.arange(tokens, device=q.device)
        weights = torch.softmax(scores.masked_fill(rows[None, None] > rows[:, None, None], -math.inf), -1)
        blocks = -(-tokens // ops.BLOCK_KEYS)
        wanted = torch.nn.functional.pad(weights, (0, blocks * ops.BLOCK_KEYS - tokens)).unflatten(2, (blocks, -1)).sum(-1)
        mass = ops.row_mass(q, k, rows)
        yield f"row_mass {name}", float((mass - wanted).norm() / wanted.norm())
        means = torch.stack([part.mean(0) for part in wanted.split(ops.BLOCK_KEYS)], 1)
        heads = [q_heads - 1, 0]
        averages = ops.block_mass(q, k, lse, heads)
        yield f"block_mass {name}", float((averages - means[heads]).norm() / means[heads].norm())
        index = ops.select_blocks(q, k, threshold=0.9, sink_blocks=0, window_blocks=1, dense_last_tokens=0)
        held = (weights * mask_of(index, q_heads, tokens, tokens).transpose(0, 1)).sum(-1)
        by_mass = ops.recall_of_rows(mass, rows, index, tokens)
        by_lse = (ops.prefill_attention(q, k, v, index=index, return_lse=True)[1].lse_ln - lse).exp()
        for way, found in (("masses", by_mass), ("lse", by_lse)):
            yield f"recall by {way} {name}", float((found - held).norm() / held.norm())


def main() -> int:
    if not torch.cuda.is_available():
        print("selftest: no GPU", file=sys.stderr)
        return 1
    failed = total = 0
    worst = 0.0
    for name, error in itertools.chain(checks(), mass_checks()):
        total += 1
        worst = max(worst, error)
        if not error <= TOLERANCE:
            failed += 1
            print(f"FAILED {name}: relative error {error:.2e}, at most {TOLERANCE:.0e} is wanted")
    print(f"{total - failed} of {total} checks against float64 hold, largest relative error {worst:.1e}")
    bench = Path(__file__).resolve().parents[3] / "bench" / "attention_bench.py"
    if bench.is_file():
        sys.argv[0] = str(bench)
        try:
            runpy.run_path(str(bench), run_name="__main__")
        except SystemExit as done:
            failed += bool(done.code)
    else:
        print(f"no table: {bench} is not there (it needs a checkout)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
