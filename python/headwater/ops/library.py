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
    *_pointers("cu_seqlens_q", "cu_seqlens_k"), *_ints("query_position"), ("lists", BlockLists),
    *_pointers("k_means", "v_means")])

SearchArgs = _sized("SearchArgs", [
    *_pointers("q", "k"), ("total_q", ctypes.c_int64), ("total_k", ctypes.c_int64),
    *_ints("num_q_heads", "num_kv_heads", "head_dim"), ("softmax_scale", ctypes.c_float), *_ints("query_position"),
    ("threshold", ctypes.c_float), *_ints("sink_blocks", "window_blocks", "dense_last_tokens"),
    *_pointers("counts", "offsets", "blocks"), ("capacity", ctypes.c_int64), *_pointers("used", "overflows", "k_means"),
    ("forced_density", ctypes.c_double)])


def _longs(*names: str) -> list:
    return [(name, ctypes.c_int64) for name in names]


MergeArgs = _sized("MergeArgs", [
    *_pointers("a", "a_lse_ln", "b", "b_lse_ln", "out_f32", "out", "lse_ln"), *_longs("num_rows"), *_ints("head_dim")])

F32, F16, BF16 = 0, 1, 2  # hw_dtype


class BlockStats(ctypes.Structure):
    _fields_ = _pointers("k_mean", "v_mean", "k_min", "k_max", "k_mean_square", "v_mean_square", "k_max_norm",
                         "v_max_norm")


BlockStatisticsArgs = _sized("BlockStatisticsArgs", [
    *_pointers("k", "v"), *_longs("total_k"), *_ints("num_kv_heads", "head_dim"), *_longs("first_token"),
    ("stats", BlockStats)])

MeanTablesArgs = _sized("MeanTablesArgs", [
    *_pointers("k_mean", "v_mean", "k_table", "v_table"), *_longs("total_k"), *_ints("num_kv_heads", "head_dim")])

EmbedTokensArgs = _sized("EmbedTokensArgs", [
    *_pointers("table", "ids", "out"), *_ints("out_dtype"), *_longs("num_tokens", "vocab", "width")])

RmsNormArgs = _sized("RmsNormArgs", [
    *_pointers("x"), *_ints("x_dtype"), *_pointers("delta", "weight"), *_ints("weight_dtype"), *_pointers("out"),
    ("epsilon", ctypes.c_float), *_longs("num_tokens", "width"), *_pointers("scale")])

RopeTableArgs = _sized("RopeTableArgs", [
    *_pointers("inverse", "inverse_device"), ("attention_factor", ctypes.c_double), *_ints("head_dim"),
    *_longs("num_tokens", "begin"), *_pointers("positions_i32", "positions_i64", "cos", "sin")])

SplitQkvArgs = _sized("SplitQkvArgs", [
    *_pointers("qkv"), *_longs("num_tokens"), *_ints("num_q_heads", "num_kv_heads", "head_dim"),
    *_pointers("q_norm", "k_norm"), *_ints("norm_dtype"), ("epsilon", ctypes.c_float), *_pointers("cos", "sin", "q", "k", "v"),
    ("stats", BlockStats), *_longs("first_token")])

SiluMulArgs = _sized("SiluMulArgs", [*_pointers("gate_up", "out"), *_longs("num_tokens", "width"), *_pointers("scale")])

QuantizeRowsArgs = _sized("QuantizeRowsArgs", [*_pointers("x", "out", "scale"), *_longs("num_rows", "width")])

FirstNonFiniteRowArgs = _sized("FirstNonFiniteRowArgs", [
    *_pointers("x"), *_ints("dtype"), *_longs("num_tokens", "width"), *_pointers("row")])

PackKvArgs = _sized("PackKvArgs", [
    *_pointers("k", "v"), *_longs("num_tokens"), *_ints("num_kv_heads", "head_dim"),
    *_pointers("k_destination", "v_destination"), *_longs("destination_bytes"), *_ints("wire_dtype"), *_pointers("runs"),
    *_ints("num_runs"), *_pointers("problems")])

