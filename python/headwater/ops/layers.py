"""The operations of a transformer layer besides attention, on torch tensors
(kernels/cuda/{block_stats,layer_ops,linear,quantize}.h).

Tensors are CUDA and contiguous; rows come first: [tokens, width] or [tokens, heads, head_dim]. Work is enqueued on torch's
current stream, and nothing synchronises. ValueError and NotImplementedError name what is wrong. Formulas, tolerances and
costs: kernels/README.md, "GPU layer operations".
"""

import ctypes
from dataclasses import dataclass, fields
from typing import Optional, Sequence, Tuple, Union

import torch

from headwater.ops import library

BLOCK_TOKENS = 128
BLOCKS_PER_SUPERBLOCK = 8
_DTYPES = {torch.float32: library.F32, torch.float16: library.F16, torch.bfloat16: library.BF16}
_FLOATS = (torch.bfloat16, torch.float32)
E4M3 = torch.float8_e4m3fn


def _check(name: str, tensor: torch.Tensor, dims: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> None:
    if tensor.dim() != dims or tensor.dtype not in dtypes or not tensor.is_cuda or not tensor.is_contiguous():
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; a contiguous CUDA tensor of "
                         f"{dims} dimensions, {wanted}, is wanted")


def _check_shape(name: str, tensor: Optional[torch.Tensor], shape: Sequence[int], dtype: torch.dtype,
                 device: torch.device) -> None:
    if tensor is None:
        return
    matches = tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype and tensor.device == device
    if not matches or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; contiguous "
                         f"{tuple(shape)} {dtype} on {device} is wanted")


