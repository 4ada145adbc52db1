"""Inputs and dense engines of timed attention: bench/structured_qkv.py's Q, K, V, and torch's FlashAttention 2 and cuDNN."""

import importlib.util
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from torch.nn.functional import scaled_dot_product_attention

from headwater.eval.attention import dense_attention
from headwater.eval.seeds.bench import CellError

FILE = Path(__file__).resolve().parents[4] / "bench" / "structured_qkv.py"
THETA = 500000.0  # of its rotation


def structured_qkv(tokens: int, q_heads: int, kv_heads: int, head_dim: int, seed: int, device: torch.device) -> tuple:
    """(q, k, v), bf16 on a GPU, f32 else. CellError: the file is not there."""
    if not FILE.is_file():
        raise CellError(f"{FILE} is absent: structured inputs come with the source tree")
    spec = importlib.util.spec_from_file_location("structured_qkv", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.gen(tokens, Hq=q_heads, Hk=kv_heads, D=head_dim, seed=seed, dev=device)
    return made if device.type == "cuda" else tuple(x.float() for x in made)


def dense_engines(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Dict[str, Callable[[], Any]]:
    """On a GPU torch's FlashAttention 2 ("fa2") and cuDNN ("cudnn"), causal; on a CPU its default ("sdpa")."""
    if not q.is_cuda:
        return {"sdpa": lambda: dense_attention(q, k, v)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def run(backend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return {"fa2": lambda: run(SDPBackend.FLASH_ATTENTION), "cudnn": lambda: run(SDPBackend.CUDNN_ATTENTION)}
