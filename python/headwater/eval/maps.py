"""Attention averaged over blocks: Abar[I, J] is the mean over the queries of block I of their attention on block J.

Shapes and scale as in headwater.eval.attention; as many queries as keys.
"""

import math
from typing import Callable, Optional, Sequence, Tuple

import torch

from headwater.eval.attention import SCORES_BYTES, Stats
from headwater.eval.blocks import BLOCK_KEYS
from headwater.eval.policies import Policy


def block_averages(q: torch.Tensor, k: torch.Tensor, *, block: int = BLOCK_KEYS, heads: Optional[Sequence[int]] = None,
                   visit: Optional[Callable[[int, int, int, torch.Tensor], None]] = None,
                   slice_bytes: int = SCORES_BYTES) -> torch.Tensor:
    """Abar in f32 [heads, blocks, blocks], of all query heads or those named; the last block may be partial. Rows sum to 1.

    visit(place in `heads`, first, end, probabilities f32 [end - first, end]) is called for the queries [first, end), all
    heads of a slice one after the other. Beside the result it takes `slice_bytes` a few times, or a block's rows of one head
    where that is more.
    """
    tokens, group = len(k), q.shape[1] // k.shape[1]
    heads = range(q.shape[1]) if heads is None else heads
    blocks = -(-tokens // block)
    averages = torch.zeros(len(heads), blocks, blocks, device=q.device)
    step = block * max(1, slice_bytes // (4 * block * tokens))
    for first in range(0, tokens, step):
        end = min(first + step, tokens)
        rows = torch.arange(first, end, device=q.device)
        later = torch.arange(end, device=q.device) > rows[:, None]
        for place, head in enumerate(heads):
            scores = q[first:end, head].float() @ k[:end, head // group].float().T / math.sqrt(q.shape[2])
            mass = torch.softmax(scores.masked_fill_(later, -math.inf), dim=-1)
            of_blocks = slice(first // block, -(-end // block))
            averages[place, of_blocks, :of_blocks.stop] = row_means(column_sums(mass, block), block)
            if visit is not None:
                visit(place, first, end, mass)
    return averages


def column_sums(x: torch.Tensor, block: int) -> torch.Tensor:
    """Sums of `block` columns each of x [rows, columns]; the last group may be partial."""
    groups = -(-x.shape[1] // block)
    return torch.nn.functional.pad(x, (0, groups * block - x.shape[1])).view(len(x), groups, block).sum(dim=-1)


def row_means(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means of `block` rows each of x [rows, columns]; the last group: of what is left."""
    sums = column_sums(x.T, block).T
    sizes = torch.full((len(sums), 1), block, device=x.device)
    sizes[-1] = len(x) - (len(sums) - 1) * block
    return sums / sizes


class Tap:
    """A policy that runs another one and shows each layer to visit(layer, q, k, stats)."""

    name = "tap"

    def __init__(self, policy: Policy, visit: Callable[[int, torch.Tensor, torch.Tensor, Stats], None]):
        self._policy, self._visit = policy, visit

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, Stats]:
        out, stats = self._policy.attend(layer, q, k, v)
        self._visit(layer, q, k, stats)
        return out, stats
