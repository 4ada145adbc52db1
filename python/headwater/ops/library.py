"""The C interface of libheadwater_kernels.so (kernels/headwater_kernels.h) through ctypes."""

import ctypes
import os
from pathlib import Path

ABI_VERSION = 1
BOTTOM_RIGHT = -(2**31)
NAME = "libheadwater_kernels.so"
_STATUS = {3: ValueError, 8: MemoryError, 12: NotImplementedError, 13: RuntimeError}


class BlockLists(ctypes.Structure):
    _fields_ = [("num_lists", ctypes.c_int32), ("counts", ctypes.c_void_p), ("offsets", ctypes.c_void_p),
                ("blocks", ctypes.c_void_p)]


def _sized(name: str, fields: list) -> type:
    """A structure that begins with its own size and fills it in."""

    def init(self, **values):
        ctypes.Structure.__init__(self, struct_size=ctypes.sizeof(type(self)), **values)

    return type(name, (ctypes.Structure,), {"_fields_": [("struct_size", ctypes.c_uint32), *fields], "__init__": init})


def _pointers(*names: str) -> list:
    return [(name, ctypes.c_void_p) for name in names]


def _ints(*names: str) -> list:
    return [(name, ctypes.c_int32) for name in names]


AttentionArgs = _sized("AttentionArgs", [
    *_pointers("q", "k", "v", "out", "out_f32", "lse_ln"), ("total_q", ctypes.c_int64), ("total_k", ctypes.c_int64),
    *_ints("num_q_heads", "num_kv_heads", "head_dim"), ("softmax_scale", ctypes.c_float), *_ints("num_sequences"),
    *_pointers("cu_seqlens_q", "cu_seqlens_k"), *_ints("query_position"), ("lists", BlockLists)])

SearchArgs = _sized("SearchArgs", [
    *_pointers("q", "k"), ("total_q", ctypes.c_int64), ("total_k", ctypes.c_int64),
    *_ints("num_q_heads", "num_kv_heads", "head_dim"), ("softmax_scale", ctypes.c_float), *_ints("query_position"),
    ("threshold", ctypes.c_float), *_ints("sink_blocks", "window_blocks", "dense_last_tokens"),
    *_pointers("counts", "offsets", "blocks"), ("capacity", ctypes.c_int64), *_pointers("used", "overflows")])


def candidates() -> list:
    """Where the library is looked for: $HEADWATER_KERNELS, beside this file, then build folders of a checkout."""
    if given := os.environ.get("HEADWATER_KERNELS"):
        return [Path(given)]
    here = Path(__file__).resolve().parent
    builds = [here.parents[2] / "build" / preset / "bin" / NAME for preset in ("release", "dev", "cuda")]
    return [here / NAME, *builds]


class Library:
    """One loaded library. Errors raise: ValueError (invalid arguments), NotImplementedError, MemoryError, RuntimeError."""

    def __init__(self, path: Path):
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        self._lib.hw_last_error.restype = ctypes.c_char_p
        for name in ("hw_attention_workspace_bytes", "hw_search_workspace_bytes"):
            getattr(self._lib, name).restype = ctypes.c_size_t
        self._lib.hw_search_tiles.restype = ctypes.c_int64
        version = self._lib.hw_kernels_abi_version()
        if version != ABI_VERSION:
            raise RuntimeError(f"{path} has ABI version {version}; this package wants {ABI_VERSION}")

    def _check(self, status: int) -> None:
        if status:
            raise _STATUS.get(status, RuntimeError)(self._lib.hw_last_error().decode())

    def attention_workspace_bytes(self, args) -> int:
        return self._lib.hw_attention_workspace_bytes(ctypes.byref(args))

    def attention(self, args, workspace: int, size: int, stream: int) -> None:
        self._check(self._lib.hw_attention(ctypes.byref(args), ctypes.c_void_p(workspace), ctypes.c_size_t(size),
                                           ctypes.c_void_p(stream)))

    def search_tiles(self, args) -> int:
        return self._lib.hw_search_tiles(ctypes.byref(args))

    def search_workspace_bytes(self, args) -> int:
        return self._lib.hw_search_workspace_bytes(ctypes.byref(args))

    def select_blocks(self, args, workspace: int, size: int, stream: int) -> None:
        self._check(self._lib.hw_select_blocks(ctypes.byref(args), ctypes.c_void_p(workspace), ctypes.c_size_t(size),
                                               ctypes.c_void_p(stream)))


_loaded = None


def load() -> Library:
    """The library, loaded once. OSError names every place that was looked at."""
    global _loaded
    if _loaded is None:
        for path in candidates():
            if path.is_file():
                _loaded = Library(path)
                break
        else:
            places = ", ".join(str(path) for path in candidates())
            raise OSError(f"{NAME} was not found ({places}); build it with -DHW_CUDA=ON or set HEADWATER_KERNELS")
    return _loaded