def _address(tensor: Optional[torch.Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _run(function, args, like: torch.Tensor) -> None:
    with torch.cuda.device(like.device):
        function(args, torch.cuda.current_stream(like.device).cuda_stream)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class BlockStats:
    """Statistics by blocks of 128 tokens, f32, of a whole sequence; None: not wanted."""

    k_mean: Optional[torch.Tensor] = None  # [blocks, KV heads, head_dim]
    v_mean: Optional[torch.Tensor] = None
    k_min: Optional[torch.Tensor] = None  # elementwise bounds of K; both or neither
    k_max: Optional[torch.Tensor] = None
    k_mean_square: Optional[torch.Tensor] = None  # [blocks, KV heads] mean over tokens of |row|^2
    v_mean_square: Optional[torch.Tensor] = None
    k_max_norm: Optional[torch.Tensor] = None  # [blocks, KV heads] largest |row|
    v_max_norm: Optional[torch.Tensor] = None

    @classmethod
    def empty(cls, tokens: int, kv_heads: int, head_dim: int, device, *, bounds: bool = True) -> "BlockStats":
        """Room for everything; bounds False: not for k_min and k_max."""
        wide = lambda: torch.empty(_blocks(tokens), kv_heads, head_dim, dtype=torch.float32, device=device)  # noqa: E731
        narrow = lambda: torch.empty(_blocks(tokens), kv_heads, dtype=torch.float32, device=device)  # noqa: E731
        return cls(wide(), wide(), wide() if bounds else None, wide() if bounds else None, narrow(), narrow(), narrow(),
                   narrow())

    def views(self, tokens: int, kv_heads: int, head_dim: int, device: torch.device) -> library.BlockStats:
        """For the library; ValueError where a tensor has not room for `tokens` tokens."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is None:
                continue
            row = (kv_heads,) if field.name.endswith(("square", "norm")) else (kv_heads, head_dim)
            blocks = max(tensor.shape[0], _blocks(tokens)) if tensor.dim() else 0
            _check_shape(field.name, tensor, (blocks, *row), torch.float32, device)
        return library.BlockStats(**{field.name: _address(getattr(self, field.name)) for field in fields(self)})


def block_statistics(k: torch.Tensor, v: torch.Tensor, *, first_token: int = 0, stats: Optional[BlockStats] = None,
                     bounds: bool = True) -> BlockStats:
    """Statistics of K and V, bf16 [tokens, KV heads, head_dim]; K rotated. Of `stats` only the blocks from first_token on are
    written, a multiple of 128: what a chunk adds. Equal bits whatever the chunks."""
    _check("k", k, 3)
    _check_shape("v", v, k.shape, k.dtype, k.device)
    stats = BlockStats.empty(*k.shape, k.device, bounds=bounds) if stats is None else stats
    args = library.BlockStatisticsArgs(k=k.data_ptr(), v=v.data_ptr(), total_k=k.shape[0], num_kv_heads=k.shape[1],
                                       head_dim=k.shape[2], first_token=first_token, stats=stats.views(*k.shape, k.device))
    _run(library.load().block_statistics, args, k)
    return stats


def mean_table_coarse_row(total_k: int) -> int:
    """The first coarse row of a table of total_k tokens."""
    return library.load().mean_table_coarse_row(total_k)


def mean_tables(stats: BlockStats, total_k: int) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """K's and V's means as bf16 [KV heads, rows, head_dim]: a row per block, from mean_table_coarse_row() on one per 8 blocks;
    each part is padded with zeros to a multiple of 8. None where the mean is None."""
    lib = library.load()
    means = (stats.k_mean, stats.v_mean)
    like = next((mean for mean in means if mean is not None), None)
    if like is None:
        return None, None
    heads, dim = like.shape[1:]
    for name, mean in zip(("k_mean", "v_mean"), means):
        _check_shape(name, mean, (max(like.shape[0], _blocks(total_k)), heads, dim), torch.float32, like.device)
    tables = [None if mean is None else torch.empty(heads, lib.mean_table_rows(total_k), dim, dtype=torch.bfloat16,
                                                    device=like.device) for mean in means]
    args = library.MeanTablesArgs(k_mean=_address(means[0]), v_mean=_address(means[1]), k_table=_address(tables[0]),
                                  v_table=_address(tables[1]), total_k=total_k, num_kv_heads=heads, head_dim=dim)
    _run(lib.mean_tables, args, like)
    return tables[0], tables[1]


def embed_tokens(table: torch.Tensor, ids: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """table[ids]; bf16 table, int32 ids, rows of unknown ids are NaN. dtype: bf16 or f32, of the result."""
    _check("table", table, 2)
    _check("ids", ids, 1, (torch.int32,))
    out = torch.empty(ids.numel(), table.shape[1], dtype=dtype, device=table.device)
    args = library.EmbedTokensArgs(table=table.data_ptr(), ids=ids.data_ptr(), out=out.data_ptr(), out_dtype=_DTYPES[dtype],
                                   num_tokens=ids.numel(), vocab=table.shape[0], width=table.shape[1])
    _run(library.load().embed_tokens, args, table)
    return out


def _row_out(out: Optional[torch.Tensor], scale: Optional[torch.Tensor], shape: Sequence[int],
             device: torch.device) -> torch.Tensor:
    """Where rows go: bf16, or e4m3 with a scale for each."""
    dtype = torch.bfloat16 if scale is None else E4M3
    _check_shape("scale", scale, shape[:1], torch.float32, device)
    out = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    _check_shape("out", out, shape, dtype, device)
    return out


def quantize_rows(x: torch.Tensor, *, out: Optional[torch.Tensor] = None,
                  scale: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [rows, width], f32 [rows]) of x, bf16: x is about the first times the second."""
    _check("x", x, 2)
    scale = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device) if scale is None else scale
    out = _row_out(out, scale, x.shape, x.device)
    args = library.QuantizeRowsArgs(x=x.data_ptr(), out=out.data_ptr(), scale=scale.data_ptr(), num_rows=x.shape[0],
                                    width=x.shape[1])
    _run(library.load().quantize_rows, args, x)
    return out, scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, delta: Optional[torch.Tensor] = None,
             out: Optional[torch.Tensor] = None, scale: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x += delta in place, if given; returns x / sqrt(mean(x^2) + epsilon) * weight in bf16. x and weight: bf16 or f32.
    scale: f32 [tokens], written; the result is e4m3 then, as quantize_rows() makes it."""
    _check("x", x, 2, _FLOATS)
    _check("weight", weight, 1, _FLOATS)
    _check_shape("weight", weight, x.shape[1:], weight.dtype, x.device)
    _check_shape("delta", delta, x.shape, torch.bfloat16, x.device)
    out = _row_out(out, scale, x.shape, x.device)
    args = library.RmsNormArgs(x=x.data_ptr(), x_dtype=_DTYPES[x.dtype], delta=_address(delta), weight=weight.data_ptr(),
                               weight_dtype=_DTYPES[weight.dtype], out=out.data_ptr(), epsilon=epsilon, num_tokens=x.shape[0],
                               width=x.shape[1], scale=_address(scale))
    _run(library.load().rms_norm, args, x)
    return out


def rope_table(inverse: Union[Sequence[float], torch.Tensor], positions: Union[range, torch.Tensor], *,
               attention_factor: float = 1.0, device="cuda") -> Tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) f32 [positions, len(inverse)] of position * inverse, exact to f32. inverse: floats, or f64 on the device;
    positions: a range of step 1, or int32 or int64 on the device."""
    args = library.RopeTableArgs(attention_factor=attention_factor, head_dim=2 * len(inverse))
    if isinstance(inverse, torch.Tensor):
        _check("inverse", inverse, 1, (torch.float64,))
        device, args.inverse_device = inverse.device, inverse.data_ptr()
    else:
        host = (ctypes.c_double * len(inverse))(*inverse)
        args.inverse = ctypes.addressof(host)
    if isinstance(positions, torch.Tensor):
        _check("positions", positions, 1, (torch.int32, torch.int64))
        device = positions.device
        name = "positions_i32" if positions.dtype == torch.int32 else "positions_i64"
        setattr(args, name, positions.data_ptr())
    elif positions.step != 1:
        raise ValueError(f"positions have the step {positions.step}; 1 is wanted")
    else:
        args.begin = positions.start
    args.num_tokens = len(positions)
    cos = torch.empty(len(positions), len(inverse), dtype=torch.float32, device=device)
    sin = torch.empty_like(cos)
    args.cos, args.sin = cos.data_ptr(), sin.data_ptr()
    _run(library.load().rope_table, args, cos)
    return cos, sin


def split_qkv(qkv: torch.Tensor, q_heads: int, kv_heads: int, cos: torch.Tensor, sin: torch.Tensor, *,
              q_norm: Optional[torch.Tensor] = None, k_norm: Optional[torch.Tensor] = None, epsilon: float = 0.0,
              stats: Optional[BlockStats] = None, first_token: int = 0,
              out: Optional[Sequence[torch.Tensor]] = None) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v) bf16 [tokens, heads, head_dim] of a fused projection [tokens, (q_heads + 2 * kv_heads) * head_dim], Q and K
    rotated in pairs (i, i + head_dim / 2) after an optional RMS norm of each head. stats: filled for these tokens' blocks; of
    the sequence, row 0 is token first_token, a multiple of 128."""
    _check("qkv", qkv, 2)
    tokens, heads = qkv.shape[0], q_heads + 2 * kv_heads
    if q_heads < 1 or kv_heads < 1 or qkv.shape[1] % heads:
        raise ValueError(f"qkv is {tuple(qkv.shape)}; a width of {q_heads} + 2 * {kv_heads} heads is wanted")
    dim = qkv.shape[1] // heads
    for name, table in (("cos", cos), ("sin", sin)):
        _check_shape(name, table, (tokens, dim // 2), torch.float32, qkv.device)
    norm_dtype = next((norm.dtype for norm in (q_norm, k_norm) if norm is not None), torch.bfloat16)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        _check_shape(name, norm, (dim,), norm_dtype, qkv.device)
    shapes = [(tokens, count, dim) for count in (q_heads, kv_heads, kv_heads)]
    q, k, v = out if out is not None else [torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for shape in shapes]
    for name, tensor, shape in zip("qkv", (q, k, v), shapes):
        _check_shape(name, tensor, shape, torch.bfloat16, qkv.device)
    args = library.SplitQkvArgs(
        qkv=qkv.data_ptr(), num_tokens=tokens, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim,
        q_norm=_address(q_norm), k_norm=_address(k_norm), norm_dtype=_DTYPES[norm_dtype], epsilon=epsilon, cos=cos.data_ptr(),
        sin=sin.data_ptr(), q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), first_token=first_token)
    if stats is not None:
        args.stats = stats.views(first_token + tokens, kv_heads, dim, qkv.device)
    _run(library.load().split_qkv, args, qkv)
    return q, k, v


def silu_mul(gate_up: torch.Tensor, *, out: Optional[torch.Tensor] = None,
             scale: Optional[torch.Tensor] = None) -> torch.Tensor:
    """silu(gate) * up in bf16 [tokens, width], of gate_up [tokens, 2 * width]; scale: as rms_norm()'s."""
    _check("gate_up", gate_up, 2)
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}; an even width is wanted")
    out = _row_out(out, scale, shape, gate_up.device)
    args = library.SiluMulArgs(gate_up=gate_up.data_ptr(), out=out.data_ptr(), num_tokens=shape[0], width=shape[1],
                               scale=_address(scale))
    _run(library.load().silu_mul, args, gate_up)
    return out


