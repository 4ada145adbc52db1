"""The cluster file: written, and read with everything in it checked. Needs no package."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Tuple, Union

from headwater.eval.files import write_text

FORMAT = 1
MOST = 2**20  # layers, heads; cluster ids are below 2**31
Head = Tuple[int, int]  # layer, query head


@dataclass(frozen=True)
class Clusters:
    model: str
    layers: int
    heads: int  # query heads of a layer
    gamma: float
    clusters: Dict[int, Tuple[Head, ...]]
    shared: FrozenSet[int]
    calibration: dict

    def cluster_of(self) -> Dict[Head, int]:
        return {head: name for name, members in self.clusters.items() for head in members}


def save(path: Path, clusters: Clusters) -> None:
    """A line a cluster; whole or not at all."""
    def listed(entries: dict) -> str:
        return "{\n" + ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in entries.items()) + "\n  }"

    members = {name: [list(head) for head in some] for name, some in clusters.clusters.items()}
    calibration = {key: value for key, value in clusters.calibration.items() if key != "tests"}
    lines = [f'  "format": {FORMAT}', f'  "model": {json.dumps(clusters.model)}', f'  "layers": {clusters.layers}',
             f'  "heads": {clusters.heads}', f'  "gamma": {clusters.gamma}', f'  "clusters": {listed(members)}',
             f'  "shared_clusters": {json.dumps([str(name) for name in sorted(clusters.shared)])}',
             f'  "calibration": {json.dumps(calibration)[:-1]}, "tests": {listed(clusters.calibration["tests"])}}}']
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load(path: Union[str, Path]) -> Clusters:
    """ValueError names the file and what is wrong in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return _clusters(json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant))
    except OSError as error:
        raise ValueError(f"clusters {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"clusters {path}: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"clusters {path}: {error}") from error


def _no_twins(pairs: list) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _clusters(data) -> Clusters:
    _object("the file", data, TOP)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}; {FORMAT} is wanted")
    layers, heads = data["layers"], data["heads"]
    found, owner = {}, {}
    for key, members in data["clusters"].items():
        found[_id(key)] = members = tuple(_head(f"clusters[{key}]", one, layers, heads) for one in members)
        if not members:
            raise ValueError(f"clusters[{key}] is empty")
        for head in members:
            if head in owner:
                raise ValueError(f"layer {head[0]}, head {head[1]} is in clusters {owner[head]} and {key}")
            owner[head] = key
    shared = set()
    for key in data["shared_clusters"]:
        name = _id(key)
        if name not in found:
            raise ValueError(f"shared_clusters has '{key}', which is not in clusters")
        if len(found[name]) < 2:
            raise ValueError(f"shared_clusters has '{key}', which has one head")
        if name in shared:
            raise ValueError(f"shared_clusters has '{key}' twice")
        shared.add(name)
    for key, test in data["calibration"]["tests"].items():
        where = f"calibration.tests[{key}]"
        if _id(key) not in found:
            raise ValueError(f"{where} is of no cluster")
        _object(where, test, TEST)
        if _head(f"{where}.pivot", test["pivot"], layers, heads) not in found[_id(key)]:
            raise ValueError(f"{where}.pivot is not in the cluster")
    return Clusters(data["model"], layers, heads, data["gamma"], found, frozenset(shared), data["calibration"])


def _id(key) -> int:
    if not (isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key[:11])) == key and int(key) < 2**31):
        raise ValueError(f"cluster id {str(key)[:40]!r}; a string of a number from 0 to 2147483647 is wanted")
    return int(key)


def _head(where: str, value, layers: int, heads: int) -> Head:
    if not (isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)):
        raise ValueError(f"{where} has {json.dumps(value)[:80]}; [layer, head] is wanted")
    layer, head = value
    if not (0 <= layer < layers and 0 <= head < heads):
        raise ValueError(f"{where} has [{layer}, {head}]; layers are 0 to {layers - 1} and heads 0 to {heads - 1}")
    return layer, head


def _object(where: str, value, fields: Dict[str, Callable]) -> None:
    """Exactly these fields, each of which takes (name, value) and raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    for key in value:
        if key not in fields:
            raise ValueError(f"{where} has an unknown key {key!r}")
    for key, check in fields.items():
        if key not in value:
            raise ValueError(f"{where} lacks {key!r}")
        check(f"{where}: {key}", value[key])


def _is(kind: type, word: str) -> Callable:
    def check(name: str, value) -> None:
        if type(value) is not kind:
            raise ValueError(f"{name} is {json.dumps(value)[:80]}; {word} is wanted")
    return check


def _whole(least: int, most: int) -> Callable:
    def check(name: str, value) -> None:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {json.dumps(value)[:80]}; a whole number from {least} to {most} is wanted")
    return check


def _real(least: float, most: float) -> Callable:
    def check(name: str, value) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{name} is {json.dumps(value)[:80]}; a number from {least} to {most} is wanted")
    return check


def _between(least: float, most: float) -> Callable:
    def check(name: str, value) -> None:
        if type(value) not in (int, float) or not least < value < most:
            raise ValueError(f"{name} is {json.dumps(value)[:80]}; a number over {least} and below {most} is wanted")
    return check


def _texts(name: str, value) -> None:
    if not (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
        raise ValueError(f"{name} is {json.dumps(value)[:80]}; a list of strings is wanted")


def _lists(name: str, value) -> None:
    _is(dict, "an object")(name, value)
    for key, one in value.items():
        _is(list, "a list")(f"{name}[{key}]", one)


def _calibration(name: str, value) -> None:
    _object(name, value, CALIBRATION)


TEXT, LIST, SHARE = _is(str, "a string"), _is(list, "a list"), _real(0, 1)
TEST = {"pivot": LIST, "heads": _whole(0, MOST), "recall_min": _real(0, 1.001), "recall_mean": _real(0, 1.001),
        "density": SHARE, "distance_p90": SHARE, "why": TEXT}
CALIBRATION = {"texts": _texts, "held_out": TEXT, "tokens": _whole(1, 2**31 - 1), "block_tokens": _whole(1, 2**20),
               "dims": _whole(1, MOST), "max_distance": SHARE, "tolerance": SHARE, "max_density": SHARE,
               "tests": _is(dict, "an object")}
TOP = {"format": _whole(0, MOST), "model": TEXT, "layers": _whole(1, MOST), "heads": _whole(1, MOST),
       "gamma": _between(0, 1), "clusters": _lists, "shared_clusters": LIST, "calibration": _calibration}
