#!/usr/bin/env python3
"""Holds our policies' selections against those of the published methods' own code, on the same Q, K and V.

    policy_upstream.py --model MODEL_DIR --kv MODEL_DIR/eval/kv.jsonl --flexprefill DIR --minference DIR --output rows.jsonl
    policy_upstream.py --structured 32,8,128 --flashprefill2 DIR --output rows.jsonl

DIR are checkouts (a few files of each are enough: what tools/policy_peers.py names), which this repository does not hold:

    --flexprefill    bytedance/FlexPrefill@a24b27b       --flashprefill   qhfan/FlashPrefill@74e42f3
    --flashprefill2  qhfan/FlashPrefillv2@0f8e791        --minference     microsoft/MInference@fb56c91
    --xattention     microsoft/MInference@fb56c91, which has a copy of mit-han-lab/x-attention

Parameters are the official defaults on both sides. Overlaps are of blocks; of minference, of the keys of each 64 rows. A peer
agrees where every head's overlap is at least --iou and each layer's density within --density of its own. It is run as shipped,
and with what is known to be amiss set right (variants of tools/policy_peers.py): where it agrees then alone, that is why. Rows
that the official code treats by another rule count in all_iou_* alone, where there are others.

Needs a GPU, triton, einops (flexprefill), transformers and, for minference, nvcc or a built vertical_slash_index.so in its
folder. Exit status 1: a peer that agrees in no variant, or did not run; the others are compared all the same.
"""

import argparse
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools"), str(ROOT / "bench")]

import torch  # noqa: E402

from headwater import ops  # noqa: E402
from policy_masks import (SLICE_TILES, Layer, MaskError, Overlap, References, Rows, Shape, Spec, add_input_flags,  # noqa: E402
                          blocks_of_keys, capture, device_name, listed_by, prompt, shape_of)
from policy_peers import PEERS, SHIPPED, Peer, Selected  # noqa: E402