_MASS = [*_longs("num_tokens"), *_ints("num_q_heads", "num_kv_heads", "head_dim"), ("softmax_scale", ctypes.c_float)]

BlockMassArgs = _sized("BlockMassArgs", [
    *_pointers("q", "k", "lse_ln", "heads", "flags", "average"), *_MASS, *_ints("num_heads")])

RowMassArgs = _sized("RowMassArgs", [*_pointers("q", "k", "positions", "mass"), *_MASS, *_ints("num_rows")])

RecallOfRowsArgs = _sized("RecallOfRowsArgs", [
    *_pointers("mass", "positions", "recall"), *_longs("num_tokens"), *_ints("num_q_heads", "num_rows"),
    ("lists", BlockLists)])

LinearOptions = _sized("LinearOptions", [*_pointers("workspace"), ("workspace_bytes", ctypes.c_uint64), *_ints("max_plans")])

LinearArgs = _sized("LinearArgs", [
    *_pointers("x", "weight", "bias", "y"), *_ints("y_dtype", "accumulate"),
    *_longs("num_tokens", "in_features", "out_features"), *_pointers("x_scale", "weight_scale")])


class HeadCluster(ctypes.Structure):
    _fields_ = _ints("layer", "head", "cluster")


PolicyConfig = _sized("PolicyConfig", [
    ("name", ctypes.c_char_p), *_pointers("keys", "values"),
    *_ints("num_parameters", "num_layers", "num_q_heads", "num_kv_heads", "head_dim"), ("softmax_scale", ctypes.c_float),
    *_pointers("rope_frequencies", "clusters"), *_ints("num_clusters"), *_pointers("shared_clusters"),
    *_ints("num_shared_clusters"), *_pointers("thresholds"), *_ints("num_thresholds"), *_pointers("windows"),
    *_ints("num_windows")])


class KeyRanges(ctypes.Structure):
    _fields_ = [*_ints("num_lists"), *_pointers("range_counts", "range_offsets", "ranges", "column_counts", "column_offsets",
                                                "columns"), *_ints("sink_tokens", "window_tokens")]


Selection = _sized("Selection", [
    ("lists", BlockLists), *_pointers("k_means", "v_means"), ("ranges", KeyRanges), *_pointers("visited", "overflows"),
    ("possible", ctypes.c_uint64)])

ReferenceLists = _sized("ReferenceLists", [
    *_ints("num_lists", "tile_positions"), *_longs("num_tiles"), *_pointers("dense", "offsets", "blocks"),
    *_longs("sink_tokens", "window_tokens")])


