"""What one layer's attention looks at and what a policy attended to."""

from dataclasses import dataclass
from typing import List, Sequence

import numpy as np
import torch

from headwater.eval.attention import SCORES_BYTES, Stats
from headwater.eval.blocks import BLOCK_KEYS
from headwater.eval.maps import block_averages, column_sums
from headwater.eval.metrics import percentile


@dataclass
class Layer:
    layer: int
    ran: str
    density: float  # that the policy states, of the whole layer
    heads: List[int]
    maps: np.ndarray  # f32 [heads, blocks, blocks]
    selected: np.ndarray  # bool, the same shape: a pair of the block is attended
    densities: List[float]  # attended over causal pairs
    recalls: np.ndarray  # f32 [heads, tokens]

    def as_json(self) -> dict:
        heads = [{"head": head, "density": round(density, 6), "recall": round(float(recall.mean(dtype=np.float64)), 6),
                  "recall_p1": round(percentile(recall, 1), 6)}
                 for head, density, recall in zip(self.heads, self.densities, self.recalls)]
        return {"layer": self.layer, "ran": self.ran, "density": round(self.density, 6), "heads": heads}


def measure(layer: int, q: torch.Tensor, k: torch.Tensor, stats: Stats, heads: Sequence[int]) -> Layer:
    """All rows of the named query heads."""
    tokens, blocks = len(k), -(-len(k) // BLOCK_KEYS)
    selected = torch.zeros(len(heads), blocks, blocks, dtype=torch.bool, device=q.device)
    pairs = torch.zeros(len(heads), dtype=torch.int64)
    recalls = torch.ones(len(heads), tokens, device=q.device)
    chosen = list(heads)
    mask = None

    def visit(place: int, first: int, end: int, mass: torch.Tensor) -> None:
        nonlocal mask
        if place == 0:
            rows = torch.arange(first, end, device=q.device)
            mask = torch.arange(end, device=q.device) <= rows[:, None]
            mask = stats.row_mask(rows)[chosen, :, :end] & mask if stats.row_mask else mask.expand(len(chosen), -1, -1)
        one = mask[place]
        pairs[place] += int(one.sum())
        if stats.row_mask:
            recalls[place, first:end] = torch.where(one, mass, 0).sum(dim=-1)
        in_blocks = column_sums(column_sums(one.float(), BLOCK_KEYS).T, BLOCK_KEYS).T > 0
        of_blocks = slice(first // BLOCK_KEYS, -(-end // BLOCK_KEYS))
        selected[place, of_blocks, :of_blocks.stop] = in_blocks

    # The masks of a slice's rows are there for all query heads, a byte a pair.
    maps = block_averages(q, k, heads=heads, visit=visit, slice_bytes=max(1, SCORES_BYTES * 4 // (4 + q.shape[1])))
    causal = tokens * (tokens + 1) / 2
    return Layer(layer, stats.ran, float(stats.density()), chosen, maps.cpu().numpy(), selected.cpu().numpy(),
                 [float(count) / causal for count in pairs], recalls.cpu().numpy())
