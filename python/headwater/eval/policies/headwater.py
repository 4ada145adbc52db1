"""Headwater's own policy: on a GPU its kernels; on a CPU the rule of `probe`, and a mean key and value for each block of keys
that is not listed and that all rows of the tile see (the GPU takes one for eight blocks where none of them is listed)."""

import dataclasses

import torch

from headwater.eval.attention import dense_attention, dense_stats, masked_attention
from headwater.eval.policies import register
from headwater.eval.policies.probe import Probe
from headwater.eval.policies.published import Published


@register
@dataclasses.dataclass(frozen=True)
class Headwater(Published):
    threshold: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_last_tokens: int = 256
    correction: int = 1
    dense_below_tokens: int = 8192
    name = "headwater"

    def __post_init__(self):
        self._probe()

    def _probe(self) -> Probe:
        return Probe(self.threshold, self.sink_blocks, self.window_blocks, self.dense_last_tokens, self.dense_below_tokens)

    def attend(self, layer, q, k, v):
        if q.is_cuda:
            return super().attend(layer, q, k, v)
        if len(k) < self.dense_below_tokens:
            return dense_attention(q, k, v), dense_stats()
        table = self._probe().select(q, k)
        stats = table.stats(self.name, q.shape[1])
        if not self.correction:
            return self._masked(q, k, v, table), stats
        raise NotImplementedError("mean correction on a CPU")

    def _masked(self, q, k, v, table):
        return masked_attention(q, k, v, lambda head, first, end: table.row_mask(torch.arange(first, end), head))
