"""The fewest blocks that hold a share of dense attention's mass: what no search can beat at its recall. For measuring, not for
serving: it computes dense attention first.

For a tile of 128 queries of one query head, blocks of 128 keys are listed from the largest down, by the mean over the tile's
queries of their attention on them, until these hold `recall`; the first `sink_blocks` and the last `window_blocks` come first.
"""

from dataclasses import dataclass

import torch

from headwater.eval.attention import masked_attention
from headwater.eval.blocks import BLOCK_KEYS, BlockTable, index_of_table
from headwater.eval.maps import block_averages
from headwater.eval.policies import check_range, register


@register
@dataclass(frozen=True)
class Oracle:
    recall: float = 0.95
    sink_blocks: int = 0
    window_blocks: int = 1
    name = "oracle"

    def __post_init__(self):
        check_range(self, "recall", 0, 1)
        check_range(self, "sink_blocks", 0, 2**20)
        check_range(self, "window_blocks", 1, 2**20)

    def attend(self, layer, q, k, v):
        table = BlockTable(self.select(block_averages(q, k)), BLOCK_KEYS, len(q), len(k))
        stats = table.stats(self.name, q.shape[1])
        if q.is_cuda:
            from headwater import ops

            return ops.prefill_attention(q, k, v, index=index_of_table(table))[0], stats
        out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            kv = slice(head // group, head // group + 1)
            out[:, head:head + 1] = masked_attention(
                q[:, head:head + 1].contiguous(), k[:, kv], v[:, kv],
                lambda _, first, end, head=head: table.row_mask(torch.arange(first, end), head))
        return out, stats

    def select(self, mass: torch.Tensor) -> torch.Tensor:
        """bool [query heads, tiles, blocks] of block averages f32 [query heads, tiles, blocks]."""
        block = torch.arange(mass.shape[2], device=mass.device)
        own = block[:, None]
        forced = ((block < self.sink_blocks) | (block > own - self.window_blocks)) & (block <= own)
        key = torch.where(forced, mass + 2, mass)  # forced ones first
        order = key.argsort(dim=-1, descending=True, stable=True)
        held = mass.gather(-1, order).cumsum(-1)
        before = held - mass.gather(-1, order)
        chosen = torch.zeros_like(forced.expand_as(mass)).scatter(-1, order, before < self.recall)
        return (chosen | forced) & (block <= own)
