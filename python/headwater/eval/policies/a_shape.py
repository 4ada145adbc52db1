"""StreamingLLM's attention sinks and sliding window (arXiv:2309.17453).

Query p attends to key j where j < sink_tokens or p - window_tokens < j <= p. On a GPU the blocks that hold such keys are
computed whole (kernels on block lists), so that a row sees up to a block and a tile more than it is owed; on a CPU the
rule is exact to the token. What ran is what is measured.
"""

import functools
from dataclasses import dataclass

import torch

from headwater.eval.attention import Stats, dense_attention, dense_stats, masked_attention
from headwater.eval.blocks import BLOCK_KEYS, BlockTable, index_of_table
from headwater.eval.policies import check_range, register


@register
@dataclass(frozen=True)
class AShape:
    sink_tokens: int = 128
    window_tokens: int = 3968
    name = "a_shape"

    def __post_init__(self):
        check_range(self, "sink_tokens", 0, 2**22)
        check_range(self, "window_tokens", 1, 2**22)

    def attend(self, layer, q, k, v):
        if len(k) <= self.sink_tokens + self.window_tokens:
            return dense_attention(q, k, v), dense_stats()
        if q.is_cuda:
            return self._attend_blocks(q, k, v)
        tokens, heads = q.shape[:2]  # the functions of Stats outlive q and k

        def mask_of(head: int, first: int, end: int) -> torch.Tensor:
            return self.row_mask(torch.arange(first, end), tokens)

        return masked_attention(q, k, v, mask_of), Stats(
            self.name, lambda: self.density(tokens), lambda rows: self.row_mask(rows, tokens).expand(heads, -1, -1))

    def row_mask(self, rows: torch.Tensor, keys: int) -> torch.Tensor:
        """bool [rows, keys] of queries at positions `rows`; causality left out."""
        key = torch.arange(keys, device=rows.device)
        return (key < self.sink_tokens) | (key > rows[:, None] - self.window_tokens)

    def density(self, tokens: int) -> float:
        """Attended over causal pairs, exact."""
        seen = torch.arange(1, tokens + 1).clamp(max=self.sink_tokens + self.window_tokens).sum()
        return float(seen) * 2 / (tokens * (tokens + 1))

    def block_table(self, q_heads: int, kv_heads: int, tokens: int, device: torch.device) -> BlockTable:
        """Blocks that hold a key which some query of the tile attends to; the same for every KV head."""
        positions = 128 // (q_heads // kv_heads)
        first = torch.arange(0, tokens, positions, device=device)[:, None]
        last = (first + positions).clamp(max=tokens) - 1
        begin = torch.arange(0, tokens, BLOCK_KEYS, device=device)
        listed = ((begin < self.sink_tokens) | (begin + BLOCK_KEYS > first - self.window_tokens + 1)) & (begin <= last)
        return BlockTable(listed.expand(kv_heads, -1, -1).contiguous(), positions, tokens, tokens)

    def _attend_blocks(self, q, k, v):
        from headwater import ops

        table, index = _lists(self, q.shape[1], k.shape[1], len(k), q.device)
        out, _ = ops.prefill_attention(q, k, v, index=index)
        return out, table.stats(self.name, q.shape[1])


@functools.lru_cache(maxsize=2)  # the same for every layer, and making them synchronises
def _lists(policy: AShape, q_heads: int, kv_heads: int, tokens: int, device: torch.device):
    table = policy.block_table(q_heads, kv_heads, tokens, device)
    return table, index_of_table(table)
