"""Exact attention by torch's scaled_dot_product_attention: what the others are compared with."""

from dataclasses import dataclass

from headwater.eval.attention import dense_attention, dense_stats
from headwater.eval.policies import register


@register
@dataclass(frozen=True)
class Dense:
    name = "dense"

    def attend(self, layer, q, k, v):
        return dense_attention(q, k, v), dense_stats()
