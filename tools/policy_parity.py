#!/usr/bin/env python3
"""Holds every pattern policy of the GPU against its reference on the CPU, on Q, K and V of a model's dense prefill.

    policy_parity.py MODEL_DIR --kv MODEL_DIR/eval/kv.jsonl --tokens 32768 131072 --layers 0,3,6,9 --output rows.jsonl

For each length, layer and policy: the blocks that both select, as sets of (tile, block) of each head, and the GPU's output
beside attention in double precision over the reference's lists, on rows of tiles whose lists agree. flash2 and headwater add
means by the rule of kernels/reference/mean_keys.h. a_shape and vertical_slash select single keys: their blocks of 128 are
compared with the reference's, their output with attention under the exact mask (vertical_slash's is the GPU's own).
headwater's reference is the rule of headwater.eval in f32, all others are double. share counts the chosen layers from 0; its
reference goes head by head and layer by layer and is left out over 32,768 tokens unless --share_long says otherwise.

Needs a GPU, headwater_kernels and headwater_reference (HEADWATER_KERNELS, HEADWATER_REFERENCE). Exit status 1: an overlap is
below --iou, an error over --error, or a policy did not run.
"""

import argparse
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitError
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]

import torch  # noqa: E402

from headwater import ops  # noqa: E402
from headwater.eval.model import EvalModel, find_model  # noqa: E402
from headwater.ops.policies import ReferenceTable  # noqa: E402
from policy_exact import Means, attention, error, mean_keys, sample_rows  # noqa: E402
from policy_masks import (BLOCK_KEYS, Layer, MaskError, Overlap, References, Rows, Shape, Spec, add_input_flags,  # noqa: E402
                          capture, device_name, listed_by, prompt, shape_of, visible)

POLICIES = ("share:pivots_per_layer=1", "share:clusters=neighbours", "xattention", "skeleton", "flash", "flash2:dense_layers=0",
            "flex", "vertical_slash", "a_shape", "headwater")
SHARE_TOKENS = 32768
ROWS_PER_HEAD = 64
FAILURES = (MaskError, ValueError, NotImplementedError, MemoryError, RuntimeError, OSError, WaitError)


@dataclass
class Measured:
    """Of one policy, layer by layer."""

    iou: List[float] = field(default_factory=list)  # a list each
    rel_error: List[float] = field(default_factory=list)  # a head each; NaN: no tile agrees
    density: List[float] = field(default_factory=list)  # a layer each
    reference_density: List[float] = field(default_factory=list)
    differing: int = 0
    listed: int = 0  # by the reference
    overflows: int = 0
    rows: int = 0  # whose output was compared

    def metrics(self) -> dict:
        # max() would pass over a NaN
        worst = math.nan if any(math.isnan(one) for one in self.rel_error) else max(self.rel_error)
        return {"iou_min": min(self.iou), "iou_mean": sum(self.iou) / len(self.iou), "differing": self.differing,
                "listed": self.listed, "rel_error": worst, "rel_error_mean": sum(self.rel_error) / len(self.rel_error),
                "density": sum(self.density) / len(self.density),
                "reference_density": sum(self.reference_density) / len(self.reference_density),
                "overflows": self.overflows, "rows": self.rows}


def make_gpu(spec: Spec, shape: Shape, layers: int, device: str):
    # Dense where the reference is: no crossover.
    return ops.PatternPolicy(spec.name, {"dense_below_tokens": 0, **spec.values}, device=device, **spec.model(shape, layers))


