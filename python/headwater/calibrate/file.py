"""The calibration file: reading, checking and writing. Needs no packages."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import List, Mapping

FORMAT = 1
MOST_WINDOW = 1 << 20


@dataclass(frozen=True)
class Calibration:
    model: str
    layers: int
    kv_heads: int
    thresholds: List[List[float]]  # [layers][kv_heads]
    windows: List[List[int]]
    calibration: Mapping[str, object]

    def flat_thresholds(self) -> List[float]:
        return [value for layer in self.thresholds for value in layer]

    def flat_windows(self) -> List[int]:
        return [value for layer in self.windows for value in layer]


def save(path: Path, made: Calibration) -> None:
    from headwater.eval.files import write_text

    write_text(path, json.dumps({"format": FORMAT, "model": made.model, "layers": made.layers, "kv_heads": made.kv_heads,
                                 "thresholds": made.thresholds, "windows": made.windows,
                                 "calibration": made.calibration}, indent=1) + "\n")


def load(path) -> Calibration:
    """ValueError names the file and what is wrong with it; OSError: it cannot be read."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    wanted = {"format", "model", "layers", "kv_heads", "thresholds", "windows", "calibration"}
    if not isinstance(found, dict) or set(found) != wanted:
        names = sorted(set(found) ^ wanted) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: keys missing or not known: {names}")
    if found["format"] != FORMAT:
        raise ValueError(f"{path}: format {found['format']}; {FORMAT} is known")
    layers, heads = found["layers"], found["kv_heads"]
    for name, value in (("layers", layers), ("kv_heads", heads)):
        if type(value) is not int or not 1 <= value <= 1 << 20:
            raise ValueError(f"{path}: {name} is {value}; 1 to {1 << 20} is wanted")
    for name, kinds, least, most in (("thresholds", (int, float), 0, 1e9), ("windows", (int,), 1, MOST_WINDOW)):
        rows = found[name]
        if not isinstance(rows, list) or len(rows) != layers or any(not isinstance(row, list) or len(row) != heads for row in rows):
            raise ValueError(f"{path}: {name} is not a list of {layers} lists of {heads}")
        for layer, row in enumerate(rows):
            for head, value in enumerate(row):
                if type(value) not in kinds or not least <= value <= most:
                    raise ValueError(f"{path}: {name} of layer {layer}, KV head {head} is {value}; {least} to {most} is wanted")
    if not isinstance(found["model"], str) or not isinstance(found["calibration"], dict):
        raise ValueError(f"{path}: model is not a text, or calibration not an object")
    return Calibration(found["model"], layers, heads, found["thresholds"], found["windows"], found["calibration"])