class Ours:
    """A layer's selection by our policy: the GPU's, or the reference's."""

    def __init__(self, spec: Spec, shape: Shape, layer: Layer, arguments: argparse.Namespace, pool):
        self._tokens, self._ranges, self._listed = len(layer.q), None, None
        if arguments.ours == "reference":
            self._listed = References(pool, shape, [layer], arguments.limit_s).start(spec)[0]().listed.to(arguments.device)
            return
        values = {"dense_below_tokens": 0, **spec.values}  # no crossover: upstream has none
        self._policy = ops.PatternPolicy(spec.name, values, device=arguments.device, **spec.model(shape, 1))
        self._policy.begin(self._tokens)
        _, found = self._policy.attention(layer.number, *layer.to(arguments.device))
        if found.ranges is not None:
            self._ranges = found.ranges
            return
        lists = shape.kv_heads if spec.name == "flash2" else shape.q_heads
        self._listed = listed_by(found, self._tokens, lists, 128 // (shape.q_heads // lists), torch.device(arguments.device))

    def overlap(self, peer: Selected, skip_tiles: int = 0) -> Overlap:
        if peer.listed is not None:
            return Overlap.of(self._listed[:, skip_tiles:], peer.listed[:, skip_tiles:])
        return self._overlap_of_keys(peer)

    def _overlap_of_keys(self, peer: Selected) -> Overlap:
        """Keys against keys; blocks where the reference's are all that there is."""
        lists, tiles = range(len(self._listed) if self._ranges is None else self._ranges.num_lists), -(-self._tokens // 64)
        sums = []
        for number in lists:
            parts = []
            for first in range(0, tiles, SLICE_TILES):
                end = min(first + SLICE_TILES, tiles)
                theirs = peer.keys(number, first, end)
                if self._ranges is None:
                    theirs, ours = blocks_of_keys(theirs, 2), self._listed[number, first // 2:-(-end // 2)]
                else:
                    ours = self._ranges.tile_keys(number, first, end)
                part = Overlap.of(ours[None], theirs[None])
                parts.append(torch.stack([part.both, part.either, part.ours, part.theirs]))
            sums.append(sum(parts))
        return Overlap(*torch.cat(sums, dim=1))


@dataclass
class Measured:
    """Of one variant of one peer."""

    iou: List[float] = field(default_factory=list)  # a list each
    all_iou: List[float] = field(default_factory=list)  # first tiles, which may follow another rule, with them
    density_diff: List[float] = field(default_factory=list)  # relative, a layer each
    head_density_diff: float = 0.0  # largest of a list
    entries: Tuple[float, float] = (0.0, 0.0)  # ours, theirs
    extra: dict = field(default_factory=dict)

    def add(self, rest: Overlap, every: Overlap, extra: dict) -> None:
        self.iou += rest.iou.tolist()
        self.all_iou += every.iou.tolist()
        self.density_diff.append(float(rest.ours.sum() / rest.theirs.sum() - 1))
        self.head_density_diff = max(self.head_density_diff, float((rest.ours / rest.theirs - 1).abs().max()))
        self.entries = (self.entries[0] + float(every.ours.sum()), self.entries[1] + float(every.theirs.sum()))
        self.extra = {key: max(value, self.extra.get(key, value)) for key, value in extra.items()}

    def metrics(self) -> dict:
        return {"iou_min": min(self.iou), "iou_mean": sum(self.iou) / len(self.iou), "all_iou_min": min(self.all_iou),
                "all_iou_mean": sum(self.all_iou) / len(self.all_iou),
                "density_diff": max(self.density_diff, key=abs), "head_density_diff": self.head_density_diff,
                "listed": self.entries[0], "peer_listed": self.entries[1], **self.extra}


def measure(peer: Peer, variant: str, shape: Shape, layers: List[Layer], arguments, pool) -> dict:
    spec, measured = Spec.parse(peer.policy), Measured()
    for layer in layers:
        layer = layer.cut(peer.tokens(variant, len(layer.q)))
        ours = Ours(spec, shape, layer, arguments, pool)
        with torch.no_grad():
            theirs = peer.select(variant, *layer.to(arguments.device))
        every = ours.overlap(theirs)
        skip = theirs.skip_tiles if theirs.listed is not None and theirs.skip_tiles < theirs.listed.shape[1] else 0
        rest = ours.overlap(theirs, skip) if skip else every
        measured.add(rest, every, theirs.metrics)
        print(f"    layer {layer.number:2d}: iou min {float(rest.iou.min()):.5f} mean {float(rest.iou.mean()):.5f}, density "
              f"{measured.density_diff[-1]:+.2%} of theirs, {rest.differing} entries differ", flush=True)
        del ours, theirs
    return measured.metrics()


def judge(peer: Peer, found: dict, arguments) -> str:
    """"": agrees, or why not is known."""
    good = [variant for variant, metrics in found.items()
            if metrics["iou_min"] >= arguments.iou and abs(metrics["density_diff"]) <= arguments.density]
    if not good:
        return f"overlap below {arguments.iou} or density more than {arguments.density:.0%} apart in every variant"
    known = "as shipped" if SHIPPED in good else f"once set right, which is why it differs as shipped: {peer.variants[good[0]]}"
    print(f"  {peer.name}: agrees {known}", flush=True)
    return ""


def run_peer(peer: Peer, shape: Shape, layers: List[Layer], arguments, rows: Rows, params: dict, pool, failed: dict) -> None:
    """All variants; what is wrong goes to `failed`."""
    found, name = {}, f"{peer.name} at {params['tokens']} tokens"
    for variant, note in peer.variants.items():
        tokens = peer.tokens(variant, len(layers[0].q))
        print(f"  {peer.name} {variant} beside {peer.policy}, {tokens} tokens", flush=True)
        metrics = attempt(f"{name}, {variant}", lambda: measure(peer, variant, shape, layers, arguments, pool), failed)
        if metrics is None:
            continue
        found[variant] = metrics
        note = "; ".join(filter(None, (note, peer.notes)))
        rows.write({**params, "policy": peer.policy, "set": "upstream", "peer": peer.name, "variant": variant, "note": note,
                    "prompt_tokens": tokens, "layers": [layer.number for layer in layers], "ours": arguments.ours}, metrics)
    if found and (wrong := judge(peer, found, arguments)):
        failed[name] = wrong


def attempt(name: str, action, failed: dict):
    """The action's result, or None with the error in `failed`: others' code may raise anything."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        failed[name] = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        print(f"  {name}: {failed[name]}", flush=True)
    return None


def inputs(arguments):
    """(row's parameters, shape, layers) of every length."""
    if arguments.structured:
        from structured_qkv import gen

        q_heads, kv_heads, dim = arguments.structured
        for tokens in arguments.tokens:
            made = gen(tokens, Hq=q_heads, Hk=kv_heads, D=dim, dev=arguments.device)
            yield ({"model": "structured", "tokens": tokens}, Shape(1, q_heads, kv_heads, dim),
                   [Layer(0, *(x.to("cpu", torch.bfloat16) for x in made))])
        return
    from headwater.eval.model import EvalModel, find_model

    path = find_model(arguments.model)
    model = EvalModel.load(path, arguments.device, torch.bfloat16)
    for tokens in arguments.tokens:
        yield ({"model": path.resolve().name, "tokens": tokens}, shape_of(model),
               capture(model, prompt(arguments, path, tokens), arguments.layers))


def main(words: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory, or its name under HW_MODELS")
    add("--structured", type=lambda text: [int(part) for part in text.split(",")], metavar="Q_HEADS,KV_HEADS,HEAD_DIM",
        help="bench/structured_qkv.py's inputs in place of a model's")
    add_input_flags(parser)
    for peer in PEERS:
        add(f"--{peer.name}", type=Path, metavar="DIR")
    add("--ours", choices=["gpu", "reference"], default="gpu")
    add("--iou", type=float, default=0.98)
    add("--density", type=float, default=0.02)
    arguments = parser.parse_args(words)
    if bool(arguments.model) == bool(arguments.structured) or (arguments.model and (arguments.prompt_ids is None)
                                                              == (not arguments.kv)):
        parser.error("--structured, or --model with one of --prompt_ids and --kv, is wanted")
    if not any(getattr(arguments, kind.name) for kind in PEERS):
        parser.error(f"nothing to compare with: give one of {', '.join('--' + kind.name for kind in PEERS)}")
    failed, peers, pool = {}, [], ThreadPoolExecutor(os.cpu_count())
    for kind in PEERS:
        if folder := getattr(arguments, kind.name):
            peers += filter(None, [attempt(kind.name, lambda: kind(folder.resolve()), failed)])
    try:
        rows = Rows(arguments.output, device_name(arguments.device), arguments.commit)
        for params, shape, layers in inputs(arguments):
            print(f"{params['model']}, {len(layers[0].q)} tokens", flush=True)
            for peer in peers:
                run_peer(peer, shape, layers, arguments, rows, params, pool, failed)
    except (MaskError, ValueError, RuntimeError, OSError) as error:
        print(f"policy_upstream: {error}", file=sys.stderr)
        return 1
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for name, wrong in failed.items():
        print(f"{name}: {wrong}")
    if not failed:
        print("every peer agrees, or why it does not is known")
    return 1 if failed else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a reference past its limit would hold its thread