def first_nonfinite_row(x: torch.Tensor) -> torch.Tensor:
    """int64 [1] on the device: the first row of x (bf16 or f32) with a NaN or an infinity, -1: none."""
    _check("x", x, 2, _FLOATS)
    row = torch.empty(1, dtype=torch.int64, device=x.device)
    args = library.FirstNonFiniteRowArgs(x=x.data_ptr(), dtype=_DTYPES[x.dtype], num_tokens=x.shape[0], width=x.shape[1],
                                         row=row.data_ptr())
    _run(library.load().first_nonfinite_row, args, x)
    return row


def pack_kv(k: torch.Tensor, v: torch.Tensor, runs: torch.Tensor, k_destination: torch.Tensor, v_destination: torch.Tensor, *,
            problems: Optional[torch.Tensor] = None) -> None:
    """Gathers tokens of K and V, bf16 [tokens, KV heads, head_dim], into flat tensors of bf16, f16 or f32, on the device or
    pinned on the host. runs: int64 [count, 3] on the device, rows (source token, tokens, destination offset in bytes).
    problems: int32 [1]; bit 0 is set if a value was not finite or beyond f16, bit 1 if a run was left out."""
    _check("k", k, 3)
    _check_shape("v", v, k.shape, k.dtype, k.device)
    _check("runs", runs, 2, (torch.int64,))
    if runs.shape[1] != 3:
        raise ValueError(f"runs is {tuple(runs.shape)}; three columns are wanted")
    if k_destination.dtype not in _DTYPES or not k_destination.is_contiguous() or not (k_destination.is_cuda or
                                                                                       k_destination.is_pinned()):
        raise ValueError(f"k_destination is {k_destination.dtype} on {k_destination.device}; bf16, f16 or f32 on the device "
                         f"or pinned is wanted")
    _check_shape("v_destination", v_destination, k_destination.shape, k_destination.dtype, k_destination.device)
    _check_shape("problems", problems, (1,), torch.int32, k.device)
    if not v_destination.is_cuda and not v_destination.is_pinned():
        raise ValueError("v_destination is not pinned")
    args = library.PackKvArgs(
        k=k.data_ptr(), v=v.data_ptr(), num_tokens=k.shape[0], num_kv_heads=k.shape[1], head_dim=k.shape[2],
        k_destination=k_destination.data_ptr(), v_destination=v_destination.data_ptr(),
        destination_bytes=k_destination.numel() * k_destination.element_size(), wire_dtype=_DTYPES[k_destination.dtype],
        runs=runs.data_ptr(), num_runs=runs.shape[0], problems=_address(problems))
    _run(library.load().pack_kv, args, k)


