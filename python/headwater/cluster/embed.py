"""Block-average maps as points, and average-linkage clustering of them. NumPy only.

Maps are embedded by logarithm and PCA, not by an autoencoder as in the paper: PCA has no training loop, no seed and no
hyperparameters, gives the same points for the same maps, and its Euclidean distance stays that of the maps' logarithms, but
for what the left-out components hold. (The paper's autoencoder and its training are not published.)
"""

from typing import List

import numpy as np

CELLS = 64  # a side of a resized map
# Added before the logarithm. A cell of an even row holds 1 / CELLS; what is far below that is in no pattern, and with 1e-6 it
# outweighs what is.
LEAST_MASS = 1e-3


def overlaps(size: int, cells: int) -> np.ndarray:
    """[cells, size]: share of each of `size` equal parts of a line that lies in each of `cells` equal parts of it."""
    edges, parts = np.arange(cells + 1) / cells, np.arange(size + 1) / size
    common = np.minimum(edges[1:, None], parts[1:]) - np.maximum(edges[:-1, None], parts[:-1])
    return np.maximum(common, 0) * size


def by_distance(maps: np.ndarray) -> np.ndarray:
    """Columns counted back from the diagonal: result[h, I, o] is maps[h, I, I - o], 0 for o > I."""
    blocks = maps.shape[-1]
    row, offset = np.arange(blocks)[:, None], np.arange(blocks)
    return np.where(offset <= row, maps[:, row, np.maximum(row - offset, 0)], 0)


def resize(maps: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """[heads, blocks, blocks] to [heads, cells, cells] by area: rows are averaged, columns summed, so that rows still sum to
    what they did."""
    weights = overlaps(maps.shape[-1], cells)
    return weights / weights.sum(axis=1, keepdims=True) @ maps @ weights.T


def embed(maps: np.ndarray, dims: int = 64) -> np.ndarray:
    """Maps [heads, blocks, blocks] as points [heads, at most dims]: the logarithms of the map resized in (row, column) and in
    (row, distance from the diagonal), projected on their principal components. Signs are arbitrary."""
    maps = np.asarray(maps, dtype=np.float64)
    both = [np.log(LEAST_MASS + resize(one)).reshape(len(maps), -1) for one in (maps, by_distance(maps))]
    features = np.concatenate(both, axis=1)
    features -= features.mean(axis=0)
    left, values, _ = np.linalg.svd(features, full_matrices=False)
    return (left * values)[:, :dims]


def distances(points: np.ndarray) -> np.ndarray:
    """Euclidean [points, points], exactly symmetric."""
    squares = (points * points).sum(axis=1)
    found = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    found = (found + found.T) / 2
    np.fill_diagonal(found, 0)
    return found


def linkage(distance: np.ndarray) -> np.ndarray:
    """Average linkage of a symmetric [n, n]. Returns f64 [n - 1, 4] as SciPy does: the two joined nodes (points are 0 to
    n - 1, merge i makes node n + i), their mean distance, the number of points. Of equal distances the first pair, by rows.

    Each row keeps its nearest neighbour, so that a merge costs O(n) and the rows whose neighbour is gone: a mean of two
    distances is never nearer than the nearer one.
    """
    n = len(distance)
    between = np.array(distance, dtype=np.float64)
    np.fill_diagonal(between, np.inf)
    size, node = np.ones(n), np.arange(n)
    near, best = (between.argmin(axis=1), between.min(axis=1)) if n > 1 else (node, size)
    merges = np.zeros((max(n - 1, 0), 4))
    for step in range(n - 1):
        keep = int(best.argmin())
        gone = int(near[keep])
        merges[step] = [*sorted((node[keep], node[gone])), best[keep], size[keep] + size[gone]]
        joined = (size[keep] * between[keep] + size[gone] * between[gone]) / (size[keep] + size[gone])
        between[keep] = between[:, keep] = joined
        between[gone] = between[:, gone] = between[keep, keep] = np.inf
        best[gone] = np.inf
        size[keep] += size[gone]
        node[keep] = n + step
        stale = np.flatnonzero((np.isin(near, (keep, gone)) | (np.arange(n) == keep)) & np.isfinite(best))
        near[stale], best[stale] = between[stale].argmin(axis=1), between[stale].min(axis=1)
    return merges


def leaves(merges: np.ndarray) -> List[np.ndarray]:
    """The points of each node of linkage(), in the order in which a drawn tree shows them."""
    found = [np.array([point]) for point in range(len(merges) + 1)]
    for first, second, _, _ in merges:
        found.append(np.concatenate([found[int(first)], found[int(second)]]))
    return found
