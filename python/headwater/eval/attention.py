"""Exact attention of chosen rows, causal attention under a mask, and what a policy leaves behind to be measured.

Everywhere q is [tokens, query heads, head_dim], k and v [keys, KV heads, head_dim], rotated; the softmax scale is
1 / sqrt(head_dim); query head h belongs to KV head h // (query heads // KV heads).
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Optional, Sequence, Tuple

import torch
from torch.nn import functional

SCORES_BYTES = 256 << 20  # of one slice of scores


@dataclass
class Stats:
    """What attend() tells of itself. Both functions are called after the timed pass, so they may cost and synchronise."""

    ran: str  # "dense" where the policy went dense by itself
    density: Callable[[], float]  # share of the causal pairs that were computed
    # Rows' positions int64 [rows] -> bool [query heads, rows, keys], true where the row attends; causality may be left out.
    # None: every causal key.
    row_mask: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    # Of query heads, where the policy tells them apart: "pivot", "shared", "query_aware", "own".
    roles: Optional[Callable[[], Sequence[str]]] = None


def dense_stats() -> Stats:
    return Stats("dense", lambda: 1.0)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's scaled_dot_product_attention, causal; as many queries as keys. Returns [tokens, query heads, head_dim]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if not q.is_cuda:  # its fast CPU path wants equal heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     mask_of: Callable[[int, int, int], torch.Tensor], rows_at_once: int = 1024) -> torch.Tensor:
    """Attention under a mask, for small sizes: mask_of(KV head, first, end) gives bool [end - first, keys] of the queries
    [first, end), to which causality is added. Every query must attend to some key. Returns the shape of q."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    keys = torch.arange(len(k), device=q.device)
    for head in range(k.shape[1]):
        for first in range(0, len(q), rows_at_once):
            end = min(first + rows_at_once, len(q))
            seen = slice(0, end + len(k) - len(q))
            rows = torch.arange(first, end, device=q.device) + len(k) - len(q)
            mask = mask_of(head, first, end)[:, seen] & (keys[seen] <= rows[:, None])
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
            heads = slice(head * group, (head + 1) * group)
            k_head, v_head = (x[seen, head].repeat(1, group, 1, 1) for x in (k, v))
            one = functional.scaled_dot_product_attention(q[first:end, heads].transpose(0, 1).unsqueeze(0), k_head, v_head,
                                                          attn_mask=bias[None, None])
            out[first:end, heads] = one[0].transpose(0, 1)
    return out


def exact_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor,
               visit: Optional[Callable[[int, slice, torch.Tensor], None]] = None) -> torch.Tensor:
    """Dense attention, summed in f32, of the queries q [rows, query heads, head_dim] at `positions` (int64 [rows]) of the keys.

    visit(first query head, slice of rows, probabilities f32 [query heads of the group, rows of the slice, keys]) is called
    for every KV head and slice. Returns f32 [rows, query heads, head_dim].
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    keys = torch.arange(len(k), device=q.device)
    step = max(1, SCORES_BYTES // (4 * group * len(k)))
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        k_head, v_head = k[:, head].float(), v[:, head].float()
        for first in range(0, len(q), step):
            rows = slice(first, min(first + step, len(q)))
            queries = q[rows, heads].float().transpose(0, 1)
            with _tf32(q.dtype == torch.bfloat16):
                scores = torch.baddbmm(queries.new_empty(()), queries, k_head.T.expand(group, -1, -1), beta=0,
                                       alpha=1 / math.sqrt(q.shape[2]))
            seen_by_all = int(positions[rows].min()) + 1
            scores[..., seen_by_all:].masked_fill_(keys[seen_by_all:] > positions[rows, None], -math.inf)
            scores = torch.softmax(scores, dim=-1)
            if visit is not None:
                visit(heads.start, rows, scores)
            with _tf32(v.dtype == torch.bfloat16):
                out[rows, heads] = (scores @ v_head).transpose(0, 1)
    return out


@contextmanager
def _tf32(wanted: bool):
    """f32 products through tensor cores. Exact for what was bf16, which TF32 holds; probabilities lose what is under 2^-11."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def recall_and_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, stats: Stats,
                     rows: torch.Tensor) -> Tuple[torch.Tensor, float]:
    """Of the sampled queries `rows` (int64): recall f32 [query heads, rows], the mass of dense attention on the keys that the
    policy attended to, and the relative error of `out` on them, in norm, over all heads together."""
    positions = rows + len(k) - len(q)
    recall = torch.ones(q.shape[1], len(rows), device=q.device)
    mask = None if stats.row_mask is None else stats.row_mask(rows)

    def visit(head: int, part: slice, mass: torch.Tensor) -> None:
        if mask is not None:
            heads = slice(head, head + len(mass))
            recall[heads, part] = torch.where(mask[heads, part], mass, 0).sum(dim=-1)

    exact = exact_rows(q[rows], k, v, positions, visit)
    difference = (out[rows].float() - exact).norm() / exact.norm().clamp(min=1e-30)
    return recall, float(difference)
