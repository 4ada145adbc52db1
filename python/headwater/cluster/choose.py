"""Where the tree of heads is cut, and which clusters are worth sharing. NumPy only.

Two heads are near where the Jensen-Shannon distance (square root, natural logarithm, as in kernels/reference/policies/flex.h)
of their last rows of Abar is small: at run time that row is what is known of a head before its attention is computed.
"""

from dataclasses import dataclass
from typing import Callable, List, Sequence

import numpy as np

from headwater.cluster.embed import leaves
from headwater.eval.metrics import percentile


def js_distances(profiles: np.ndarray) -> np.ndarray:
    """[heads, heads] of distributions [heads, blocks]."""
    profiles = np.asarray(profiles, dtype=np.float64)
    own = _entropy(profiles)
    found = np.empty((len(profiles), len(profiles)))
    for i, one in enumerate(profiles):
        found[i] = _entropy((one + profiles) / 2) - (own[i] + own) / 2
    found = np.sqrt(np.maximum((found + found.T) / 2, 0))
    np.fill_diagonal(found, 0)
    return found


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def pairs_p90(distance: np.ndarray, members: np.ndarray) -> float:
    """90th percentile of the distances of all pairs of members; 0 of one member."""
    if len(members) < 2:
        return 0.0
    return percentile(distance[np.ix_(members, members)][np.triu_indices(len(members), 1)], 90)


def cut(merges: np.ndarray, accept: Callable[[np.ndarray], bool]) -> List[np.ndarray]:
    """Clusters, members ascending, in the order of their first members: from the root down, a node of the tree is a cluster
    where accept(its points, ascending) says so or where it is a point; else its two parts are looked at. One height for the
    whole tree would let its worst pair of heads decide for all."""
    nodes, points = leaves(merges), len(merges) + 1
    waiting, found = [len(nodes) - 1], []
    while waiting:
        node = waiting.pop()
        if node < points or accept(np.sort(nodes[node])):
            found.append(np.sort(nodes[node]))
        else:
            waiting += [int(merges[node - points, 0]), int(merges[node - points, 1])]
    return sorted(found, key=lambda members: int(members[0]))


def patterns_of(average: np.ndarray, gamma: float) -> np.ndarray:
    """bool, the shape of Abar [..., blocks, blocks]: per row the largest blocks until they sum to gamma; of equal ones the
    lower column first."""
    average = np.asarray(average, dtype=np.float64)
    order = np.argsort(-average, axis=-1, kind="stable")
    ranked = np.take_along_axis(average, order, axis=-1)
    before = np.zeros_like(ranked)
    before[..., 1:] = np.cumsum(ranked, axis=-1)[..., :-1]
    chosen = np.zeros(average.shape, dtype=bool)
    np.put_along_axis(chosen, order, (before < gamma) & (ranked > 0), axis=-1)
    return chosen


@dataclass(frozen=True)
class Trial:
    """The pattern of a cluster's pivot, its first member, on those that could take it: members of later layers."""

    density: float  # of the pattern, in blocks
    later: List[int]
    recall: List[float]  # of each of them: their attention that the pattern holds, mean over rows

    def worst(self) -> float:
        return min(self.recall, default=1.0)


def try_pivot(maps: np.ndarray, members: Sequence[int], heads_a_layer: int, rows: np.ndarray, gamma: float) -> Trial:
    """maps: Abar of all heads [heads, blocks, blocks], layer by layer; rows: queries of each block; members ascending."""
    pivot, *others = (int(head) for head in members)
    later = [head for head in others if head // heads_a_layer > pivot // heads_a_layer]
    pattern, blocks = patterns_of(maps[pivot], gamma), len(rows)
    recall = [float(np.average(np.where(pattern, maps[head], 0).sum(axis=1, dtype=np.float64), weights=rows))
              for head in later]
    return Trial(float(pattern.sum() / (blocks * (blocks + 1) / 2)), later, recall)


def why_not(trial: Trial, heads_a_layer: int, *, gamma: float, tolerance: float, max_density: float) -> str:
    """Why a cluster is not shared, "" where it is: some member lies in a later layer than the pivot, on the held-out prompt
    the pivot's pattern holds at least gamma - tolerance of the attention of each such member, and it is at most `max_density`
    of the causal blocks.

    The density rule is plain on purpose: whether the vertical-slash pattern of a head would do with fewer blocks depends on
    the prompt, and the online rule tests that on the prompt (its `fallback`). What is refused here is a pivot so dense that
    sharing it cannot pay.
    """
    if not trial.later:
        return "all heads are in one layer"
    if trial.worst() < gamma - tolerance:
        layer, head = divmod(trial.later[int(np.argmin(trial.recall))], heads_a_layer)
        return f"recall {trial.worst():.3f} of layer {layer}, head {head}"
    return f"density {trial.density:.3f}" if trial.density > max_density else ""
