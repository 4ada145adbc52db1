"""What policy_parity.py and policy_upstream.py share: a prompt's Q, K and V, policies and their references by name, their lists
as tables, and rows of results."""

import argparse
import datetime
import itertools
import json
import math
import subprocess
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch

from headwater import ops
from headwater.eval.blocks import BLOCK_KEYS, table_of_index, visible_blocks
from headwater.eval.policies import make
from headwater.eval.policies.probe import Probe
from headwater.ops.policies import KeyRanges, ReferenceTable

ROOT = Path(__file__).resolve().parent.parent
PER_HEAD = ("flash", "flex", "skeleton", "vertical_slash", "xattention")  # a query head alone decides
SLICE_TILES = 128  # of 64 rows, whose keys are laid out at a time


class MaskError(Exception):
    pass


@dataclass(frozen=True)
class Shape:
    layers: int  # of the model
    q_heads: int
    kv_heads: int
    head_dim: int
    rope_frequencies: Tuple[float, ...] = ()

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class Layer:
    """bf16, on the CPU: q [tokens, query heads, head_dim], k and v [tokens, KV heads, head_dim]."""

    number: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def cut(self, tokens: int) -> "Layer":
        return Layer(self.number, self.q[:tokens], self.k[:tokens], self.v[:tokens])

    def to(self, device) -> Tuple[torch.Tensor, ...]:
        return tuple(x.to(device).contiguous() for x in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Spec:
    """A policy as it was asked for: "name" or "name:parameter=number,...". "share:clusters=neighbours": all heads of the layers
    2n and 2n + 1 are one cluster."""

    text: str
    name: str
    values: Dict[str, float]
    neighbours: bool = False

    @classmethod
    def parse(cls, text: str) -> "Spec":
        name, _, rest = text.partition(":")
        values, neighbours = {}, False
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if part == "clusters=neighbours" and name == "share":
                neighbours = True
                continue
            try:
                values[key] = float(value)
            except ValueError as error:
                raise MaskError(f"policy {text}: '{part}' is not parameter=number") from error
        return cls(text, name, values, neighbours)

    @property
    def in_order(self) -> bool:
        """Layers count from 0 and leave something for later ones."""
        return self.name == "share"

    @property
    def corrected(self) -> bool:
        return self.name == "flash2" or (self.name == "headwater" and self.values.get("correction", 1) != 0)

    def model(self, shape: Shape, layers: int, heads: Optional[Tuple[int, int]] = None) -> dict:
        """The model's part of a PolicyConfig; heads: (query heads, KV heads) in place of the model's."""
        q_heads, kv_heads = heads or (shape.q_heads, shape.kv_heads)
        fields = dict(layers=layers if self.in_order else shape.layers, q_heads=q_heads, kv_heads=kv_heads,
                      head_dim=shape.head_dim)
        if self.name == "skeleton" and shape.rope_frequencies:
            fields["rope_frequencies"] = shape.rope_frequencies
        if self.neighbours:
            every = itertools.product(range(layers), range(shape.q_heads))
            fields["clusters"] = [(layer, head, layer // 2) for layer, head in every]
            fields["shared_clusters"] = list(range(-(-layers // 2)))
        return fields


class Capture:
    """A policy that attends densely and keeps Q, K and V of the layers wanted."""

    name = "capture"

    def __init__(self, layers: Sequence[int]):
        self._dense, self._wanted, self.found = make("dense"), set(layers), {}

    def attend(self, layer, q, k, v):
        if layer in self._wanted:
            self.found[layer] = Layer(layer, *(x.to("cpu", torch.bfloat16).contiguous() for x in (q, k, v)))
        return self._dense.attend(layer, q, k, v)


def capture(model, ids: Sequence[int], layers: Sequence[int]) -> List[Layer]:
    """Of a headwater.eval.model.EvalModel."""
    count = model.model.config.num_hidden_layers
    if not layers or min(layers) < 0 or max(layers) >= count or sorted(set(layers)) != list(layers):
        raise MaskError(f"layers {list(layers)}; ascending ones below the model's {count} are wanted")
    policy = Capture(layers)
    model.prefill(ids, policy)
    return [policy.found[layer] for layer in layers]


def shape_of(model) -> Shape:
    c = model.model.config
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Shape(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, dim,
                 model.policy_values().get("rope_frequencies", ()))


def prompt(arguments: argparse.Namespace, model_dir: Path, tokens: int) -> List[int]:
    """The first `tokens` ids of --prompt_ids, or the first prompt of that nominal length in the files --kv."""
    if arguments.prompt_ids is not None:
        import numpy as np

        ids = np.load(arguments.prompt_ids, allow_pickle=False)
        if ids.ndim != 1 or len(ids) < tokens:
            raise MaskError(f"{arguments.prompt_ids} has ids of shape {ids.shape}; {tokens} in a row are wanted")
        return ids[:tokens].tolist()
    import tokenizers
    from headwater.eval.items import read_items

    tokenizer, lengths = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json")), set()
    for path in arguments.kv:
        for item in read_items(path, tokenizer):
            if item.tokens() == tokens:
                return list(item.context_ids)
            lengths.add(item.tokens())
    raise MaskError(f"no prompt of {tokens} tokens in {', '.join(map(str, arguments.kv))}; they have {sorted(lengths)}")


class References:
    """Lists of policies' references on the CPU; every query head, or KV head, that decides alone is a task of the pool."""

    def __init__(self, pool: Executor, shape: Shape, layers: Sequence[Layer], limit_s: float):
        self._pool, self._shape, self._layers, self._limit_s = pool, shape, layers, limit_s

    def start(self, spec: Spec) -> List[Callable[[], ReferenceTable]]:
        """A function a layer, which waits for its table. TimeoutError after limit_s."""
        if spec.in_order:
            chain = self._pool.submit(self._in_order, spec)
            return [lambda place=place: chain.result(self._limit_s)[place] for place in range(len(self._layers))]
        found = []
        for layer in self._layers:
            if spec.name == "headwater":
                parts = [self._pool.submit(self._headwater, spec, layer)]
            else:
                parts = [self._pool.submit(self._part, spec, layer, *heads) for heads in self._heads(spec)]
            found.append(lambda parts=parts: _join([part.result(self._limit_s) for part in parts]))
        return found

    def _heads(self, spec: Spec) -> List[Tuple[slice, slice]]:
        """Query and KV heads of each part."""
        group = self._shape.group
        if spec.name == "a_shape":  # the same for all
            return [(slice(0, 1), slice(0, 1))]
        if spec.name in PER_HEAD:
            return [(slice(h, h + 1), slice(h // group, h // group + 1)) for h in range(self._shape.q_heads)]
        return [(slice(h * group, (h + 1) * group), slice(h, h + 1)) for h in range(self._shape.kv_heads)]

    def _part(self, spec: Spec, layer: Layer, queries: slice, keys: slice) -> ReferenceTable:
        values = dict(spec.values)
        if spec.name == "skeleton":  # its sample depends on the head: SampleSkeletonPair()
            values["seed"] = values.get("seed", 1) + queries.start * 2**40
        heads = (queries.stop - queries.start, keys.stop - keys.start)
        reference = ops.Reference(spec.name, values, **spec.model(self._shape, len(self._layers), heads))
        return reference.select(layer.number, layer.q[:, queries], layer.k[:, keys], layer.v[:, keys])

    def _in_order(self, spec: Spec) -> List[ReferenceTable]:
        reference = ops.Reference(spec.name, spec.values, **spec.model(self._shape, len(self._layers)))
        return [reference.select(place, layer.q, layer.k, layer.v) for place, layer in enumerate(self._layers)]

    def _headwater(self, spec: Spec, layer: Layer) -> ReferenceTable:
        """The rule of headwater.eval's policies on a CPU, in f32."""
        values = ",".join(f"{key}={int(value) if value.is_integer() else value}" for key, value in spec.values.items())
        ours = make(f"headwater:{values}")
        probe = Probe(ours.threshold, ours.sink_blocks, ours.window_blocks, ours.dense_last_tokens, ours.dense_below_tokens)
        positions, tokens = BLOCK_KEYS // self._shape.group, len(layer.q)
        if tokens < probe.min_tokens:
            listed = visible(tokens, positions, torch.device("cpu")).expand(self._shape.kv_heads, -1, -1)
        else:
            listed = probe.select(layer.q, layer.k).listed
        return ReferenceTable(listed, positions, -1, -1)


def _join(parts: Sequence[ReferenceTable]) -> ReferenceTable:
    first = parts[0]
    return ReferenceTable(torch.cat([part.listed for part in parts]), first.tile_positions, first.sink_tokens,
                          first.window_tokens)


def visible(tokens: int, positions: int, device: torch.device) -> torch.Tensor:
    """bool [tiles, blocks]: what the last query of each tile sees."""
    blocks = torch.arange(-(-tokens // BLOCK_KEYS), device=device)
    return blocks < visible_blocks(tokens, tokens, positions, device)[:, None]


def blocks_of_keys(keys: torch.Tensor, tiles: int) -> torch.Tensor:
    """bool [ceil(lines / tiles), blocks]: blocks of which one of `tiles` successive lines of keys [lines, tokens] has a key."""
    lines, tokens = keys.shape
    padded = torch.nn.functional.pad(keys, (0, -tokens % BLOCK_KEYS, 0, -lines % tiles))
    return padded.view(-(-lines // tiles), tiles, -1, BLOCK_KEYS).any(dim=3).any(dim=1)


def blocks_of_ranges(ranges: KeyRanges, lists: int, tokens: int) -> torch.Tensor:
    """bool [lists, tiles of 128 rows, blocks]."""
    tiles = -(-tokens // 64)
    return torch.stack([torch.cat([blocks_of_keys(ranges.tile_keys(number, first, min(first + SLICE_TILES, tiles)), 2)
                                   for first in range(0, tiles, SLICE_TILES)]) for number in range(lists)])


def listed_by(found, tokens: int, lists: int, positions: int, device: torch.device) -> torch.Tensor:
    """bool [lists, tiles, blocks] of a headwater.ops Selection, which is asked before its policy's next layer."""
    if found.dense:
        return visible(tokens, positions, device).expand(lists, -1, -1)
    if found.ranges is not None:
        return blocks_of_ranges(found.ranges, lists, tokens)
    table = table_of_index(found.index, tokens, tokens)
    if table.tile_positions != positions or len(table.listed) != lists:
        raise MaskError(f"{len(table.listed)} lists with tiles of {table.tile_positions} positions; {lists} of {positions} are "
                        f"wanted")
    return table.listed


@dataclass(frozen=True)
class Overlap:
    """Of two sets, a list each: f64 [lists]."""

    both: torch.Tensor
    either: torch.Tensor
    ours: torch.Tensor
    theirs: torch.Tensor

    @classmethod
    def of(cls, ours: torch.Tensor, theirs: torch.Tensor) -> "Overlap":
        """bool [lists, ...]"""
        if ours.shape != theirs.shape:
            raise MaskError(f"lists of shapes {tuple(ours.shape)} and {tuple(theirs.shape)} do not compare")
        return cls(*(x.flatten(1).sum(dim=1).double().cpu() for x in (ours & theirs, ours | theirs, ours, theirs)))

    @property
    def iou(self) -> torch.Tensor:
        return self.both / self.either.clamp(min=1)

    @property
    def differing(self) -> int:
        return int((self.either - self.both).sum())


class Rows:
    """Rows of bench/results/policies.jsonl, appended to a file as they come."""

    def __init__(self, output: Path, device: str, commit: str):
        output.parent.mkdir(parents=True, exist_ok=True)
        self._output, self._device, self._commit = output, device, commit or _commit()

    def write(self, params: dict, metrics: dict) -> None:
        rounded = {key: value if not isinstance(value, float) else float(f"{value:.6g}") if math.isfinite(value) else None
                   for key, value in metrics.items()}
        row = {"bench": "policies", "device": self._device, "commit": self._commit,
               "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "params": params,
               "metrics": rounded, "peers": {}}
        with self._output.open("a", encoding="utf-8") as output:
            output.write(json.dumps(row) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True,
                          check=False)
    return done.stdout.strip()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt_ids", type=Path, metavar="FILE.npy", help="token ids in a row; the first ones are taken")
    add("--kv", type=Path, nargs="+", default=[], metavar="FILE.jsonl", help="prompts as python -m headwater.eval reads them")
    add("--tokens", type=int, nargs="+", default=[32768, 131072])
    add("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[0, 3, 6, 9], metavar="N,N,...")
    add("--output", type=Path, required=True, metavar="ROWS.jsonl", help="appended to")
    add("--device", default="cuda:0")
    add("--commit", default="", help="where the checkout has no git history")
    add("--limit_s", type=float, default=3000, help="for the reference of one policy")
