"""Pictures of measured layers. Needs matplotlib."""

from pathlib import Path
from typing import List

import numpy as np
from matplotlib import pyplot

from headwater.eval.figures import draw_map, save
from headwater.patterns.measure import Layer

COLUMNS = 8
MOST_LABELS = 64  # numbers are written into the cells of summaries up to this many rows and columns


def draw_layer(path: Path, layer: Layer, title: str) -> None:
    """A map a head, the selected blocks outlined."""
    columns = min(COLUMNS, len(layer.heads)) if len(layer.heads) != 8 else 4
    rows = -(-len(layer.heads) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(max(8, 3.1 * columns + 1), 3.0 * rows + 1), squeeze=False,
                                   constrained_layout=True)
    for axis in axes.flat[len(layer.heads):]:
        axis.axis("off")
    numbers = layer.as_json()["heads"]
    for axis, head, mass, selected in zip(axes.flat, numbers, layer.maps, layer.selected):
        image = draw_map(axis, mass, selected)
        axis.set_title(f"head {head['head']}: density {head['density']:.3f}, recall {head['recall']:.3f}", fontsize=9)
    figure.colorbar(image, ax=axes, label="attention per block, mean of its rows", shrink=0.6)
    figure.suptitle(f"{title}\nunder the blue veil: not selected", fontsize=11)
    save(figure, path)


def draw_summary(path: Path, layers: List[dict], title: str) -> None:
    """Density and recall by layer and head; layers as in patterns.json."""
    heads = [head["head"] for head in layers[0]["heads"]]
    panel = (max(3.5, 0.55 * len(heads) + 1.5), max(2.5, 0.32 * len(layers) + 1.2))
    figure, axes = pyplot.subplots(1, 2, figsize=(2 * min(panel[0], 14), min(panel[1], 20)), constrained_layout=True)
    for axis, key, colours in zip(axes, ("density", "recall"), ("viridis_r", "viridis")):
        values = np.array([[head[key] for head in layer["heads"]] for layer in layers])
        image = axis.imshow(values, cmap=colours, vmin=0 if key == "density" else min(0.9, values.min()), vmax=1,
                            aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axis)
        axis.set_title(f"{key}, mean {values.mean():.3f}", fontsize=10)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        label(axis.set_xticks, heads)
        label(axis.set_yticks, [layer["layer"] for layer in layers])
        if max(values.shape) <= MOST_LABELS:
            write_values(axis, values, image)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def label(set_ticks, names: list) -> None:
    """At most about MOST_LABELS of the names."""
    step = -(-len(names) // MOST_LABELS)
    set_ticks(range(0, len(names), step), names[::step], fontsize=8)


def write_values(axis, values: np.ndarray, image) -> None:
    for row, column in np.ndindex(values.shape):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axis.text(column, row, f"{values[row, column]:.3f}".removeprefix("0") if values[row, column] < 1 else "1",
                  ha="center", va="center", fontsize=7, color="white" if dark else "black")