class Linear:
    """y = x W^T + bias (+ y) for any number of weights on one device; one stream at a time."""

    def __init__(self, device="cuda", *, workspace_bytes: int = 32 << 20, max_plans: int = 64):
        self._lib, self._handle = library.load(), None
        with torch.cuda.device(device):
            self._handle = self._lib.linear_create(library.LinearOptions(workspace_bytes=workspace_bytes, max_plans=max_plans))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._lib.linear_destroy(self._handle)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, *,
                 out: Optional[torch.Tensor] = None, dtype: torch.dtype = torch.bfloat16, accumulate: bool = False,
                 x_scale: Optional[torch.Tensor] = None, weight_scale: Optional[torch.Tensor] = None) -> torch.Tensor:
        """bf16 x [tokens, in] and weight [out, in]; bias of the result's type, bf16 or f32. accumulate: out += ...
        With scales, f32 [tokens] and [out]: e4m3 x and weight (quantize_rows()), and a bf16 bias."""
        operand = torch.bfloat16 if x_scale is None else E4M3
        _check("x", x, 2, (operand,))
        if accumulate and out is None:
            raise ValueError("accumulate without out")
        shape = (x.shape[0], weight.shape[0])
        out = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
        _check("out", out, 2, _FLOATS)
        _check_shape("out", out, shape, out.dtype, x.device)
        _check_shape("weight", weight, (shape[1], x.shape[1]), operand, x.device)
        _check_shape("bias", bias, shape[1:], out.dtype if x_scale is None else torch.bfloat16, x.device)
        _check_shape("x_scale", x_scale, shape[:1], torch.float32, x.device)
        _check_shape("weight_scale", weight_scale, shape[1:], torch.float32, x.device)
        args = library.LinearArgs(x=x.data_ptr(), weight=weight.data_ptr(), bias=_address(bias), y=out.data_ptr(),
                                  y_dtype=_DTYPES[out.dtype], accumulate=int(accumulate), num_tokens=shape[0],
                                  in_features=x.shape[1], out_features=shape[1], x_scale=_address(x_scale),
                                  weight_scale=_address(weight_scale))
        _run(lambda a, stream: self._lib.linear_run(self._handle, a, stream), args, x)
        return out
