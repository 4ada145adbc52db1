"""Lists of key blocks as dense boolean tables, for measuring and for running them without a GPU.

A table is bool [lists, tiles, blocks of 128 keys]; a list is one KV head's (or one query head's), a tile holds
`tile_positions` queries. Bottom-right aligned where there are more keys than queries.
"""

from dataclasses import dataclass
from typing import Tuple

import torch

from headwater.eval.attention import Stats, masked_attention

BLOCK_KEYS = 128


@dataclass
class BlockTable:
    listed: torch.Tensor  # bool [lists, tiles, blocks]
    tile_positions: int
    q_len: int
    kv_len: int

    def visible(self) -> torch.Tensor:
        """int64 [tiles]: blocks that the last query of each tile sees."""
        return visible_blocks(self.q_len, self.kv_len, self.tile_positions, self.listed.device)

    def density(self) -> float:
        """Listed over causally possible blocks."""
        return float(self.listed.sum() / (self.visible().sum() * len(self.listed)))

    def row_mask(self, rows: torch.Tensor, list_index: int) -> torch.Tensor:
        """bool [rows, keys] of queries `rows` (int64) under one list; causality left out."""
        chosen = self.listed[list_index][rows // self.tile_positions]
        return chosen.repeat_interleave(BLOCK_KEYS, dim=1)[:, :self.kv_len]

    def stats(self, ran: str, q_heads: int) -> Stats:
        group = q_heads // len(self.listed)
        return Stats(ran, self.density,
                     lambda rows: torch.stack([self.row_mask(rows, head // group) for head in range(q_heads)]))


def visible_blocks(q_len: int, kv_len: int, tile_positions: int, device: torch.device) -> torch.Tensor:
    """int64 [tiles]: key blocks that the last query of each tile sees."""
    end = torch.arange(tile_positions, q_len + tile_positions, tile_positions, device=device).clamp(max=q_len)
    return (end + kv_len - q_len + BLOCK_KEYS - 1) // BLOCK_KEYS


def table_of_index(index, q_len: int, kv_len: int) -> BlockTable:
    """The table of a headwater.ops.BlockIndex of one sequence. Segment (list, tile) lists `counts` entries of `blocks` from
    `offsets` on; a count of -1 is every visible block."""
    blocks = -(-kv_len // BLOCK_KEYS)
    listed = torch.zeros(index.num_lists * index.tiles, blocks, dtype=torch.bool, device=index.counts.device)
    counts = index.counts.long()
    entries = counts.clamp(min=0)
    segment = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), entries)
    place = torch.arange(len(segment), device=counts.device) - (torch.cumsum(entries, 0) - entries)[segment]
    listed[segment, index.blocks[index.offsets[segment] + place].long()] = True
    listed = listed.view(index.num_lists, index.tiles, blocks)
    all_visible = torch.arange(blocks, device=counts.device) < index.visible_blocks(q_len, kv_len)[:, None]
    listed |= (counts < 0).view(index.num_lists, index.tiles, 1) & all_visible
    return BlockTable(listed, index.tile_positions, q_len, kv_len)


def index_of_table(table: BlockTable):
    """A headwater.ops.BlockIndex of the table, for the GPU's kernels."""
    from headwater import ops

    lists, tiles, _ = table.listed.shape
    counts = table.listed.sum(dim=-1).flatten()
    blocks = table.listed.nonzero()[:, 2].int()
    return ops.BlockIndex(lists, tiles, table.tile_positions, counts.int(), torch.cumsum(counts, 0) - counts,
                          blocks if len(blocks) else blocks.new_zeros(1), validated=(table.q_len, table.kv_len))


def run_as_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable) -> Tuple[torch.Tensor, Stats]:
    """Executes one list a KV head as masks: torch operations only, memory and time of dense attention."""
    def mask_of(head: int, first: int, end: int) -> torch.Tensor:
        return table.row_mask(torch.arange(first, end, device=q.device), head)

    return masked_attention(q, k, v, mask_of), table.stats("blocks", q.shape[1])
