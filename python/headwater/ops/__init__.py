"""Headwater's GPU kernels on torch tensors: attention, pattern search and the other operations of a transformer layer, for
use and for measuring beside others.

    from headwater import ops

    out, info = ops.prefill_attention(q, k, v)                      # dense, causal
    out, info = ops.prefill_attention(q, k, v, policy="probe")      # block-sparse, patterns searched
    index = ops.select_blocks(q, k, threshold=0.1)                  # the search alone
    out, info = ops.prefill_attention(q, k, v, index=index)
    means = ops.mean_tables(ops.block_statistics(k, v), len(k))     # for what is not listed
    out, info = ops.prefill_attention(q, k, v, policy="probe", means=means)

Every policy by name, layer by layer, and its reference: PatternPolicy and Reference (headwater.ops.policies).

The other operations (headwater.ops.layers): embed_tokens, rms_norm, rope_table, split_qkv, silu_mul, first_nonfinite_row,
block_statistics, mean_tables, mean_table_coarse_row, pack_kv, quantize_rows, and the classes BlockStats and Linear.

What dense attention reads where (headwater.ops.mass): block_mass, row_mass, recall_of_rows.

Tensors are bf16, CUDA, contiguous: q [tokens, query heads, head_dim], k and v [tokens, KV heads, head_dim], rotated. Work
is enqueued on torch's current stream; nothing synchronises but what says so. Needs torch and a GPU of compute capability
9.0; formulas, tolerances and costs: kernels/README.md.
"""

import math
from dataclasses import dataclass, field
from typing import Optional, Tuple

import torch

from headwater.ops import library
from headwater.ops.layers import (BlockStats, Linear, block_statistics, embed_tokens, first_nonfinite_row,  # noqa: F401
                                  mean_table_coarse_row, mean_tables, pack_kv, quantize_rows, rms_norm, rope_table,
                                  silu_mul, split_qkv)
from headwater.ops.mass import block_mass, recall_of_rows, row_mass  # noqa: F401
from headwater.ops.policies import PatternPolicy, Reference  # noqa: F401

BLOCK_KEYS = 128
POLICIES = ("dense", "probe")
# Below it dense attention is as fast as search and sparse attention together (bench/attention_bench.py).
MIN_SPARSE_TOKENS = 8192


