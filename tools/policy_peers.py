"""Selections by the published methods' own code, from checkouts of their repositories; nothing of it is part of this one.

Each peer runs its official entry point with the attention kernel behind the selection replaced by a recorder, so that what is
compared is what its attention would have been given. Repositories and commits: tools/policy_upstream.py.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, ClassVar, Dict, Iterator, Optional, Tuple
from unittest import mock

import torch

from headwater.eval.blocks import BLOCK_KEYS
from policy_masks import MaskError, visible

SHIPPED = "as_shipped"


@dataclass
class Selected:
    """Of one layer: lists of blocks, or the keys of tiles of 64 rows of each query head."""

    listed: Optional[torch.Tensor] = None  # bool [lists, tiles, blocks]
    keys: Optional[Callable[[int, int, int], torch.Tensor]] = None  # (head, first, end) to bool [end - first, tokens]
    skip_tiles: int = 0  # first tiles that follow another rule
    metrics: Dict[str, float] = field(default_factory=dict)


class Peer:
    """Base of the classes below. select() takes CUDA tensors, q [tokens, query heads, head_dim], k and v [tokens, KV heads,
    head_dim]; variants maps names to what is other than shipped, and notes is what is known of the official code."""

    name: ClassVar[str]
    policy: ClassVar[str]  # ours with the same parameters
    variants: ClassVar[Dict[str, str]]
    notes: ClassVar[str] = ""

    def tokens(self, variant: str, tokens: int) -> int:
        """How many of a prompt's tokens it is given."""
        return tokens

    def select(self, variant: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Selected:
        raise NotImplementedError


@contextlib.contextmanager
def present(modules: Dict[str, types.ModuleType]) -> Iterator[None]:
    """Modules that imports find in place of others, or of none."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def stub(name: str, **members) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


def load(path: Path, stubs: Optional[Dict[str, types.ModuleType]] = None) -> types.ModuleType:
    """A file as a module of its own."""
    if not path.is_file():
        raise MaskError(f"{path} is not there")
    spec = importlib.util.spec_from_file_location(f"headwater_upstream_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with present(stubs or {}):
        spec.loader.exec_module(module)
    return module


def load_package(root: Path, name: str, wanted: str, stubs: Dict[str, dict]) -> types.ModuleType:
    """The module `wanted` of the package in `root`, under the name `name`, whose __init__ files do not run; stubs: members of
    modules that are not to be loaded."""
    if not (root / (wanted.replace(".", "/") + ".py")).is_file():
        raise MaskError(f"{root} has no {wanted}")
    for stale in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[stale]
    for package in (".", *(path.name for path in root.iterdir() if path.is_dir())):
        full = name if package == "." else f"{name}.{package}"
        sys.modules[full] = stub(full, __path__=[str(root / package)])
    for path, members in stubs.items():
        sys.modules[f"{name}.{path}"] = stub(f"{name}.{path}", **members)
    return importlib.import_module(f"{name}.{wanted}")


class Skip:
    """In place of a Triton kernel that is not to run."""

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: None


class FlexPrefill(Peer):
    name, policy = "flexprefill", "flex:gamma=0.9,tau=0.1,min_budget_tokens=1024"
    variants = {SHIPPED: "", "f32": "Q and K in f32: logits and pooled scores are not rounded to bf16 before their softmax"}

    def __init__(self, folder: Path):
        self._module = load(folder / "flex_prefill/ops/flex_prefill_attention.py")

    def select(self, variant, q, k, v):
        if variant == "f32":
            q, k, v = q.float(), k.float(), v.float()
        taken, tokens, heads = [], len(q), q.shape[1]

        def record(q, k, v, block_idx, *_, **__):
            taken.append(block_idx)
            return q

        with mock.patch.object(self._module, "triton_block_wise_attention", record):
            self._module.flex_prefill_attention(q[None], k[None], v[None], gamma=0.9, tau=0.1, min_budget=1024)
        if not taken:
            return Selected(visible(tokens, BLOCK_KEYS, q.device).expand(heads, -1, -1))
        blocks = -(-tokens // BLOCK_KEYS)
        listed = torch.zeros(heads, blocks * blocks, dtype=torch.bool, device=q.device)
        for head, index in enumerate(taken[0][0]):
            listed[head, index.long()] = True
        return Selected(listed.view(heads, blocks, blocks))


def contiguous(function):
    """Of fla.utils: tensors are made contiguous first."""
    @functools.wraps(function)
    def call(*arguments, **keywords):
        return function(*(x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments), **keywords)

    return call


class FlashPrefill(Peer):
    name, policy = "flashprefill", "flash:alpha=0.18"
    variants = {SHIPPED: "", "exact_means": "means of K from f32 sums; its kernel sums a block in bf16"}
    notes = "one autotuning configuration a kernel; torch.compile is not used"

    def __init__(self, folder: Path):
        utils = stub("fla.utils", contiguous=contiguous, autocast_custom_fwd=torch.amp.custom_fwd(device_type="cuda"))
        stubs = {"fla": stub("fla", utils=utils), "fla.utils": utils}
        self._module = load(folder / "ops/flashprefill_native_forward.py", stubs)
        for kernel in (self._module.compute_mean_vector, self._module.compute_block_score):
            kernel.configs = kernel.configs[:1]

    def tokens(self, variant, tokens):
        return tokens // BLOCK_KEYS * BLOCK_KEYS  # its last tile counts rows past the prompt

    def select(self, variant, q, k, v):
        taken, select = {}, self._module.deal_output_score

        def record(scores, *arguments, **keywords):
            taken["scores"], taken["lists"] = scores, select(scores, *arguments, **keywords)
            return taken["lists"]

        changes = {"deal_output_score": record, "_flash_forward": Skip()}
        if variant == "exact_means":
            changes["compute_mean_vector"] = ExactMeans()
        with mock.patch.multiple(self._module, **changes), torch.compiler.set_stance("force_eager"):
            self._module.flash_prefill(q[None], k[None], v[None], torch.empty_like(q)[None], block_size=BLOCK_KEYS,
                                       attention_sink=2, window_size=4, alpha=0.18, last_n_block_full=2, min_budget=0)
        index, counts = (x[0].long() for x in taken["lists"])  # [tiles, blocks, heads], [tiles, heads]
        tiles, blocks, heads = index.shape
        chosen = torch.arange(blocks, device=q.device)[:, None] < counts[:, None]
        listed = torch.zeros(tiles, blocks + 1, heads, dtype=torch.bool, device=q.device)
        listed.scatter_(1, torch.where(chosen, index, blocks), True)
        metrics = {"score_error": score_error(q, k, taken["scores"][0])} if variant == "exact_means" else {}
        return Selected(listed[:, :blocks].permute(2, 0, 1), metrics=metrics)


class ExactMeans:
    """In place of FlashPrefill's kernel for means."""

    def __getitem__(self, grid):
        def run(k, means, *_, **__):
            means.copy_(k.unflatten(1, (-1, BLOCK_KEYS)).float().mean(dim=2))

        return run


def score_error(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor) -> float:
    """Largest difference of scores [tiles, blocks, heads] from FlashPrefill's formula in f32 torch operations: a wrong one of
    its kernels' configurations shows here."""
    tokens, dim = len(q), q.shape[2]
    means = k.unflatten(0, (-1, BLOCK_KEYS)).float().mean(dim=1).to(k.dtype).float()
    row = torch.arange(tokens, device=q.device)[:, None]
    later = row < (torch.arange(len(means), device=q.device) + 1) * BLOCK_KEYS - 1
    worst = 0.0
    for head in range(q.shape[1]):
        x = q[:, head].float() @ means[:, head * k.shape[1] // q.shape[1]].T * dim ** -0.5
        x = x.masked_fill_(later, -torch.inf).view(-1, BLOCK_KEYS, len(means))
        energy = torch.exp(x - x.amax(dim=(1, 2), keepdim=True)).sum(dim=1)
        worst = max(worst, float((energy / energy.sum(dim=1, keepdim=True) - scores[:, :, head]).abs().max()))
    return worst


class FlashPrefill2(Peer):
    name, policy = "flashprefill2", "flash2:dense_layers=0,alpha=0.1"
    variants = {SHIPPED: ""}

    def __init__(self, folder: Path):
        self._module = load(folder / "flashprefill_ops/flash_block_sparse_index_triton.py")

    def select(self, variant, q, k, v):
        tokens, heads = len(q), k.shape[1]
        ints = functools.partial(torch.tensor, dtype=torch.int32, device=q.device)
        starts, index, tiles, _ = self._module.build_block_sparse_index(
            q, k[None], ints([[0]]), ints([tokens]), ints([0, tokens]), k_block_m=128, k_block_n=128, abs_threshold=0.1,
            attention_sink=2, window_size=4, last_n_blocks=8)
        listed = torch.zeros(heads * tiles, -(-tokens // BLOCK_KEYS), dtype=torch.bool, device=q.device)
        segment = torch.repeat_interleave(torch.arange(len(listed), device=q.device), starts.diff().long())
        listed[segment, index[:len(segment)].long() // 2] = True  # tiles of 64 keys
        return Selected(listed.view(heads, tiles, -1))


class Absent(tuple):
    """What transformers says of a package that is not there, to those who ask for a tuple and to those who ask for a bool."""

    def __bool__(self):
        return False


@contextlib.contextmanager
def without_vllm() -> Iterator[None]:
    """MInference takes transformers' tuple for a bool, and vLLM for installed."""
    from transformers.utils import import_utils

    asked = import_utils._is_package_available

    def answer(name, *arguments, **keywords):
        return Absent((False, "")) if name == "vllm" else asked(name, *arguments, **keywords)

    with mock.patch.object(import_utils, "_is_package_available", answer):
        yield


class MInference(Peer):
    name, policy = "minference", "vertical_slash:n_vertical=1000,n_slash=6096"
    variants = {SHIPPED: "", "f32": "Q and K in f32: logits are not rounded to bf16 before their softmax"}

    def __init__(self, folder: Path):
        self._convert, self._taken = index_of(folder), []
        nothing = dict.fromkeys(("flexprefill_forward", "quest_forward", "block_sparse_attention", "streaming_forward",
                                 "streaming_forward2", "_flash_attn_triton_decoding"))
        stubs = {f"modules.{name}": nothing for name in ("flexprefill", "kvcompression", "quest")}
        stubs |= {f"ops.{name}": nothing for name in ("block_sparse_flash_attention", "streaming_kernel", "flash_attn_triton")}
        stubs["cuda"] = {"convert_vertical_slash_indexes": self._record}
        with without_vllm():
            self._module = load_package(folder / "minference", "headwater_upstream_minference", "modules.minference_forward",
                                        stubs)
        self._attention = self._module.vertical_slash_sparse_attention.__globals__

    def _record(self, seqlens, columns, diagonals, tokens, rows, keys):
        self._taken.append(self._convert(seqlens, columns, diagonals, tokens))
        return self._taken[-1]

    def select(self, variant, q, k, v):
        self._taken.clear()
        if variant == "f32":
            q, k, v = q.float(), k.float(), v.float()
        layer = types.SimpleNamespace(head_dim=q.shape[2], best_pattern={}, config=types.SimpleNamespace(to_dict=dict))
        with mock.patch.dict(self._attention, {"_triton_mixed_sparse_attention": lambda q, *_: q}):
            for head in range(q.shape[1]):
                own = [x[None, None, :, number].contiguous() for x, number in
                       ((q, head), *((x, head * k.shape[1] // q.shape[1]) for x in (k, v)))]
                self._module.gather_last_q_vertical_slash_topk_v4(layer, *own, head)
        taken, tokens = list(self._taken), len(q)
        return Selected(keys=lambda head, first, end: keys_of(taken[head], first, end, tokens))


def keys_of(lists: Tuple[torch.Tensor, ...], first: int, end: int, tokens: int) -> torch.Tensor:
    """Of MInference's (block_count, block_offset, column_count, column_index), one head's."""
    tiles = torch.arange(first, end, device=lists[0].device)
    mask = torch.zeros(len(tiles), tokens + 1, dtype=torch.bool, device=tiles.device)
    for counts, entries, width in ((lists[0], lists[1], 64), (lists[2], lists[3], 1)):
        counts, entries = counts[0, 0, first:end], entries[0, 0, first:end].long()
        line, place = (torch.arange(entries.shape[1], device=tiles.device) < counts[:, None]).nonzero().unbind(1)
        keys = entries[line, place][:, None] + torch.arange(width, device=tiles.device)
        mask[line[:, None].expand_as(keys), keys.clamp(max=tokens)] = True
    return mask[:, :tokens] & (torch.arange(tokens, device=tiles.device) < (tiles[:, None] + 1) * 64)


def index_of(folder: Path) -> Callable[..., tuple]:
    """MInference's kernel that makes ranges, compiled without what binds it to torch: vertical_slash_index.so of the folder,
    built where it is not there."""
    library = folder / "vertical_slash_index.so"
    if not library.is_file():
        source = (folder / "csrc/vertical_slash_index.cu").read_text()
        source = source[:source.index("std::vector<at::Tensor> convert")]
        kernel = library.with_suffix(".kernel.cu")
        left_out = ("#include <pybind11", "#include <torch")
        kernel.write_text("\n".join(line for line in source.splitlines() if not line.startswith(left_out)))
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        subprocess.run([nvcc, "-O2", "-shared", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_90,code=sm_90", "-o", library,
                        kernel], check=True, timeout=300)
    launch = ctypes.CDLL(str(library))._Z36convert_vertical_slash_indexes_64x64PKiS0_S0_PiS1_S1_S1_iiiii

    def convert(seqlens, columns, diagonals, tokens):
        (batch, heads, n_columns), n_diagonals, tiles = columns.shape, diagonals.shape[2], -(-tokens // 64)
        made = [torch.zeros(batch, heads, tiles, *more, dtype=torch.int32, device=columns.device)
                for more in ((), (n_diagonals,), (), (n_columns,))]
        torch.cuda.synchronize()  # it launches on the default stream
        launch(*(ctypes.c_void_p(x.data_ptr()) for x in (seqlens, columns, diagonals, *made)), batch, heads, tiles, n_columns,
               n_diagonals)
        torch.cuda.synchronize()
        return tuple(made)

    return convert


class XAttention(Peer):
    name, policy = "xattention", "xattention:stride=16,threshold=0.9"
    variants = {SHIPPED: "", "f32": "torch operations on f32 in place of Triton on bf16; 128 tokens fewer, since its torch "
                                    "path masks the earlier chunks of a prompt that needs no padding ([-0:])"}
    CHUNK = 2048  # tokens, as its xattention_forward() has it
    notes = (f"rows of the first chunk of {CHUNK} do not count block 0 as kept and keep one block more than needed; they are "
             "compared in all_iou_* alone")

    def __init__(self, folder: Path):
        self._module = load_package(folder / "minference", "headwater_upstream_xattention", "modules.xattention", {})

    def tokens(self, variant, tokens):
        return tokens - BLOCK_KEYS if variant == "f32" and tokens % self.CHUNK == 0 else tokens

    def select(self, variant, q, k, v):
        taken, group = [], q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, *(x.repeat_interleave(group, 1) for x in (k, v))))
        if variant == "f32":
            q, k, v = q.float(), k.float(), v.float()

        def record(q, *arguments, **_):
            taken.append(arguments[6])
            return q

        with present({"block_sparse_attn": stub("block_sparse_attn", block_sparse_attn_func=record)}), triton_on_any_gpu():
            self._module.Xattention_prefill(q, k, v, stride=16, threshold=0.9, use_triton=variant == SHIPPED,
                                            chunk_size=self.CHUNK)
        return Selected(taken[0][0], skip_tiles=self.CHUNK // BLOCK_KEYS)


@contextlib.contextmanager
def triton_on_any_gpu() -> Iterator[None]:
    """XAttention uses Triton where the device's name has "100" in it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if "100" in name:
        yield
        return
    named = types.SimpleNamespace(name=f"{name} (100)")
    with mock.patch.object(torch.cuda, "get_device_properties", lambda *_: named):
        yield


PEERS = (FlexPrefill, FlashPrefill, FlashPrefill2, MInference, XAttention)
