"""Pictures of a clustering: distances of all heads in the tree's order, and each cluster's mean map. Needs matplotlib."""

from pathlib import Path
from typing import List

import numpy as np
from matplotlib import pyplot
from matplotlib.patches import Rectangle

from headwater.cluster.embed import leaves
from headwater.cluster.file import Clusters
from headwater.eval.figures import draw_map, save

A_PAGE = 24  # clusters


def write(folder: Path, clusters: Clusters, maps: np.ndarray, near: np.ndarray, far: np.ndarray,
          merges: np.ndarray) -> List[Path]:
    """distances.png and clusters_1.png, ...; maps: mean Abar of each head, near: Jensen-Shannon, far: of the embedding."""
    written = [folder / "distances.png"]
    draw_distances(written[0], clusters, near, far, merges)
    tests = clusters.calibration["tests"]
    ordered = sorted(map(int, tests), key=lambda name: (name not in clusters.shared, -len(clusters.clusters[name])))
    for first in range(0, len(ordered), A_PAGE):
        written.append(folder / f"clusters_{first // A_PAGE + 1}.png")
        draw_clusters(written[-1], clusters, ordered[first:first + A_PAGE], maps)
    return written


def draw_distances(path: Path, clusters: Clusters, near: np.ndarray, far: np.ndarray, merges: np.ndarray) -> None:
    order = leaves(merges)[-1]
    figure, axes = pyplot.subplots(1, 3, figsize=(19, 7.6), constrained_layout=True, width_ratios=(1, 3, 3))
    draw_tree(axes[0], merges, order)
    for axis, matrix, title in ((axes[1], far, "distance of embedded maps (the tree's)"),
                                (axes[2], near, "Jensen-Shannon distance of last rows (the cut's)")):
        image = axis.imshow(matrix[np.ix_(order, order)], cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.8)
        axis.set_title(title)
        axis.set_xticks([])
        label_heads(axis, clusters, order)
        box_clusters(axis, clusters, order)
    figure.suptitle(f"{clusters.model}: {len(order)} heads in the order of the tree; boxes are clusters, red ones are shared")
    save(figure, path)


def label_heads(axis, clusters: Clusters, order: np.ndarray) -> None:
    """layer.head where there is room for it."""
    if len(order) > 128:
        axis.set_yticks([])
        return
    axis.set_yticks(range(len(order)), ["{}.{}".format(*divmod(int(head), clusters.heads)) for head in order],
                    fontsize=max(4, min(9, 500 / len(order))))
    axis.tick_params(axis="y", length=0)


def box_clusters(axis, clusters: Clusters, order: np.ndarray) -> None:
    place = {int(head): i for i, head in enumerate(order)}
    for name, members in clusters.clusters.items():
        if len(members) > 1:
            first = min(place[layer * clusters.heads + head] for layer, head in members)
            shared = name in clusters.shared
            axis.add_patch(Rectangle((first - 0.5, first - 0.5), len(members), len(members), fill=False,
                                     edgecolor="tab:red" if shared else "white", linewidth=1.8 if shared else 0.9))


def draw_tree(axis, merges: np.ndarray, order: np.ndarray) -> None:
    """The root at the left, leaves at the right, level with the rows of the matrix beside it."""
    height, place = [0.0] * len(order), [0.0] * len(order)
    for i, head in enumerate(order):
        place[head] = float(i)
    for first, second, distance, _ in merges:
        first, second = int(first), int(second)
        axis.plot([height[first], distance, distance, height[second]],
                  [place[first], place[first], place[second], place[second]], color="0.3", linewidth=0.8)
        height.append(distance)
        place.append((place[first] + place[second]) / 2)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.invert_xaxis()
    axis.set_yticks([])
    axis.set_xlabel("distance of joined groups")
    for side in ("left", "top", "right"):
        axis.spines[side].set_visible(False)


def draw_clusters(path: Path, clusters: Clusters, names: List[int], maps: np.ndarray) -> None:
    columns = min(6, len(names))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(max(9, 3 * columns + 1), 3.2 * rows + 1), squeeze=False,
                                   constrained_layout=True)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        members, test = clusters.clusters[name], clusters.calibration["tests"][str(name)]
        image = draw_map(axis, np.mean([maps[layer * clusters.heads + head] for layer, head in members], axis=0))
        listed = " ".join(f"{layer}.{head}" for layer, head in members[:6]) + (" ..." if len(members) > 6 else "")
        state = "shared" if name in clusters.shared else "not shared"
        recall = f"recall {test['recall_min']:.3f}" if test["heads"] else "one layer"
        axis.set_title(f"cluster {name}: {len(members)} heads, {state}\n{listed}\n{recall}, density {test['density']:.3f}",
                       fontsize=9, color="tab:red" if name in clusters.shared else "black")
    figure.colorbar(image, ax=axes, label="attention per block, mean of the heads' rows", shrink=0.6)
    figure.suptitle(f"{clusters.model}: mean maps; recall (least) and density of the pivot's pattern, held out", fontsize=11)
    save(figure, path)
