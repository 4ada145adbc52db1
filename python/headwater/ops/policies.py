"""Pattern policies on the GPU, layer by layer, and their references on the CPU.

    policy = ops.PatternPolicy("flash2", {"alpha": 0.18}, layers=32, q_heads=32, kv_heads=8, head_dim=128)
    policy.begin(len(q))
    for layer in range(32):
        out, info = policy.attention(layer, q, k, v)     # info.density(), info.index
    reference = ops.Reference("flash2", {"alpha": 0.18}, layers=32, q_heads=32, kv_heads=8, head_dim=128)
    table = reference.select(layer, q, k, v)             # numpy or CPU tensors, f32

Names and parameters: kernels/pattern/parameters.h. Rules: kernels/reference/policies/.
"""

import ctypes
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional, Sequence, Tuple

import torch

from headwater.ops import library

REFERENCE_NAME = "libheadwater_reference.so"


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is told of the model besides its parameters."""

    name: str
    parameters: Mapping[str, float]
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    softmax_scale: Optional[float] = None  # 1 / sqrt(head_dim)
    rope_frequencies: Optional[Sequence[float]] = None  # "skeleton": head_dim / 2 angles a position
    clusters: Sequence[Tuple[int, int, int]] = ()  # "share": (layer, head, cluster)
    shared_clusters: Sequence[int] = ()
    thresholds: Sequence[float] = ()  # "headwater": [layers * kv_heads]
    windows: Sequence[int] = ()  # likewise, in blocks

    def structure(self) -> "library.PolicyConfig":
        """For the C interface; owns what it points to."""
        count = len(self.parameters)
        keys = (ctypes.c_char_p * max(1, count))(*(key.encode() for key in self.parameters))
        values = (ctypes.c_double * max(1, count))(*self.parameters.values())
        heads = (library.HeadCluster * max(1, len(self.clusters)))(*(library.HeadCluster(*one) for one in self.clusters))
        shared = (ctypes.c_int32 * max(1, len(self.shared_clusters)))(*self.shared_clusters)
        thresholds = (ctypes.c_float * max(1, len(self.thresholds)))(*self.thresholds)
        windows = (ctypes.c_int32 * max(1, len(self.windows)))(*self.windows)
        frequencies = None
        if self.rope_frequencies is not None:
            if len(self.rope_frequencies) != self.head_dim // 2:
                raise ValueError(f"{len(self.rope_frequencies)} rope_frequencies; {self.head_dim // 2} are wanted")
            frequencies = (ctypes.c_double * len(self.rope_frequencies))(*self.rope_frequencies)
        scale = 1 / math.sqrt(self.head_dim) if self.softmax_scale is None else self.softmax_scale
        made = library.PolicyConfig(
            name=self.name.encode(), keys=ctypes.cast(keys, ctypes.c_void_p), values=ctypes.cast(values, ctypes.c_void_p),
            num_parameters=count, num_layers=self.layers, num_q_heads=self.q_heads, num_kv_heads=self.kv_heads,
            head_dim=self.head_dim, softmax_scale=scale,
            rope_frequencies=None if frequencies is None else ctypes.cast(frequencies, ctypes.c_void_p),
            clusters=ctypes.cast(heads, ctypes.c_void_p) if self.clusters else None, num_clusters=len(self.clusters),
            shared_clusters=ctypes.cast(shared, ctypes.c_void_p) if self.shared_clusters else None,
            num_shared_clusters=len(self.shared_clusters),
            thresholds=ctypes.cast(thresholds, ctypes.c_void_p) if self.thresholds else None,
            num_thresholds=len(self.thresholds),
            windows=ctypes.cast(windows, ctypes.c_void_p) if self.windows else None, num_windows=len(self.windows))
        made.owned = (keys, values, heads, shared, frequencies, thresholds, windows)
        return made


class PatternPolicy:
    """One policy on one GPU; holds the state of one prompt. Work is enqueued on torch's current stream."""

    def __init__(self, name: str, parameters: Optional[Mapping[str, float]] = None, *, device=None, **model):
        """model: the other fields of PolicyConfig. ValueError and NotImplementedError as kernels/cuda/policy.h says."""
        self._config = PolicyConfig(name, dict(parameters or {}), **model)
        self._lib = library.load()
        self._handle = self._lib.policy_create(self._config.structure())
        self._device = torch.device("cuda" if device is None else device)
        self._memory = self._workspace = None
        self._tokens = 0

    def __del__(self):
        if getattr(self, "_handle", None):
            self._lib.policy_destroy(self._handle)

    @property
    def name(self) -> str:
        return self._config.name

    def memory_bytes(self, tokens: int) -> int:
        """Device memory for a prompt: lists, scratch, and what layers leave for later ones."""
        return self._lib.policy_memory_bytes(self._handle, tokens)

    def begin(self, tokens: int) -> None:
        """A new prompt."""
        wanted = (self.memory_bytes(tokens), self._lib.policy_workspace_bytes(self._handle, tokens))
        if self._memory is None or self._memory.numel() < wanted[0] or self._workspace.numel() < wanted[1]:
            self._memory, self._workspace = (torch.empty(max(256, size), dtype=torch.uint8, device=self._device)
                                             for size in wanted)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            self._lib.policy_begin(self._handle, tokens, self._memory.data_ptr(), self._memory.numel(), stream)
        self._tokens = tokens

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                  out: Optional[torch.Tensor] = None, return_lse: bool = False) -> Tuple[torch.Tensor, "Selection"]:
        """Search and attention of one layer of the prompt that has begun."""
        c = self._config
        if self._memory is None:
            raise ValueError("no prompt has begun")
        out = torch.empty_like(q) if out is None else out
        for name, tensor, heads in (("q", q, c.q_heads), ("k", k, c.kv_heads), ("v", v, c.kv_heads), ("out", out, c.q_heads)):
            shape = (self._tokens, heads, c.head_dim)
            if tensor.shape != shape or tensor.dtype != torch.bfloat16 or not tensor.is_contiguous() or (
                    tensor.device != self._memory.device):
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; a contiguous bf16 tensor "
                                 f"{shape} on {self._memory.device} is wanted")
        wants_lse = return_lse or self._lib.policy_wants_lse(self._handle)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if wants_lse else None
        with torch.cuda.device(self._device):
            found = self._lib.policy_attention(
                self._handle, layer, *(x.data_ptr() for x in (q, k, v, out)), lse.data_ptr() if wants_lse else None,
                self._workspace.data_ptr(), self._workspace.numel(), torch.cuda.current_stream(q.device).cuda_stream)
        return out, Selection(self, found, lse)

    def _part(self, pointer: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements at a pointer into the policy's memory; -1: all that follow."""
        begin, width = pointer - self._memory.data_ptr(), dtype.itemsize
        end = begin + count * width if count >= 0 else begin + (self._memory.numel() - begin) // width * width
        return self._memory[begin:end].view(dtype)


class Selection:
    """What a layer's attention read. Arrays are the policy's: they hold until its next layer."""

    def __init__(self, policy: PatternPolicy, found, lse: Optional[torch.Tensor]):
        c, tokens = policy._config, policy._tokens
        self.lse_ln = lse
        self.has_means = bool(found.k_means)
        self.dense = found.lists.num_lists == 0 and found.ranges.num_lists == 0
        self.index = _index(policy, found.lists) if found.lists.num_lists else None
        self.ranges = KeyRanges(policy, found.ranges) if found.ranges.num_lists else None
        self._tokens, self._heads, self._possible = tokens, c.q_heads, found.possible
        self._visited = policy._part(found.visited, 1, torch.int64).clone() if found.visited else None
        self._overflows = policy._part(found.overflows, 1, torch.int32).clone() if found.overflows else None
        # Summed by density() where the policy does not: here it would cost, and count as the policy's time.
        self._counts = self.index.counts.clone() if self.index is not None and self._visited is None else None

    def density(self) -> float:
        """Computed over causally possible blocks. Synchronises; may be called at any time."""
        if self.dense:
            return 1.0
        if self._counts is not None:
            index = dataclasses.replace(self.index, counts=self._counts)
            visible = index.visible_blocks(self._tokens, self._tokens).sum() * index.num_lists
            return float(index.listed(self._tokens, self._tokens).sum() / visible)
        return float(self._visited[0]) / self._possible

    def overflows(self) -> int:
        """Tiles that went dense for want of room. Synchronises."""
        return int(self._overflows[0]) if self._overflows is not None else 0


def _index(policy: PatternPolicy, lists):
    from headwater.ops import BlockIndex

    c, tokens = policy._config, policy._tokens
    positions = 128 // (c.q_heads // lists.num_lists)
    tiles = -(-tokens // positions)
    segments = tiles * lists.num_lists
    return BlockIndex(lists.num_lists, tiles, positions, policy._part(lists.counts, segments, torch.int32),
                      policy._part(lists.offsets, segments, torch.int64), policy._part(lists.blocks, -1, torch.int32),
                      validated=(tokens, tokens))


class KeyRanges:
    """Keys to the token, per tile of 64 rows (kernels/cuda/range_attention.h)."""

    def __init__(self, policy: PatternPolicy, found):
        self._tokens, self.num_lists = policy._tokens, found.num_lists
        tiles = -(-self._tokens // 64)
        segments = tiles * self.num_lists
        self._limits = (found.sink_tokens, found.window_tokens)
        part = policy._part
        self._ranges = (part(found.range_counts, segments, torch.int32), part(found.range_offsets, segments, torch.int64),
                        part(found.ranges, -1, torch.int32))
        self._columns = (part(found.column_counts, segments, torch.int32), part(found.column_offsets, segments, torch.int64),
                         part(found.columns, -1, torch.int32)) if found.columns else None

    def row_mask(self, rows: torch.Tensor, q_heads: int) -> torch.Tensor:
        """bool [query heads, rows, keys] of queries `rows` (int64); causality left out. Synchronises: for sampled rows."""
        mask = torch.stack([self.list_mask(number, rows) for number in range(self.num_lists)])
        return mask.expand(q_heads, -1, -1) if self.num_lists == 1 else mask

    def list_mask(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """The same of one list: bool [rows, keys]."""
        return self._keys(number, rows // 64, rows)

    def tile_keys(self, number: int, first: int, end: int) -> torch.Tensor:
        """bool [end - first, keys]: what some row of each of the tiles [first, end) of one list reads. Synchronises; takes a
        few bytes for each entry of the result."""
        tiles = torch.arange(first, end, device=self._ranges[0].device)
        keys = torch.arange(self._tokens, device=tiles.device)
        return self._keys(number, tiles, tiles * 64) & (keys < (tiles[:, None] + 1) * 64)

    def _keys(self, number: int, tiles: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Keys of tiles of one list, a sliding window ending at the row `windows`; causality left out."""
        counts, offsets, ranges = self._ranges
        segments = number * -(-self._tokens // 64) + tiles
        whole = counts[segments] < 0  # of which there are no columns
        line, entries = _entries(counts[segments].clamp(min=0), offsets[segments])
        begin, end = ranges[:len(ranges) // 2 * 2].view(-1, 2)[entries].long().clamp(max=self._tokens).unbind(1)
        edges = torch.zeros(len(tiles), self._tokens + 1, dtype=torch.int32, device=tiles.device)
        for place, change in ((begin, 1), (end, -1)):
            edges.index_put_((line, place), torch.full_like(line, change, dtype=torch.int32), accumulate=True)
        mask = edges.cumsum(1, dtype=torch.int32)[:, :-1] > 0
        sink, window = self._limits
        if window >= 0:
            keys = torch.arange(self._tokens, device=tiles.device)
            mask &= (keys < sink) | (keys > windows[:, None] - window)
        if self._columns is not None:
            column_counts, column_offsets, columns = self._columns
            line, entries = _entries(column_counts[segments].masked_fill(whole, 0), column_offsets[segments])
            mask[line, columns[entries].long()] = True
        return mask | whole[:, None]


def _entries(counts: torch.Tensor, offsets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Of lists of `counts` entries from `offsets` on: the list of each entry, and where it lies."""
    counts = counts.long()
    line = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return line, offsets[line] + torch.arange(len(line), device=counts.device) - (torch.cumsum(counts, 0) - counts)[line]


@dataclass
class ReferenceTable:
    """Block lists on the CPU."""

    listed: torch.Tensor  # bool [lists, tiles, blocks of 128 keys]; dense tiles list what they see
    tile_positions: int
    sink_tokens: int  # element mask of a_shape, or -1
    window_tokens: int


class Reference:
    """The double-precision reference of a policy on the CPU. Objects are independent, and calls release the GIL."""

    def __init__(self, name: str, parameters: Optional[Mapping[str, float]] = None, **model):
        self._config = PolicyConfig(name, dict(parameters or {}), **model)
        self._lib = _load_reference()
        handle = ctypes.c_void_p()
        self._check(self._lib.hw_reference_create(ctypes.byref(self._config.structure()), ctypes.byref(handle)))
        self._handle = handle

    def __del__(self):
        if getattr(self, "_handle", None):
            self._lib.hw_reference_destroy(self._handle)

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: Optional[torch.Tensor] = None) -> ReferenceTable:
        """q [tokens, query heads, head_dim], k and v [tokens, KV heads, head_dim]; taken as f32. Layer 0 begins a prompt."""
        c = self._config
        q, k, v = (None if x is None else x.detach().to("cpu", torch.float32).contiguous() for x in (q, k, v))
        for name, x, heads in (("q", q, c.q_heads), ("k", k, c.kv_heads), ("v", v, c.kv_heads)):
            if x is not None and x.shape != (len(q), heads, c.head_dim):
                raise ValueError(f"{name} is {tuple(x.shape)}; {(len(q), heads, c.head_dim)} is wanted")
        lists = library.ReferenceLists()
        self._check(self._lib.hw_reference_select(
            self._handle, layer, ctypes.c_int64(len(q)), *(ctypes.c_void_p(None if x is None else x.data_ptr())
                                                           for x in (q, k, v)), ctypes.byref(lists)))
        return _table(lists, len(q))

    def _check(self, status: int) -> None:
        library.check(status, self._lib.hw_reference_last_error)


def _table(lists, tokens: int) -> ReferenceTable:
    segments, blocks = lists.num_lists * lists.num_tiles, -(-tokens // 128)

    def array(pointer, kind, count):
        return torch.frombuffer(bytearray(ctypes.string_at(pointer, count * ctypes.sizeof(kind))),
                                dtype={1: torch.uint8, 4: torch.int32, 8: torch.int64}[ctypes.sizeof(kind)]) \
            if count else torch.zeros(0, dtype=torch.int64)

    dense = array(lists.dense, ctypes.c_uint8, segments).bool()
    offsets = array(lists.offsets, ctypes.c_int64, segments + 1)
    chosen = array(lists.blocks, ctypes.c_int32, int(offsets[-1])).long()
    listed = torch.zeros(segments, blocks, dtype=torch.bool)
    listed[torch.repeat_interleave(torch.arange(segments), offsets.diff()), chosen] = True
    last = (torch.arange(1, lists.num_tiles + 1) * lists.tile_positions).clamp(max=tokens) - 1
    visible = (torch.arange(blocks) <= (last // 128)[:, None]).repeat(lists.num_lists, 1)
    listed |= dense[:, None] & visible
    return ReferenceTable(listed.view(lists.num_lists, lists.num_tiles, blocks), lists.tile_positions, lists.sink_tokens,
                          lists.window_tokens)


_reference = None


def _load_reference():
    """The library, loaded once. OSError names every place that was looked at."""
    global _reference
    if _reference is None:
        given = os.environ.get("HEADWATER_REFERENCE")
        places = [Path(given)] if given else [path.with_name(REFERENCE_NAME) for path in library.candidates()]
        for path in places:
            if path.is_file():
                _reference = ctypes.CDLL(str(path))
                _reference.hw_reference_last_error.restype = ctypes.c_char_p
                return _reference
        raise OSError(f"{REFERENCE_NAME} was not found ({', '.join(map(str, places))}); build the target headwater_reference "
                      f"or set HEADWATER_REFERENCE")
    return _reference