@dataclass
class BlockIndex:
    """Key blocks of 128 per query tile. Segment (list, tile) is number list * tiles + tile; tiles of a sequence start at its
    first query and hold 128 // (query heads / lists) positions. The kernel trusts an index: prefill_attention() takes one
    only for the lengths that it was validated (or made by select_blocks()) for."""

    num_lists: int  # the number of KV heads or of query heads
    tiles: int  # of one list
    tile_positions: int
    counts: torch.Tensor  # int32 [num_lists * tiles] blocks of a segment; -1: every causal block
    offsets: torch.Tensor  # int64 [num_lists * tiles] its first entry in blocks
    blocks: torch.Tensor  # int32, ascending within a segment
    overflows: Optional[torch.Tensor] = None  # uint32 [1] tiles that went dense for want of room
    validated: Optional[Tuple[int, int]] = field(default=None, repr=False)  # (q_len, kv_len) that it holds for

    def visible_blocks(self, q_len: int, kv_len: int) -> torch.Tensor:
        """int64 [tiles]: blocks that the last query of each tile can see, bottom-right aligned. One sequence."""
        tile = torch.arange(self.tiles, device=self.counts.device)
        last = torch.clamp((tile + 1) * self.tile_positions, max=q_len) - 1 + kv_len - q_len
        return torch.clamp(last, min=-1, max=kv_len - 1) // BLOCK_KEYS + 1

    def listed(self, q_len: int, kv_len: int) -> torch.Tensor:
        """int64 [num_lists * tiles]: blocks of each segment, dense ones counted."""
        visible = self.visible_blocks(q_len, kv_len).repeat(self.num_lists)
        return torch.where(self.counts < 0, visible, self.counts.long())

    def density(self, q_len: int, kv_len: int) -> float:
        """Listed over causally possible blocks. Synchronises."""
        visible = self.visible_blocks(q_len, kv_len).sum() * self.num_lists
        return float(self.listed(q_len, kv_len).sum() / visible)

    def check_shape(self, q_len: int, q_heads: int, kv_heads: int, device: torch.device) -> None:
        """ValueError where the arrays are not those of q_len queries of so many heads on that device."""
        if self.num_lists not in (kv_heads, q_heads) or q_heads % self.num_lists:
            raise ValueError(f"num_lists is {self.num_lists}; {kv_heads} (KV heads) or {q_heads} (query heads) is wanted")
        positions = 128 // (q_heads // self.num_lists)
        tiles = -(-q_len // positions)
        if (self.tile_positions, self.tiles) != (positions, tiles):
            raise ValueError(f"the index has {self.tiles} tiles of {self.tile_positions} positions; {tiles} of {positions} are "
                             f"wanted for {q_len} queries")
        for name, dtype in (("counts", torch.int32), ("offsets", torch.int64), ("blocks", torch.int32)):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; contiguous {dtype} on {device} is wanted")

    def validate(self, q_len: int, kv_len: int) -> None:
        """Of one sequence. ValueError names the first segment whose list is not ascending or leaves the range.
        Synchronises."""
        counts = self.counts.long().clamp(min=0)
        if self.counts.numel() != self.num_lists * self.tiles or self.offsets.numel() != self.counts.numel():
            raise ValueError(f"{self.counts.numel()} counts and {self.offsets.numel()} offsets for {self.num_lists} lists of "
                             f"{self.tiles} tiles")
        if bool((self.counts < -1).any()):
            raise ValueError(f"segment {int((self.counts < -1).nonzero()[0])} has a count below -1")
        ends = self.offsets + counts
        if bool((self.offsets[counts > 0] < 0).any()) or (counts.any() and int(ends[counts > 0].max()) > self.blocks.numel()):
            raise ValueError(f"a segment lies outside the {self.blocks.numel()} entries of blocks")
        segment = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
        first = torch.cumsum(counts, 0) - counts
        place = torch.arange(segment.numel(), device=counts.device) - first[segment]
        entries = self.blocks[(self.offsets[segment] + place)].long()
        visible = self.visible_blocks(q_len, kv_len).repeat(self.num_lists)[segment]
        wrong = (entries < 0) | (entries >= visible)
        wrong[1:] |= (place[1:] > 0) & (entries[1:] <= entries[:-1])
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"segment {int(segment[at])}: block {int(entries[at])} at place {int(place[at])} is not above the "
                             f"one before it, or not below {int(visible[at])}")
        self.validated = (q_len, kv_len)


@dataclass
class AttentionInfo:
    policy: str  # that ran: "dense" (also where "probe" was asked for and dense is as fast), "probe" or "index"
    index: Optional[BlockIndex] = None
    lse_ln: Optional[torch.Tensor] = None  # f32 [tokens, query heads], where asked for


def _check(name: str, tensor: torch.Tensor, like: Optional[torch.Tensor] = None) -> None:
    if tensor.dim() != 3 or tensor.dtype != torch.bfloat16 or not tensor.is_cuda or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; a contiguous bf16 CUDA tensor of "
                         f"three dimensions is wanted")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, q on {like.device}")


def _check_table(name: str, table: torch.Tensor, k: torch.Tensor, lib) -> None:
    shape = (k.shape[1], lib.mean_table_rows(k.shape[0]), k.shape[2])
    if table.shape != shape or table.dtype != torch.bfloat16 or table.device != k.device or not table.is_contiguous():
        raise ValueError(f"{name} is {tuple(table.shape)} {table.dtype} on {table.device}; contiguous {shape} bf16 on {k.device} "
                         f"is wanted")


def _scale(given: Optional[float], q: torch.Tensor) -> float:
    return 1 / math.sqrt(q.shape[2]) if given is None else given


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _forced_room(density: float, tiles: int, positions: int, q_len: int, kv_len: int, always: int) -> int:
    """Entries a tile, on average, that lists of a forced density fit in: tile t sees at most 1 + (kv_len - q_len + (t + 1) *
    positions) / 128 blocks, and at most two more than sinks and window are always listed."""
    visible = 1 + (kv_len - q_len + (tiles + 1) / 2 * positions) / BLOCK_KEYS
    return math.ceil(density * visible) + 1 + always + 2


