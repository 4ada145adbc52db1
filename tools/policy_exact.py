"""Attention of chosen rows in double precision over a policy's lists, with means for what is not listed."""

import math

import torch

from headwater.eval.blocks import BLOCK_KEYS

SUPERBLOCK = 8  # blocks


class Means:
    """Mean keys and values of one KV head as kernels/cuda/block_stats.h has them, rounded to bf16: of whole blocks, and of
    whole superblocks."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.fine, self.coarse = (tuple(_means(x, size) for x in (k, v)) for size in (BLOCK_KEYS, SUPERBLOCK * BLOCK_KEYS))


def _means(x: torch.Tensor, size: int) -> torch.Tensor:
    whole = len(x) // size
    return x[:whole * size].double().view(whole, size, -1).mean(dim=1).bfloat16().double()


def mean_keys(listed: torch.Tensor, complete: torch.Tensor) -> tuple:
    """The rule of kernels/reference/mean_keys.h for rows whose tiles list `listed` (bool [rows, blocks]) and see `complete`
    (int64 [rows]) blocks whole: (blocks, superblocks) that a mean stands for, both bool [rows, ...]."""
    rows, blocks = listed.shape
    free = ~listed & (torch.arange(blocks, device=listed.device) < complete[:, None])
    groups = torch.nn.functional.pad(free, (0, -blocks % SUPERBLOCK)).view(rows, -1, SUPERBLOCK)
    alone = groups.all(dim=2)
    return (groups & ~alone[:, :, None]).view(rows, -1)[:, :blocks], alone


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, means=None,
              mean_masks=None) -> torch.Tensor:
    """f64 [rows, dim] of q [rows, dim], k and v [keys, dim], mask bool [rows, keys] with causality in it. means: Means, with
    what mean_keys() says."""
    q, values = q.double(), v.double()
    scores = (q @ k.double().T * scale).masked_fill_(~mask, -math.inf)
    if means is not None:
        for (keys, mean_values), stands, tokens in zip((means.fine, means.coarse), mean_masks,
                                                       (BLOCK_KEYS, SUPERBLOCK * BLOCK_KEYS)):
            more = q @ keys.T * scale + math.log(tokens)  # a last block that is not whole stands for nothing
            scores = torch.cat([scores, more.masked_fill_(~stands[:, :len(keys)], -math.inf)], dim=1)
            values = torch.cat([values, mean_values])
    return torch.softmax(scores, dim=1) @ values


def sample_rows(agreeing: torch.Tensor, positions: int, tokens: int, count: int, seed: int) -> torch.Tensor:
    """int64: `count` rows of tiles that `agreeing` (bool [tiles], CPU) names; none where it names none."""
    tiles = agreeing.nonzero()[:, 0]
    if not len(tiles):
        return tiles
    draw = torch.Generator().manual_seed(seed)
    chosen = tiles[torch.randint(len(tiles), (count,), generator=draw)]
    return (chosen * positions + torch.randint(positions, (count,), generator=draw)).clamp(max=tokens - 1)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-300))
