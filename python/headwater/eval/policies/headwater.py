"""Headwater's own policy: on a GPU its kernels; on a CPU the rule of `probe`, and a mean key and value for each block of keys
that is not listed and that all rows of the tile see (the GPU takes one for eight blocks where none of them is listed)."""

import dataclasses
import math

import torch
from torch.nn import functional

from headwater.eval.attention import dense_attention, dense_stats, masked_attention
from headwater.eval.blocks import BLOCK_KEYS, BlockTable
from headwater.eval.policies import register
from headwater.eval.policies.probe import Probe, group_means
from headwater.eval.policies.published import Published


@register
@dataclasses.dataclass(frozen=True)
class Headwater(Published):
    """calibration: a file of python -m headwater.calibrate, for the GPU."""

    threshold: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 16
    dense_last_tokens: int = 256
    correction: int = 1
    dense_below_tokens: int = 16384
    calibration: str = dataclasses.field(default="", metadata={"table": True})
    name = "headwater"

    def __post_init__(self):
        self._probe()
        self.tables()

    def tables(self):
        if not self.calibration:
            return {}
        from headwater import calibrate

        found = calibrate.load(self.calibration)
        return {"layers": found.layers, "thresholds": found.flat_thresholds(), "windows": found.flat_windows()}

    def attend(self, layer, q, k, v):
        if q.is_cuda:
            return super().attend(layer, q, k, v)
        if self.calibration:
            raise NotImplementedError("policy headwater: a calibration on a CPU")
        if len(k) < self.dense_below_tokens:
            return dense_attention(q, k, v), dense_stats()
        table = self._probe().select(q, k)
        out = corrected_attention(q, k, v, table) if self.correction else masked_attention(
            q, k, v, lambda head, first, end: table.row_mask(torch.arange(first, end), head))
        return out, table.stats(self.name, q.shape[1])

    def _probe(self) -> Probe:
        return Probe(self.threshold, self.sink_blocks, self.window_blocks, self.dense_last_tokens, self.dense_below_tokens)


def corrected_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: BlockTable,
                        rows_at_once: int = 1024) -> torch.Tensor:
    """Attention over one list a KV head, where a block that is not listed and that all rows of the tile see counts as 128 keys
    of its mean: one key of logit q . kmean / sqrt(head_dim) + ln 128 and of value vmean. As many queries as keys."""
    group, tokens = q.shape[1] // k.shape[1], len(k)
    whole = tokens // BLOCK_KEYS
    out = torch.empty_like(q)
    means = [torch.cat([x, group_means(x, BLOCK_KEYS)[:whole].to(x.dtype)]) for x in (k, v)]
    keys, blocks = torch.arange(tokens), torch.arange(whole)
    for first in range(0, tokens, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, tokens))
        tile = rows // table.tile_positions
        complete = (blocks + 1) * BLOCK_KEYS <= (tile * table.tile_positions)[:, None] + 1
        for head in range(k.shape[1]):
            seen = table.row_mask(rows, head) & (keys <= rows[:, None])
            corrected = complete & ~table.listed[head][tile][:, :whole]
            bias = torch.full((len(rows), tokens + whole), -math.inf, dtype=q.dtype)
            bias[:, :tokens].masked_fill_(seen, 0)
            bias[:, tokens:].masked_fill_(corrected, math.log(BLOCK_KEYS))
            heads = slice(head * group, (head + 1) * group)
            k_head, v_head = (x[:, head].repeat(1, group, 1, 1) for x in means)
            one = functional.scaled_dot_product_attention(q[rows][:, heads].transpose(0, 1).unsqueeze(0), k_head, v_head,
                                                          attn_mask=bias[None, None])
            out[rows, heads] = one[0].transpose(0, 1)
    return out