class Comparison:
    """One policy on one prompt."""

    def __init__(self, spec: Spec, shape: Shape, seed: int):
        self._spec, self._shape, self._seed, self.measured = spec, shape, seed, Measured()

    def layer(self, number: int, q, k, v, out, found, reference: ReferenceTable) -> str:
        """Adds a layer; q, k, v and out on the device. What it found, in words."""
        m, tokens, positions = self.measured, len(q), reference.tile_positions
        theirs = reference.listed.to(q.device)
        ours = listed_by(found, tokens, len(theirs), positions, q.device)
        overlap = Overlap.of(ours, theirs)
        possible = float(visible(tokens, positions, q.device).sum()) * len(theirs)
        m.iou += overlap.iou.tolist()
        m.differing += overlap.differing
        m.listed += int(overlap.theirs.sum())
        m.density.append(float(overlap.ours.sum()) / possible)
        m.reference_density.append(float(overlap.theirs.sum()) / possible)
        m.overflows += found.overflows()
        agreeing = (ours == theirs).all(dim=2).cpu()
        errors = [self._head(number, head, q, k, v, out, found, reference, agreeing) for head in range(q.shape[1])]
        m.rel_error += errors
        return (f"iou min {min(overlap.iou.tolist()):.5f} mean {float(overlap.iou.mean()):.5f}, {overlap.differing} of "
                f"{int(overlap.theirs.sum())} blocks differ, error {max(errors):.2e}, density {m.density[-1]:.4f} "
                f"(reference {m.reference_density[-1]:.4f})")

    def _head(self, number, head, q, k, v, out, found, reference: ReferenceTable, agreeing: torch.Tensor) -> float:
        of_list, kv = head * len(agreeing) // q.shape[1], head // self._shape.group
        tokens, positions = len(q), reference.tile_positions
        rows = sample_rows(agreeing[of_list], positions, tokens, ROWS_PER_HEAD, self._seed + 1000 * number + head)
        if not len(rows):
            return math.nan
        self.measured.rows += len(rows)
        listed = reference.listed[of_list][rows // positions].to(q.device)
        rows = rows.to(q.device)
        mask = self._mask(found, of_list, rows, listed, reference, tokens)
        means = masks = None
        if self._spec.corrected:
            means = Means(k[:, kv], v[:, kv])
            masks = mean_keys(listed, (rows // positions * positions + 1) // BLOCK_KEYS)
        exact = attention(q[rows, head], k[:, kv], v[:, kv], mask, self._shape.head_dim ** -0.5, means, masks)
        return error(out[rows, head], exact)

    @staticmethod
    def _mask(found, of_list: int, rows, listed, reference: ReferenceTable, tokens: int) -> torch.Tensor:
        keys = torch.arange(tokens, device=rows.device)
        mask = listed.repeat_interleave(BLOCK_KEYS, dim=1)[:, :tokens] & (keys <= rows[:, None])
        if reference.window_tokens >= 0:
            mask &= (keys < reference.sink_tokens) | (keys > rows[:, None] - reference.window_tokens)
        elif found.ranges is not None:
            mask &= found.ranges.list_mask(of_list, rows)
        return mask


def compare(spec: Spec, policy, shape: Shape, layers: Sequence[Layer], references: list, device: str, label: str) -> dict:
    """Metrics of one policy, as make_gpu() makes it, on one prompt."""
    comparison = Comparison(spec, shape, seed=len(layers[0].q))
    policy.begin(len(layers[0].q))
    for place, layer in enumerate(layers):
        q, k, v = layer.to(device)
        out, found = policy.attention(place if spec.in_order else layer.number, q, k, v)
        said = comparison.layer(layer.number, q, k, v, out, found, references[place]())
        print(f"{label} layer {layer.number:2d}: {said}", flush=True)
    return comparison.measured.metrics()


def problem(metrics: dict, arguments: argparse.Namespace) -> str:
    """What is out of bounds; "": nothing."""
    if not metrics["iou_min"] >= arguments.iou:
        return f"overlap {metrics['iou_min']:.5f} is below {arguments.iou}"
    if not metrics["rel_error"] <= arguments.error:
        return f"error {metrics['rel_error']:.3e} is over {arguments.error}"
    return ""


def run_length(arguments, tokens: int, layers: List[Layer], shape: Shape, rows: Rows) -> List[tuple]:
    """(tokens, policy, metrics, what is wrong) of every policy."""
    pool = ThreadPoolExecutor(os.cpu_count())
    references = References(pool, shape, layers, arguments.limit_s)
    found, started = [], []

    def finish(spec: Spec, metrics: dict, wrong: str) -> None:
        print(f"{tokens:7d} {spec.text}: {wrong or 'ok'}", flush=True)
        found.append((tokens, spec.text, metrics, wrong))

    for spec in map(Spec.parse, arguments.policies):
        if spec.in_order and tokens > SHARE_TOKENS and not arguments.share_long:
            print(f"{tokens:7d} {spec.text}: left out over {SHARE_TOKENS} tokens (--share_long)", flush=True)
            continue
        try:
            started.append((spec, make_gpu(spec, shape, len(layers), arguments.device), references.start(spec)))
        except FAILURES as failure:
            finish(spec, {}, f"{type(failure).__name__}: {failure}")
    while started:
        spec, policy, tables = started.pop(0)
        begun = time.monotonic()
        try:
            metrics = compare(spec, policy, shape, layers, tables, arguments.device, f"{tokens:7d} {spec.text:26s}")
        except FAILURES as failure:
            finish(spec, {}, f"{type(failure).__name__}: {failure}")
            continue
        params = {"model": arguments.model.resolve().name, "tokens": tokens, "policy": spec.text, "set": "parity",
                  "layers": [layer.number for layer in layers], "prompt_tokens": len(layers[0].q)}
        rows.write(params, {**metrics, "seconds": time.monotonic() - begun})
        finish(spec, metrics, problem(metrics, arguments))
        del policy, tables
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def report(found: List[tuple]) -> None:
    columns = ("iou_min", "iou_mean", "differing", "listed", "rel_error", "density", "overflows")
    print("\n| tokens | policy | " + " | ".join(columns) + " | |\n|" + "---|" * (len(columns) + 3))
    for tokens, policy, metrics, wrong in found:
        cells = [f"{metrics[name]:.4g}" if isinstance(metrics[name], float) else str(metrics[name]) for name in columns] \
            if metrics else [""] * len(columns)
        print(f"| {tokens} | {policy} | " + " | ".join(cells) + f" | {wrong or 'ok'} |")


def main(words=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="or its name under HW_MODELS")
    add_input_flags(parser)
    add = parser.add_argument
    add("--policies", nargs="+", default=list(POLICIES), metavar="NAME[:PARAMETER=VALUE,...]")
    add("--share_long", action="store_true", help=f"share's reference over {SHARE_TOKENS} tokens, too: minutes to hours")
    add("--iou", type=float, default=0.99, help="least overlap of a head")
    add("--error", type=float, default=6e-3, help="largest relative error of a head's rows")
    arguments = parser.parse_args(words)
    if (arguments.prompt_ids is None) == (not arguments.kv):
        parser.error("one of --prompt_ids and --kv is wanted")
    try:
        arguments.model = find_model(arguments.model)
        rows = Rows(arguments.output, device_name(arguments.device), arguments.commit)
        model = EvalModel.load(arguments.model, arguments.device, torch.bfloat16)
        found = []
        for tokens in arguments.tokens:
            layers = capture(model, prompt(arguments, arguments.model, tokens), arguments.layers)
            found += run_length(arguments, tokens, layers, shape_of(model), rows)
    except FAILURES as failure:
        print(f"policy_parity: {failure}", file=sys.stderr)
        return 1
    report(found)
    if not found:
        print("policy_parity: nothing was compared", file=sys.stderr)
        return 1
    return 1 if any(wrong for *_, wrong in found) else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a reference past its limit would hold its thread, and the interpreter's end would wait for it