def select_blocks(q: torch.Tensor, k: torch.Tensor, *, threshold: float = 0.18, sink_blocks: int = 2,
                  window_blocks: int = 4, dense_last_tokens: int = 32, softmax_scale: Optional[float] = None,
                  blocks_per_tile: Optional[int] = None, k_means: Optional[torch.Tensor] = None,
                  forced_density: float = 0.0) -> BlockIndex:
    """Searches the pattern of one sequence (k may be longer than q: bottom-right aligned). One list per KV head.

    A block is listed if it is worth `threshold` of its tile's best one, or is among the first or last ones
    (kernels/cuda/sm90/search_kernel.cuh). blocks_per_tile: mean room of a list, by default 64, or what forced_density needs;
    a tile that finds none left goes dense and is counted in index.overflows. k_means: K's table of mean_tables(), where
    there is one; saves a read of k. forced_density: over 0, at most 1, for measuring on inputs without a pattern: every
    tile lists that share of the blocks that it sees, the best ones; threshold is not used.
    """
    _check("q", q)
    _check("k", k, q)
    lib = library.load()
    if k_means is not None:
        _check_table("k_means", k_means, k, lib)
    device = q.device
    args = library.SearchArgs(
        q=q.data_ptr(), k=k.data_ptr(), total_q=q.shape[0], total_k=k.shape[0], num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1], head_dim=q.shape[2], softmax_scale=_scale(softmax_scale, q),
        query_position=library.BOTTOM_RIGHT, threshold=threshold, sink_blocks=sink_blocks, window_blocks=window_blocks,
        dense_last_tokens=dense_last_tokens, k_means=None if k_means is None else k_means.data_ptr(),
        forced_density=forced_density)
    positions = 128 // max(1, q.shape[1] // max(1, k.shape[1]))
    tiles = -(-q.shape[0] // positions)
    if blocks_per_tile is None:
        blocks_per_tile = 64
        if 0 < forced_density <= 1:  # else refused by the library, or not used
            blocks_per_tile = _forced_room(forced_density, tiles, positions, q.shape[0], k.shape[0], sink_blocks + window_blocks)
    if blocks_per_tile < 1:
        raise ValueError(f"blocks_per_tile is {blocks_per_tile}; at least 1 is wanted")
    segments = tiles * k.shape[1]
    with torch.cuda.device(device):
        counts = torch.empty(segments, dtype=torch.int32, device=device)
        offsets = torch.empty(segments, dtype=torch.int64, device=device)
        blocks = torch.empty(max(1, segments * blocks_per_tile), dtype=torch.int32, device=device)
        used = torch.empty(1, dtype=torch.int64, device=device)
        overflows = torch.empty(1, dtype=torch.int32, device=device)
        args.counts, args.offsets, args.blocks = counts.data_ptr(), offsets.data_ptr(), blocks.data_ptr()
        args.used, args.overflows, args.capacity = used.data_ptr(), overflows.data_ptr(), blocks.numel()
        workspace = torch.empty(lib.search_workspace_bytes(args), dtype=torch.uint8, device=device)
        lib.select_blocks(args, workspace.data_ptr(), workspace.numel(), _stream(q))
    return BlockIndex(k.shape[1], tiles, positions, counts, offsets, blocks, overflows,
                      validated=(q.shape[0], k.shape[0]))


def prefill_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, policy: str = "dense",
                      index: Optional[BlockIndex] = None, cu_seqlens: Optional[torch.Tensor] = None,
                      cu_seqlens_k: Optional[torch.Tensor] = None, softmax_scale: Optional[float] = None,
                      means: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
                      out: Optional[torch.Tensor] = None, return_lse: bool = False,
                      **search) -> Tuple[torch.Tensor, AttentionInfo]:
    """Causal attention, bottom-right aligned where k is longer than q. Returns (out, info).

    cu_seqlens: int32 [sequences + 1] on the device, for several sequences laid one after the other; cu_seqlens_k: of the
    keys, where they differ. index: block lists to use instead of a policy's; checked once (which synchronises). policy
    "probe" searches them, from MIN_SPARSE_TOKENS keys on (info.policy says what ran); `search` goes to select_blocks().
    means: tables of mean_tables(); they stand for the blocks that are not listed (CudaMeanCorrection of
    kernels/cuda/attention.h), at a few per cent of the attention's cost. Unused where dense attention runs.
    """
    _check("q", q)
    for name, tensor in (("k", k), ("v", v)):
        _check(name, tensor, q)
    if k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if policy not in POLICIES:
        raise ValueError(f"policy '{policy}' is not one of {', '.join(POLICIES)}")
    if search and policy != "probe":
        raise ValueError(f"{', '.join(search)}: only policy 'probe' takes them")
    if index is not None and policy != "dense":
        raise ValueError(f"an index is given and policy '{policy}' would search another")
    if cu_seqlens is not None and (index is not None or policy != "dense"):
        raise NotImplementedError("block lists of several sequences: only policy 'dense' without an index takes cu_seqlens")
    lib = library.load()
    if means is not None:
        for name, table in zip(("means[0]", "means[1]"), means):
            _check_table(name, table, k, lib)
        search.setdefault("k_means", means[0])
    ran = "dense" if index is None else "index"
    if policy == "probe" and k.shape[0] >= MIN_SPARSE_TOKENS:
        index, ran = select_blocks(q, k, softmax_scale=softmax_scale, **search), policy
    if index is not None:
        index.check_shape(q.shape[0], q.shape[1], k.shape[1], q.device)
        if index.validated != (q.shape[0], k.shape[0]):
            index.validate(q.shape[0], k.shape[0])
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    if out is None:
        out = torch.empty_like(q)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; as q is wanted")
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    args = library.AttentionArgs(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), lse_ln=lse.data_ptr() if return_lse else None,
        total_q=q.shape[0], total_k=k.shape[0], num_q_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2],
        softmax_scale=_scale(softmax_scale, q), num_sequences=1, query_position=library.BOTTOM_RIGHT)
    if cu_seqlens is not None:
        for offsets in (cu_seqlens, cu_seqlens_k):
            if offsets.dtype != torch.int32 or not offsets.is_cuda or offsets.numel() != cu_seqlens.numel():
                raise ValueError(f"cu_seqlens is {tuple(offsets.shape)} {offsets.dtype}; int32 on the device is wanted")
        args.num_sequences = cu_seqlens.numel() - 1
        args.cu_seqlens_q, args.cu_seqlens_k = cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr()
    if index is not None:
        args.lists = library.BlockLists(index.num_lists, index.counts.data_ptr(), index.offsets.data_ptr(),
                                        index.blocks.data_ptr())
        if means is not None:
            args.k_means, args.v_means = means[0].data_ptr(), means[1].data_ptr()
    with torch.cuda.device(q.device):
        workspace = torch.empty(max(16, lib.attention_workspace_bytes(args)), dtype=torch.uint8, device=q.device)
        lib.attention(args, workspace.data_ptr(), workspace.numel(), _stream(q))
    return out, AttentionInfo(ran, index, lse)


def merge_partials(a: torch.Tensor, a_lse_ln: torch.Tensor, b: torch.Tensor,
                   b_lse_ln: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """(out, lse_ln) of two partial results of the same queries over disjoint keys: f32 [tokens, heads, head_dim] and
    [tokens, heads]. Rows without keys (-infinity) count for nothing."""
    for name, tensor, shape in (("a", a, b.shape), ("a_lse_ln", a_lse_ln, a.shape[:-1]), ("b", b, a.shape),
                                ("b_lse_ln", b_lse_ln, a.shape[:-1])):
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != a.device or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; contiguous {tuple(shape)} f32 on "
                             f"{a.device} is wanted")
    out, lse = torch.empty_like(a), torch.empty_like(a_lse_ln)
    args = library.MergeArgs(a=a.data_ptr(), a_lse_ln=a_lse_ln.data_ptr(), b=b.data_ptr(), b_lse_ln=b_lse_ln.data_ptr(),
                             out_f32=out.data_ptr(), lse_ln=lse.data_ptr(), num_rows=a_lse_ln.numel(), head_dim=a.shape[-1])
    with torch.cuda.device(a.device):
        library.load().merge_partials(args, _stream(a))
    return out, lse
