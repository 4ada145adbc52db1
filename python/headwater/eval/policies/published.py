"""Published methods: the GPU's kernels, or their references in double precision with masked attention (small sizes).

Rules, sources and parameters: kernels/reference/policies/*.h and kernels/pattern/parameters.h, whose names and defaults these
are. On a GPU each prompt is one headwater.ops.PatternPolicy; lists are per query head, but for flash2's.
"""

import dataclasses
import functools
from typing import ClassVar

import torch

from headwater.eval.attention import Stats, dense_attention, dense_stats, masked_attention
from headwater.eval.blocks import BlockTable, table_of_index
from headwater.eval.policies import of_model, register

LAYERS = 4096  # more than any model has
KERNELS = -1  # dense_below_tokens: the crossover that the GPU's kernels go by


class Published:
    """Base of the classes below, whose fields are the method's parameters."""

    name: ClassVar[str]

    def __post_init__(self):
        self._run(self.heads(), 1, 128, False)  # refuses values out of range

    def heads(self) -> int:
        """That the parameters speak of: query heads of a layer."""
        return 1

    def attend(self, layer, q, k, v):
        run = self._run(q.shape[1], k.shape[1], q.shape[2], q.is_cuda)
        return (self._on_gpu if q.is_cuda else self._on_cpu)(run, layer, q, k, v)

    def tables(self) -> dict:
        """What PolicyConfig wants besides numbers."""
        return {}

    def _run(self, q_heads: int, kv_heads: int, head_dim: int, cuda: bool):
        return _make(self, q_heads, kv_heads, head_dim, cuda)

    def _on_gpu(self, run, layer, q, k, v):
        if layer == 0:
            run.begin(len(q))
        out, found = run.attention(layer, q, k, v)
        if found.dense:
            return out, dense_stats()

        def row_mask(rows: torch.Tensor) -> torch.Tensor:  # before the next layer
            if found.ranges is not None:
                return found.ranges.row_mask(rows, q.shape[1])
            return table_of_index(found.index, len(q), len(q)).stats(self.name, q.shape[1]).row_mask(rows)

        return out, Stats(self.name, found.density, row_mask)

    def _on_cpu(self, run, layer, q, k, v):
        found = run.select(layer, q, k, v)
        table = BlockTable(found.listed, found.tile_positions, len(q), len(q))
        if bool(table.listed.sum() == table.visible().sum() * len(table.listed)):
            return dense_attention(q, k, v), dense_stats()
        out = torch.empty_like(q)
        a_list, group = q.shape[1] // len(table.listed), q.shape[1] // k.shape[1]
        for number in range(len(table.listed)):
            heads = slice(number * a_list, (number + 1) * a_list)
            kv = slice(heads.start // group, heads.start // group + 1)
            out[:, heads] = masked_attention(
                q[:, heads].contiguous(), k[:, kv], v[:, kv],
                lambda _, first, end, number=number: table.row_mask(torch.arange(first, end), number))
        return out, table.stats(self.name, q.shape[1])


@functools.lru_cache(maxsize=8)  # the same for every layer of a prompt
def _make(policy: Published, q_heads: int, kv_heads: int, head_dim: int, cuda: bool):
    from headwater import ops

    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy) if not field.metadata}
    if values.get("dense_below_tokens", 0) < 0:
        del values["dense_below_tokens"]
    kind = ops.PatternPolicy if cuda else ops.Reference
    model = {"layers": LAYERS, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, **policy.tables()}
    return kind(policy.name, values, **model)


def release() -> None:
    """Gives back what policies hold between prompts: on a GPU, lists and scratch of the longest prompt of each."""
    _make.cache_clear()


@register
@dataclasses.dataclass(frozen=True)
class Flash(Published):
    alpha: float = 0.18
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_last_blocks: int = 2
    min_blocks: int = 0
    dense_below_tokens: int = KERNELS
    name = "flash"


@register
@dataclasses.dataclass(frozen=True)
class Flash2(Published):
    """On a CPU without its mean correction."""

    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_last_tiles: int = 8
    dense_layers: int = 4
    dense_tokens: int = 0
    dense_below_tokens: int = KERNELS
    name = "flash2"


@register
@dataclasses.dataclass(frozen=True)
class Flex(Published):
    gamma: float = 0.9
    tau: float = 0.1
    min_budget_tokens: int = 1024
    max_budget_tokens: int = 0
    dense_below_tokens: int = KERNELS
    name = "flex"


@register
@dataclasses.dataclass(frozen=True)
class Share(Published):
    """clusters: a file of python -m headwater.cluster; without one, pivots_per_layer."""

    gamma: float = 0.9
    similarity: float = 0.5
    fallback: float = 0.9
    query_aware: float = 0.1
    min_budget_tokens: int = 1024
    max_budget_tokens: int = 0
    pivots_per_layer: int = 0
    dense_below_tokens: int = KERNELS
    clusters: str = dataclasses.field(default="", metadata={"table": True})
    name = "share"

    def heads(self):
        return self._file().heads if self.clusters else 1

    def _file(self):
        from headwater import cluster

        return cluster.load(self.clusters)

    def tables(self):
        if not self.clusters:
            return {}
        found = self._file()
        return {"clusters": [(layer, head, number) for number, heads in found.clusters.items() for layer, head in heads],
                "shared_clusters": sorted(found.shared)}


@register
@dataclasses.dataclass(frozen=True)
class Skeleton(Published):
    sink_tokens: int = 128
    local_tokens: int = 128
    samples_per_dim: int = 80
    seed: int = 1
    ridge: float = 1e-5
    epsilon: float = 0.8
    budget_blocks: float = 0.0
    dense_below_tokens: int = KERNELS
    rope_frequencies: tuple = of_model()
    name = "skeleton"

    def tables(self):
        return {"rope_frequencies": self.rope_frequencies} if self.rope_frequencies else {}

    def _run(self, q_heads, kv_heads, head_dim, cuda):
        if not self.rope_frequencies or head_dim == 2 * len(self.rope_frequencies):
            return super()._run(q_heads, kv_heads, head_dim, cuda)
        return dataclasses.replace(self, rope_frequencies=())._run(q_heads, kv_heads, head_dim, cuda)


@register
@dataclasses.dataclass(frozen=True)
class VerticalSlash(Published):
    """On a CPU every block that the pattern touches, which is more than the pattern."""

    n_vertical: int = 1000
    n_slash: int = 6096
    last_q: int = 64
    forced_verticals: int = 30
    forced_locals: int = 100
    dense_below_tokens: int = KERNELS
    name = "vertical_slash"


@register
@dataclasses.dataclass(frozen=True)
class XAttention(Published):
    stride: int = 16
    threshold: float = 0.9
    dense_below_tokens: int = KERNELS
    name = "xattention"

