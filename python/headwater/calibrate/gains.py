"""What means count for: how far the mean of exp(logit) of keys lies above exp of their mean's logit (Jensen), by KV head."""

import math
from typing import List, Sequence

import torch

from headwater.eval import policies
from headwater.eval.maps import Tap
from headwater.eval.model import EvalModel
from headwater.eval.runner import sample_rows

SUPERBLOCK = 1024  # tokens of the means that stand for what is far away (CudaMeanCorrection)
NEAR = 2048  # tokens before a query that lists mostly hold
ROWS = 64  # sampled of a prompt
MOST = 4.0  # where means stand for so little of the mass, their direction is not its either
LEAST_MASS = 1e-4  # of attention on what is far, on average: with less there is nothing to fit


def far_masses(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple:
    """(f64 attention mass, mass by means) of superblocks but the first that end more than NEAR before the queries, summed over
    queries and heads. q: [rows, heads of one KV head, head_dim] at `positions`; k: [keys, head_dim]."""
    count = len(k) // SUPERBLOCK
    keys = torch.arange(len(k), device=k.device)
    far = torch.arange(1, count + 1, device=k.device) * SUPERBLOCK <= (positions[:, None] - NEAR)
    far[:, :1] = False
    k = k.float()
    scale = q.shape[2] ** -0.5
    means = k[:count * SUPERBLOCK].view(count, SUPERBLOCK, -1).mean(dim=1)
    true = by_means = 0.0
    for head in range(q.shape[1]):
        rows = q[:, head].float() * scale
        logits = (rows @ k.T).masked_fill_(keys > positions[:, None], -math.inf)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        mass = torch.exp(logits - lse)[:, :count * SUPERBLOCK].view(len(q), count, SUPERBLOCK).sum(dim=-1)
        guess = SUPERBLOCK * torch.exp(rows @ means.T - lse)
        true += float((mass * far).double().sum())
        by_means += float((guess * far).double().sum())
    return true, by_means


def fit(model: EvalModel, prompts: Sequence[Sequence[int]], seed: int) -> List[float]:
    """Nats by layer and KV head, over prompts (token ids): with them, what means stand for weighs in sum what it should."""
    heads = model.model.config.num_key_value_heads
    sums = [[0.0, 0.0] for _ in range(model.model.config.num_hidden_layers * heads)]
    total = 0

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, stats) -> None:
        group = q.shape[1] // heads
        for head in range(heads):
            found = far_masses(q[positions, head * group:(head + 1) * group], k[:, head], positions)
            for i in range(2):
                sums[layer * heads + head][i] += found[i] / group

    for number, ids in enumerate(prompts):
        positions = sample_rows(len(ids), ROWS, seed, str(number)).to(model.device)
        positions = positions[positions >= NEAR + 2 * SUPERBLOCK]
        if len(positions) == 0:
            continue
        total += len(positions)
        model.prefill(ids, Tap(policies.make("dense"), visit))
    return [gain_of(true, by_means, total) for true, by_means in sums]


def gain_of(true: float, by_means: float, rows: int) -> float:
    if not (true > LEAST_MASS * rows and by_means > 0):
        return 0.0
    return min(MOST, max(-MOST, math.log(true / by_means)))
