"""How much of attention may be left out by what is known of it: SparseSkeleton's figure 2, and its own mask beside.

Over evenly spread groups of 64 rows of every head, with A the dense attention and N the tokens: share of the causal pairs
that is left out, and the mass of A that goes with it, by

exact       each row's smallest A while they sum to less than epsilon
threshold   A < epsilon / N
block       the largest A of 64 rows and 64 keys < epsilon / N
block x 64  the same with 64 epsilon / N, which is the policy's threshold (tau + ln 64)
policy      what the policy's mask left out (its kernels' blocks are of 128)
"""

from typing import Any, Dict, List, Mapping

import torch

from headwater.eval.seeds.bench import Bench, OnDense, Setting
from headwater.eval.seeds.report import table

EPSILON = 0.8
SIDE = 64
NAMES = ("exact", "threshold", "block", "block x 64", "policy")


def group_of(scores: torch.Tensor, rows: torch.Tensor, attended: torch.Tensor, tokens: int) -> Dict[str, torch.Tensor]:
    """Pairs left out, bool [rows, keys], by criterion; scores: A [rows, keys], 0 after the row, keys a multiple of 64."""
    causal = torch.arange(scores.shape[1], device=scores.device) <= rows[:, None]
    ordered, place = torch.where(causal, scores, 2.0).sort(dim=-1)
    exact = torch.zeros_like(causal).scatter_(-1, place, ordered.cumsum(dim=-1) < EPSILON)
    blocks = scores.view(len(rows), -1, SIDE).amax(dim=(0, 2)).repeat_interleave(SIDE)
    level = EPSILON / tokens
    return {"exact": exact & causal, "threshold": (scores < level) & causal, "block": (blocks < level) & causal,
            "block x 64": (blocks < SIDE * level) & causal, "policy": ~attended & causal}


def measure(bench: Bench, length: int, spec: str) -> dict:
    """By criterion and head, layers after layers: [share of pairs, mass] left out."""
    policy = bench.policy(spec)
    ids = bench.text_prompts(length, 1)[0].ids
    count = min(length // SIDE, bench.args.criteria_groups)
    groups = [(2 * i + 1) * (length // SIDE) // (2 * count) for i in range(count)]  # evenly spread
    found: Dict[str, List[list]] = {name: [] for name in NAMES}

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        _, stats = policy.attend(layer, q, k, v)
        pad = -len(k) % SIDE
        sums = {name: torch.zeros(q.shape[1], 2, dtype=torch.float64, device=q.device) for name in NAMES}
        pairs = 0
        for group in groups:
            rows = torch.arange(SIDE, device=q.device) + group * SIDE
            pairs += int((rows + 1).sum())
            mask = None if stats.row_mask is None else torch.nn.functional.pad(stats.row_mask(rows), (0, pad))
            for head in range(q.shape[1]):
                scores = q[rows, head].float() @ k[:, head * k.shape[1] // q.shape[1]].float().T * q.shape[2] ** -0.5
                scores.masked_fill_(torch.arange(len(k), device=q.device) > rows[:, None], -torch.inf)
                scores = torch.nn.functional.pad(torch.softmax(scores, dim=-1), (0, pad))
                attended = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[head]
                for name, left in group_of(scores, rows, attended, length).items():
                    sums[name][head] += torch.stack([left.sum(dtype=torch.float64),
                                                     torch.where(left, scores, 0).sum(dtype=torch.float64)])
        for name in NAMES:
            scale = torch.tensor([pairs, len(groups) * SIDE], device=q.device)
            found[name] += [[round(one, 6) for one in head] for head in (sums[name] / scale).tolist()]

    bench.model.prefill(ids, OnDense(visit))
    return {"criteria": found, "tokens": length, "policy": spec}


def rows(cells_by_name: Mapping[str, Any], setting: Setting) -> List[dict]:
    """Set "criteria:NAME": value is the mean over heads of the share of pairs left out; recall_mean the mass that is kept."""
    found = []
    for cell in cells_by_name.values():
        if "criteria" not in cell:
            continue
        for name in NAMES:
            shares, masses = zip(*cell["criteria"][name])
            found.append({"params": {"model": setting.model, "tokens": cell["tokens"],
                                     "policy": cell["policy"] if name == "policy" else f"dense scores, epsilon {EPSILON}",
                                     "set": f"criteria:{name}"},
                          "metrics": {"value": sum(shares) / len(shares), "density": 1 - sum(shares) / len(shares),
                                      "recall_mean": 1 - sum(masses) / len(masses), "recall_worst_head": 1 - max(masses),
                                      "least": min(shares), "most": max(shares), "samples": len(shares)}})
    return found


def text(found: List[dict]) -> List[str]:
    lines = [[row["params"]["tokens"], row["params"]["set"].removeprefix("criteria:"), m["value"], m["least"], m["most"],
              m["recall_mean"], m["recall_worst_head"]] for row in found for m in [row["metrics"]]]
    return [f"Share of the causal pairs that is left out, mean, least and most of the heads, epsilon {EPSILON}, on evenly "
            f"spread groups of {SIDE} rows of one prompt. exact: each row's smallest scores while they sum to less than "
            "epsilon; threshold: scores below epsilon / N; block: the same of the largest of 64 x 64; block x 64: that below "
            "64 epsilon / N, the policy's own threshold; policy: its mask.", "",
            *table(("tokens", "criterion", "left out", "least", "most", "mass kept, mean", "mass kept, worst head"), lines)]


def draw(axis, cells_by_name: Mapping[str, Any]) -> None:
    """Sparsity of the heads by criterion, at the longest length."""
    found = [cell for cell in cells_by_name.values() if "criteria" in cell]
    if not found:
        axis.axis("off")
        return
    cell = max(found, key=lambda one: one["tokens"])
    shares = [[share for share, _ in cell["criteria"][name]] for name in NAMES]
    axis.boxplot(shares, showfliers=False)
    for place, some in enumerate(shares, 1):
        axis.scatter([place + 0.3] * len(some), some, s=6, alpha=0.4, color="tab:blue")
    axis.set_xticks(range(1, len(NAMES) + 1), NAMES, fontsize=8)
    axis.set_ylabel("share of the causal pairs left out")
    axis.set_title(f"sparsity of heads by criterion, {cell['tokens']} tokens, epsilon {EPSILON}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
