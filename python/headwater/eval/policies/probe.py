"""Headwater's search with one probe a tile: the GPU's kernels, or the same rule in torch (small sizes).

For a tile of 128 // group queries and one KV head, y = probe . block mean / sqrt(head_dim), where the probe is the mean of
one query head's rows; each head is normalised by its softmax over the blocks that the whole tile sees, and a block is
listed where some head's weight is at least `threshold` of the best one of any head. The first `sink_blocks`, the last
`window_blocks` and what only part of the tile sees are always listed; tiles of the last `dense_last_tokens` queries are
dense (kernels/cuda/sm90/search_kernel.cuh, kernels/reference/select_blocks.cc).
"""

import math
from dataclasses import dataclass

import torch

from headwater.eval.attention import Stats, dense_attention, dense_stats
from headwater.eval.blocks import BLOCK_KEYS, BlockTable, run_as_mask, table_of_index, visible_blocks
from headwater.eval.policies import check_range, register


def group_means(x: torch.Tensor, size: int) -> torch.Tensor:
    """Means of `size` rows each (the last group: of what is left) of x [rows, heads, dim], rounded to bf16. f32
    [groups, heads, dim]."""
    groups = -(-len(x) // size)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, groups * size - len(x)))
    sums = padded.view(groups, size, *x.shape[1:]).sum(dim=1)
    sizes = torch.full((groups, 1, 1), size, device=x.device)
    sizes[-1] = len(x) - (groups - 1) * size
    return (sums / sizes).bfloat16().float()


@register
@dataclass(frozen=True)
class Probe:
    threshold: float = 0.18
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_last_tokens: int = 32
    min_tokens: int = 8192  # dense below
    name = "probe"

    def __post_init__(self):
        check_range(self, "threshold", 1e-30, 1)
        for name in ("sink_blocks", "window_blocks", "dense_last_tokens", "min_tokens"):
            check_range(self, name, 0, 2**22)

    def attend(self, layer, q, k, v):
        if len(k) < self.min_tokens:
            return dense_attention(q, k, v), dense_stats()
        if not q.is_cuda:
            return run_as_mask(q, k, v, self.select(q, k))
        from headwater import ops

        search = {name: getattr(self, name)
                  for name in ("threshold", "sink_blocks", "window_blocks", "dense_last_tokens")}
        if len(k) >= ops.MIN_SPARSE_TOKENS:
            out, info = ops.prefill_attention(q, k, v, policy="probe", **search)
            index = info.index
        else:
            index = ops.select_blocks(q, k, **search)
            out, _ = ops.prefill_attention(q, k, v, index=index)
        # The tables are made when they are asked for, which is after the pass.
        tokens, heads = len(k), q.shape[1]
        return out, Stats(self.name, lambda: index.density(tokens, tokens),
                          lambda rows: table_of_index(index, tokens, tokens).stats(self.name, heads).row_mask(rows))

    def select(self, q: torch.Tensor, k: torch.Tensor) -> BlockTable:
        """The rule in torch operations. O(tiles * blocks) memory."""
        group = q.shape[1] // k.shape[1]
        positions = BLOCK_KEYS // group
        means, probes = group_means(k, BLOCK_KEYS), group_means(q, positions)
        first = torch.arange(0, len(q), positions, device=q.device) + len(k) - len(q)
        complete = ((first + 1) // BLOCK_KEYS)[:, None]
        total = visible_blocks(len(q), len(k), positions, q.device)[:, None]
        block = torch.arange(len(means), device=q.device)
        listed = []
        for head in range(k.shape[1]):
            scores = probes[:, head * group:(head + 1) * group] @ means[:, head].T / math.sqrt(q.shape[2])
            scores = scores.masked_fill((block >= complete)[:, None], -math.inf)
            scores = (scores - scores.logsumexp(dim=-1, keepdim=True)).nan_to_num(nan=-math.inf, neginf=-math.inf).amax(dim=1)
            near_best = scores >= math.log(self.threshold) + scores.amax(dim=1, keepdim=True)
            window = torch.minimum(total - self.window_blocks, complete)
            listed.append((near_best | (block < self.sink_blocks) | (block >= window)) & (block < total))
        listed = torch.stack(listed)
        if self.dense_last_tokens > 0:
            tile = torch.arange(len(first), device=q.device)[:, None]
            listed |= (tile >= max(0, len(q) - self.dense_last_tokens) // positions) & (block < total)
        return BlockTable(listed, positions, len(q), len(k))
