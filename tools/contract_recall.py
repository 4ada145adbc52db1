"""The recall of one prompt's attention lists over all of its rows, from the report that a prefill left of them.

The lists are made again from the report's thresholds and windows, on Q, K and V of the same prompt in transformers, layer by
layer, each layer's output being the policy's own. What a row's list holds is exact: exp(lse of attention over the lists
alone, without means - lse of dense attention), of each row and query head, whatever the tiles. The floor is of block masses.
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Tuple

import torch

from headwater import ops
from headwater.eval.attention import dense_stats
from headwater.eval.blocks import BLOCK_KEYS

DEFAULT_WINDOW = 16  # blocks; of layers that are dense, where nothing comes of it
FORCED = ("density_bound", "density_floor")
SHORT = "dense_short_prompt"
FELL_BACK = "dense_recall"


@dataclass(frozen=True)
class Group:
    """What a report says of one KV head of one layer."""

    threshold: float  # 0: dense
    window: int
    density: float
    recall: Optional[float]  # of sampled rows
    rounds: int
    fallback: str


@dataclass(frozen=True)
class Report:
    """Of one prompt: a row of `headwater bench prefill --json`."""

    name: str
    tokens: int
    density: float
    min_recall: float
    layers: int  # of the model; the last one has no groups
    kv_heads: int
    parameters: Mapping[str, float]
    groups: Mapping[Tuple[int, int], Group]
    short: bool  # the whole prompt is dense

    @classmethod
    def of(cls, row: dict, layers: int, kv_heads: int) -> "Report":
        """ValueError says what the row lacks, or why its lists cannot be made again."""
        params, attention = row["params"], row.get("attention")
        name = params["prompt"]
        if params["policy"] != "headwater" or "min_recall" not in params or attention is None:
            raise ValueError(f"{name}: not a run of policy headwater with --min_recall")
        short = attention.get("fallback") == SHORT
        groups = {}
        for one in attention["groups"]:
            heads = [one["kv_head"]] if "kv_head" in one else range(kv_heads)
            groups.update({(one["layer"], head): _group(name, one) for head in heads})
        wanted = {(layer, head) for layer in range(layers - 1) for head in range(kv_heads)}
        if short:
            groups = {key: Group(0.0, DEFAULT_WINDOW, 1.0, None, 0, SHORT) for key in wanted}
        if set(groups) != wanted:
            raise ValueError(f"{name}: {len(groups)} groups; {layers - 1} layers of {kv_heads} KV heads are wanted")
        return cls(name, params["tokens"], attention["density"], params["min_recall"], layers, kv_heads,
                   params.get("policy_parameters", {}), groups, short)

    def thresholds(self) -> List[float]:
        """[layers * KV heads]; the last layer is dense."""
        return [group.threshold for group in self._flat()] + [0.0] * self.kv_heads

    def windows(self) -> List[int]:
        return [group.window for group in self._flat()] + [DEFAULT_WINDOW] * self.kv_heads

    def _flat(self) -> List[Group]:
        return [self.groups[layer, head] for layer in range(self.layers - 1) for head in range(self.kv_heads)]


def _group(name: str, one: dict) -> Group:
    fallback = one.get("fallback", "")
    if fallback in FORCED:
        raise ValueError(f"{name}: layer {one['layer']} has {fallback}; lists of a forced density cannot be made again")
    if "threshold" not in one and one["density"] < 1:
        raise ValueError(f"{name}: layer {one['layer']} has no threshold and density {one['density']}")
    return Group(one.get("threshold", 0.0), one.get("window_blocks", DEFAULT_WINDOW), one["density"], one.get("recall"),
                 one["rounds"], fallback)


class Kernels:
    """The GPU's."""

    def policy(self, report: Report, q: torch.Tensor, k: torch.Tensor):
        """A headwater.ops.PatternPolicy that has begun the prompt."""
        policy = ops.PatternPolicy("headwater", report.parameters, device=q.device, layers=report.layers, q_heads=q.shape[1],
                                   kv_heads=k.shape[1], head_dim=q.shape[2], thresholds=report.thresholds(),
                                   windows=report.windows())
        policy.begin(len(q))
        return policy

    def lse(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index=None) -> torch.Tensor:
        """f32 [tokens, query heads], of dense attention or over lists."""
        return ops.prefill_attention(q, k, v, index=index, return_lse=True)[1].lse_ln

    def block_mass(self, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return ops.block_mass(q, k, lse)


class ExactRecall:
    """A policy of headwater.eval that runs a report's lists. rows: a dict for each layer and KV head."""

    name = "contract"

    def __init__(self, kernels: Kernels, report: Report, oracle: bool):
        self._kernels, self._report, self._oracle = kernels, report, oracle
        self.rows: List[dict] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        if layer == 0:
            if k.shape[1] != self._report.kv_heads or len(q) != self._report.tokens:
                raise ValueError(f"{self._report.name}: {len(q)} tokens and {k.shape[1]} KV heads; the report is of "
                                 f"{self._report.tokens} and {self._report.kv_heads}")
            self._policy = self._kernels.policy(self._report, q, k)
        if layer == self._report.layers - 1:
            return q, dense_stats()  # nothing reads it
        out, found = self._policy.attention(layer, q, k, v)
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        density = [1.0] * heads if found.dense else densities(found.index, len(q))
        sparse = any(one < 1 for one in density)
        dense_lse = self._kernels.lse(q, k, v) if sparse or self._oracle else None
        recall = torch.ones(q.shape[:2], device=q.device)
        if sparse:
            recall = (self._kernels.lse(q, k, v, found.index) - dense_lse).exp().clamp(max=1)
        floors = least_densities(self._kernels.block_mass(q, k, dense_lse), len(q), heads,
                                 self._report.min_recall) if self._oracle else None
        for head in range(heads):
            of_head = recall[:, head * group:(head + 1) * group]
            floor = {} if floors is None else dict(zip(("floor_per_tile", "floor_mean"), floors[head]))
            told = self._told(layer, head)
            self.rows.append({**told, "dense": told["dense"] or density[head] == 1, "density": density[head],
                              "recall": float(of_head.double().mean()), "recall_p1": first_percentile(of_head),
                              "worst_head": float(of_head.double().mean(dim=0).min()), **floor})
        return out, dense_stats()

    def _told(self, layer: int, head: int) -> dict:
        group = self._report.groups[layer, head]
        return {"layer": layer, "kv_head": head, "dense": group.threshold == 0, "fell_back": group.fallback == FELL_BACK,
                "threshold": group.threshold, "window": group.window, "rounds": group.rounds, "fallback": group.fallback,
                "reported_density": group.density, "estimate": group.recall}


def measure(model, ids, report: Report, kernels: Kernels, oracle: bool) -> dict:
    """One prompt through a headwater.eval.model.EvalModel."""
    if len(ids) != report.tokens:
        raise ValueError(f"{report.name}: the prompt has {len(ids)} tokens, its report {report.tokens}")
    exact = ExactRecall(kernels, report, oracle)
    if report.short:  # nothing was searched
        exact.rows = [{**exact._told(*key), "density": 1.0, "recall": 1.0, "recall_p1": 1.0, "worst_head": 1.0}
                      for key in sorted(report.groups)]
    else:
        model.prefill(ids, exact)
    return {"name": report.name, "tokens": report.tokens, "density": report.density, "min_recall": report.min_recall,
            "groups": exact.rows}


def densities(index, tokens: int) -> List[float]:
    """Of each list of a headwater.ops.BlockIndex."""
    listed = index.listed(tokens, tokens).view(index.num_lists, -1).sum(dim=1)
    return (listed.double() / index.visible_blocks(tokens, tokens).sum()).tolist()


def first_percentile(values: torch.Tensor) -> float:
    """By nearest rank."""
    flat = values.flatten()
    return float(flat.kthvalue(max(1, math.ceil(0.01 * len(flat)))).values)


def least_densities(mass: torch.Tensor, tokens: int, kv_heads: int, recall: float) -> Dict[int, Tuple[float, float]]:
    """By KV head, the fewest blocks that hold `recall` of mass f32 [query heads, blocks, blocks], as a density:

    - in every tile: the smallest descending prefix of each;
    - on the mean over the rows of all tiles and heads together, which is what a contract promises.

    Tiles are 128 rows of one query head. The lists' own are 128 rows of all heads of a group together, 128 / heads positions
    each, so this approximates their floor. Sinks and windows are not forced.
    """
    heads, blocks, _ = mass.shape
    tile = torch.arange(blocks, device=mass.device)
    possible = blocks * (blocks + 1) // 2
    rows = torch.full((blocks, 1), BLOCK_KEYS, dtype=torch.float64, device=mass.device)
    rows[-1] = tokens - (blocks - 1) * BLOCK_KEYS
    group, found = heads // kv_heads, {}
    for head in range(kv_heads):
        of_head = mass[head * group:(head + 1) * group].double()
        per_tile = torch.minimum(fewest(of_head, recall * of_head.sum(dim=-1)), tile + 1).sum()
        weighed = (of_head * rows).flatten()
        mean = fewest(weighed, recall * weighed.sum())
        found[head] = (float(per_tile) / (group * possible), float(mean) / (group * possible))
    return found


def fewest(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """int64 [...]: how many of values [..., n], not negative, from the largest down come to `wanted` [...]."""
    ordered = values.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    return (before < wanted[..., None]).sum(dim=-1)
