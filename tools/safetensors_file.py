"""Writes safetensors files one tensor at a time, with numpy alone.

The header is written first from the declared shapes, so that a model never has to be in memory as a whole.
"""

import json
import struct

import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to bfloat16, to nearest, ties to even; returns the bits as uint16. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Converts finite float32 values to the bytes of `dtype` (F32, F16 or BF16), little endian.

    Raises ValueError when a value has no finite counterpart in `dtype`.
    """
    if dtype == "F32":
        return np.ascontiguousarray(values, dtype="<f4").tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            converted = values.astype("<f2")
        if not np.isfinite(converted).all():
            raise ValueError(f"largest magnitude {np.abs(values).max():g} does not fit f16 (limit 65504)")
        return converted.tobytes()
    bits = to_bf16_bits(values)
    if ((bits & 0x7FFF) >= 0x7F80).any():
        raise ValueError(f"largest magnitude {np.abs(values).max():g} does not fit bf16 (limit 3.38953e+38)")
    return bits.astype("<u2").tobytes()


class SafetensorsWriter:
    """Writes tensors in the order of `shapes` (name -> shape). A context manager: leaving it without an error fails
    when a declared tensor was not written."""

    def __init__(self, path, shapes: dict, dtype: str, metadata: dict):
        self._dtype = dtype
        self._pending = {}
        header = {"__metadata__": metadata}
        offset = 0
        for name, shape in shapes.items():
            size = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._pending[name] = tuple(shape)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, values: np.ndarray) -> None:
        expected = next(iter(self._pending), None)
        if name != expected:
            raise ValueError(f"tensor {name} written where {expected} was declared")
        if values.shape != self._pending.pop(name):
            raise ValueError(f"tensor {name} has shape {values.shape}, which was not declared")
        self._file.write(encode(values, self._dtype))

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._file.close()
        if kind is None and self._pending:
            raise ValueError(f"{len(self._pending)} declared tensors were not written, first {next(iter(self._pending))}")