def check(status: int, last_error) -> None:
    """Raises what a status of the C interface stands for."""
    if status:
        raise _STATUS.get(status, RuntimeError)(last_error().decode())


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
        for name in ("hw_attention_workspace_bytes", "hw_search_workspace_bytes", "hw_policy_memory_bytes",
                     "hw_policy_workspace_bytes"):
            getattr(self._lib, name).restype = ctypes.c_size_t
        for name in ("hw_search_tiles", "hw_mean_table_rows", "hw_mean_table_coarse_row"):
            getattr(self._lib, name).restype = ctypes.c_int64
        self._destroy_policy = self._lib.hw_policy_destroy
        self._destroy_policy.argtypes = [ctypes.c_void_p]
        version = self._lib.hw_kernels_abi_version()
        if version != ABI_VERSION:
            raise RuntimeError(f"{path} has ABI version {version}; this package wants {ABI_VERSION}")

    def _check(self, status: int) -> None:
        check(status, self._lib.hw_last_error)

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

    def merge_partials(self, args, stream: int) -> None:
        self._call(self._lib.hw_merge_partials, args, stream)

    def block_statistics(self, args, stream: int) -> None:
        self._call(self._lib.hw_block_statistics, args, stream)

    def mean_tables(self, args, stream: int) -> None:
        self._call(self._lib.hw_mean_tables, args, stream)

    def mean_table_rows(self, total_k: int) -> int:
        return self._lib.hw_mean_table_rows(ctypes.c_int64(total_k))

    def mean_table_coarse_row(self, total_k: int) -> int:
        return self._lib.hw_mean_table_coarse_row(ctypes.c_int64(total_k))

    def embed_tokens(self, args, stream: int) -> None:
        self._call(self._lib.hw_embed_tokens, args, stream)

    def rms_norm(self, args, stream: int) -> None:
        self._call(self._lib.hw_rms_norm, args, stream)

    def rope_table(self, args, stream: int) -> None:
        self._call(self._lib.hw_rope_table, args, stream)

    def split_qkv(self, args, stream: int) -> None:
        self._call(self._lib.hw_split_qkv, args, stream)

    def silu_mul(self, args, stream: int) -> None:
        self._call(self._lib.hw_silu_mul, args, stream)

    def quantize_rows(self, args, stream: int) -> None:
        self._call(self._lib.hw_quantize_rows, args, stream)

    def first_nonfinite_row(self, args, stream: int) -> None:
        self._call(self._lib.hw_first_nonfinite_row, args, stream)

    def pack_kv(self, args, stream: int) -> None:
        self._call(self._lib.hw_pack_kv, args, stream)

    def block_mass(self, args, stream: int) -> None:
        self._call(self._lib.hw_block_mass, args, stream)

    def row_mass(self, args, stream: int) -> None:
        self._call(self._lib.hw_row_mass, args, stream)

    def recall_of_rows(self, args, stream: int) -> None:
        self._call(self._lib.hw_recall_of_rows, args, stream)

    def linear_create(self, options) -> int:
        """A handle for linear_run(); linear_destroy() ends it."""
        handle = ctypes.c_void_p()
        self._check(self._lib.hw_linear_create(ctypes.byref(options), ctypes.byref(handle)))
        return handle.value

    def linear_run(self, handle: int, args, stream: int) -> None:
        self._check(self._lib.hw_linear_run(ctypes.c_void_p(handle), ctypes.byref(args), ctypes.c_void_p(stream)))

    def linear_destroy(self, handle: int) -> None:
        self._lib.hw_linear_destroy(ctypes.c_void_p(handle))

    def policy_create(self, config) -> int:
        """A handle; policy_destroy() ends it."""
        handle = ctypes.c_void_p()
        self._check(self._lib.hw_policy_create(ctypes.byref(config), ctypes.byref(handle)))
        return handle.value

    def policy_destroy(self, handle: int) -> None:
        self._destroy_policy(handle)

    def policy_memory_bytes(self, handle: int, tokens: int) -> int:
        return self._lib.hw_policy_memory_bytes(ctypes.c_void_p(handle), ctypes.c_int64(tokens))

    def policy_workspace_bytes(self, handle: int, tokens: int) -> int:
        return self._lib.hw_policy_workspace_bytes(ctypes.c_void_p(handle), ctypes.c_int64(tokens))

    def policy_wants_lse(self, handle: int) -> bool:
        return bool(self._lib.hw_policy_wants_lse(ctypes.c_void_p(handle)))

    def policy_begin(self, handle: int, tokens: int, memory: int, size: int, stream: int) -> None:
        self._check(self._lib.hw_policy_begin(ctypes.c_void_p(handle), ctypes.c_int64(tokens), ctypes.c_void_p(memory),
                                              ctypes.c_size_t(size), ctypes.c_void_p(stream)))

    def policy_attention(self, handle: int, layer: int, q: int, k: int, v: int, out: int, lse: int, workspace: int, size: int,
                         stream: int):
        """What the layer's attention read (Selection)."""
        found = Selection()
        self._check(self._lib.hw_policy_attention(
            ctypes.c_void_p(handle), layer, *(ctypes.c_void_p(pointer) for pointer in (q, k, v, out, lse, workspace)),
            ctypes.c_size_t(size), ctypes.c_void_p(stream), ctypes.byref(found)))
        return found

    def _call(self, function, args, stream: int) -> None:
        self._check(function(ctypes.byref(args), ctypes.c_void_p(stream)))


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
