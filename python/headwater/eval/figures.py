"""Drawing of block maps. Imports matplotlib; callers say so where it is missing."""

from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm

matplotlib.use("Agg")

VEIL = (0.55, 0.7, 1.0, 0.6)  # over blocks that are not selected; a hue that the colour map has not
LEAST_MASS = 1e-4  # what is below is drawn as this
MOST_CELLS = 256  # a side; larger maps are pooled


def save(figure, path: Path, dpi: int = 110) -> None:
    """As PNG, whole or not at all; closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png", dpi=dpi)
    pyplot.close(figure)
    partial.replace(path)


def pooled(square: np.ndarray) -> np.ndarray:
    """At most MOST_CELLS a side, by the maximum, so that thin lines stay."""
    factor = -(-len(square) // MOST_CELLS)
    side = -(-len(square) // factor)
    padded = np.zeros((side * factor, side * factor), square.dtype)
    padded[:len(square), :len(square)] = square
    return padded.reshape(side, factor, side, factor).max(axis=(1, 3))


def draw_map(axis, average: np.ndarray, selected: Optional[np.ndarray] = None):
    """Mass per block, logarithmic, the future left blank. selected (bool, same shape): these blocks are outlined, and a
    blue veil lies on the others. Returns the image, for a colour bar."""
    mass = pooled(average)
    future = np.triu(np.ones(mass.shape, dtype=bool), 1)
    image = axis.imshow(np.ma.masked_array(np.maximum(mass, LEAST_MASS), future), cmap="inferno_r", aspect="equal",
                        norm=LogNorm(LEAST_MASS, 1), interpolation="nearest")
    if selected is not None:
        chosen = pooled(selected) & ~future
        veil = np.zeros((*mass.shape, 4))
        veil[~chosen & ~future] = VEIL
        axis.imshow(veil, interpolation="nearest", aspect="equal")
        axis.add_collection(LineCollection(outline(chosen), colors="tab:blue", linewidths=min(1.0, 40 / len(mass))))
    axis.set_xticks([])
    axis.set_yticks([])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return image


def outline(cells: np.ndarray) -> list:
    """Line segments ((x, y), (x, y)) between true and false cells, in imshow's coordinates; cells outside are false."""
    padded = np.pad(cells, 1)
    lines = []
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):  # left of cell (row - 1, column)
        lines.append(((column - 0.5, row - 1.5), (column - 0.5, row - 0.5)))
    for row, column in np.argwhere(padded[1:] != padded[:-1]):  # above cell (row, column - 1)
        lines.append(((column - 1.5, row - 0.5), (column - 0.5, row - 0.5)))
    return lines
