"""How much of dense attention lies on which blocks of 128 keys (kernels/cuda/block_mass.h). One sequence, as many queries as
keys; q and k as in headwater.ops. Blocks: -(-tokens // 128)."""

import math
from typing import Optional, Sequence

import torch

from headwater.ops import library

MOST_ROWS = 65536


def block_mass(q: torch.Tensor, k: torch.Tensor, lse_ln: torch.Tensor, heads: Optional[Sequence[int]] = None, *,
               softmax_scale: Optional[float] = None) -> torch.Tensor:
    """f32 [heads, blocks, blocks], of all query heads or those named: the mean over the queries of a block of their attention
    on the keys of another. lse_ln: of prefill_attention(return_lse=True) without lists."""
    problem = _problem(q, k, softmax_scale)
    _check("lse_ln", lse_ln, q.shape[:2], torch.float32, q)
    count = q.shape[1] if heads is None else len(heads)
    for head in heads or ():
        if not 0 <= head < q.shape[1]:
            raise ValueError(f"heads has {head}; 0 to {q.shape[1] - 1} is wanted")
    chosen = None if heads is None else torch.tensor(list(heads), dtype=torch.int32, device=q.device)
    average = torch.empty(count, _blocks(len(k)), _blocks(len(k)), dtype=torch.float32, device=q.device)
    args = library.BlockMassArgs(**problem, lse_ln=lse_ln.data_ptr(), heads=None if chosen is None else chosen.data_ptr(),
                                 average=average.data_ptr(), num_heads=count)
    _run("block_mass", args, q)
    return average


def row_mass(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *,
             softmax_scale: Optional[float] = None) -> torch.Tensor:
    """f32 [rows, query heads, blocks] of the queries at `positions` (int64 [rows], at most MOST_ROWS, on the device): the mass
    of each block of keys; sums to 1. A position outside the prompt is no query: zeros."""
    problem = _problem(q, k, softmax_scale)
    _check("positions", positions, (len(positions),), torch.int64, q)
    if len(positions) > MOST_ROWS:
        raise ValueError(f"{len(positions)} positions; at most {MOST_ROWS} are wanted")
    mass = torch.empty(len(positions), q.shape[1], _blocks(len(k)), dtype=torch.float32, device=q.device)
    _run("row_mass", library.RowMassArgs(**problem, positions=positions.data_ptr(), mass=mass.data_ptr(),
                                         num_rows=len(positions)), q)
    return mass


def recall_of_rows(mass: torch.Tensor, positions: torch.Tensor, index, tokens: int) -> torch.Tensor:
    """f32 [rows, query heads]: the share of row_mass() that the lists of a BlockIndex of the prompt's `tokens` hold."""
    if mass.dim() != 3 or mass.shape[2] != _blocks(tokens):
        raise ValueError(f"mass is {tuple(mass.shape)}; [rows, query heads, {_blocks(tokens)}] is wanted for {tokens} tokens")
    _check("mass", mass, mass.shape, torch.float32, mass)
    _check("positions", positions, (len(mass),), torch.int64, mass)
    index.check_shape(tokens, mass.shape[1], index.num_lists, mass.device)
    if index.validated != (tokens, tokens):
        index.validate(tokens, tokens)
    recall = torch.empty(mass.shape[:2], dtype=torch.float32, device=mass.device)
    lists = library.BlockLists(index.num_lists, index.counts.data_ptr(), index.offsets.data_ptr(), index.blocks.data_ptr())
    _run("recall_of_rows", library.RecallOfRowsArgs(
        mass=mass.data_ptr(), positions=positions.data_ptr(), recall=recall.data_ptr(), num_tokens=tokens,
        num_q_heads=mass.shape[1], num_rows=len(mass), lists=lists), mass)
    return recall


def _blocks(tokens: int) -> int:
    return -(-tokens // 128)


def _check(name: str, tensor: torch.Tensor, shape, dtype: torch.dtype, like: torch.Tensor) -> None:
    here = tensor.is_cuda and tensor.device == like.device
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or not here or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; contiguous {tuple(shape)} "
                         f"{dtype} on a CUDA device is wanted")


def _problem(q: torch.Tensor, k: torch.Tensor, softmax_scale: Optional[float]) -> dict:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; [tokens, heads, head_dim] is wanted")
    _check("q", q, q.shape, torch.bfloat16, q)
    _check("k", k, (len(q), k.shape[1], q.shape[2]), torch.bfloat16, q)
    return {"q": q.data_ptr(), "k": k.data_ptr(), "num_tokens": len(q), "num_q_heads": q.shape[1],
            "num_kv_heads": k.shape[1], "head_dim": q.shape[2],
            "softmax_scale": 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale}


def _run(name: str, args, tensor: torch.Tensor) -> None:
    with torch.cuda.device(tensor.device):
        getattr(library.load(), name)(args, torch.cuda.current_stream(tensor.device).cuda_stream)
