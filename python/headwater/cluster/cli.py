"""Flags of python -m headwater.cluster, and what they ask for."""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
import torch

from headwater.cluster.choose import cut, js_distances, pairs_p90, try_pivot, why_not
from headwater.cluster.embed import distances, embed, linkage
from headwater.cluster.file import Clusters, save
from headwater.eval import policies, texts
from headwater.eval.blocks import BLOCK_KEYS
from headwater.eval.cli import DTYPES, dtype_name, load_tokenizer
from headwater.eval.maps import Tap, block_averages
from headwater.eval.model import EvalModel, ModelError, find_model
from headwater.eval.runner import Progress

LEAST_BLOCKS = 4


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m headwater.cluster", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Heads whose attention patterns are alike, for SharePrefill: what the file holds is in headwater.cluster.")
    add = flags.add_argument
    add("model", help="model directory, or a name under HW_MODELS")
    add("--texts", nargs="+", required=True, metavar="FILE",
        help="calibration: the first --tokens tokens of each; names as in headwater.eval")
    add("--held_out", metavar="FILE",
        help="text on which sharing is tested; without it the next --tokens tokens of the first of --texts that has them")
    add("--output", type=Path, required=True, metavar="FILE.json")
    add("--tokens", type=int, default=32768, help="of each prompt")
    add("--gamma", type=float, default=0.9, help="mass that a pattern holds, a row")
    add("--max_distance", type=float, default=0.4,
        help="Jensen-Shannon, of last rows: within each cluster its 90th percentile is below this")
    add("--tolerance", type=float, default=0.02,
        help="a shared cluster's pivot pattern holds gamma less this of each member's attention")
    add("--max_density", type=float, default=0.5, help="of a shared cluster's pivot pattern")
    add("--dims", type=int, default=64, help="of the embedding")
    add("--report", type=Path, metavar="DIR", help="PNGs of the distances and of the clusters' mean maps")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, f32 else")
    return flags


def check(args: argparse.Namespace) -> None:
    """ValueError where a flag is out of range."""
    if args.tokens < LEAST_BLOCKS * BLOCK_KEYS:
        raise ValueError(f"--tokens={args.tokens}; at least {LEAST_BLOCKS * BLOCK_KEYS} is wanted")
    if not 0 < args.gamma < 1:
        raise ValueError(f"--gamma={args.gamma}; a number over 0 and below 1 is wanted")
    for name in ("max_distance", "tolerance", "max_density"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name}={getattr(args, name)}; 0 to 1 is wanted")
    if not 1 <= args.dims <= 4096:
        raise ValueError(f"--dims={args.dims}; 1 to 4096 is wanted")
    if args.report is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--report: matplotlib is not installed (pip install matplotlib)")


def prompts_of(args: argparse.Namespace, tokenizer) -> tuple:
    """(calibration prompts by name, name of the held-out prompt, the held-out prompt), token ids each."""
    prefix = tokenizer.encode("").ids
    wanted = args.tokens - len(prefix)
    read = {}
    for name in [*args.texts, *([args.held_out] if args.held_out else [])]:
        title, text = texts.read_text(name)
        read[name] = (title, tokenizer.encode(text, add_special_tokens=False).ids)
        if len(read[name][1]) < wanted:
            raise ValueError(f"text {name} has {len(read[name][1])} tokens; {wanted} are wanted for --tokens={args.tokens}")
    prompts = {}
    for name in args.texts:
        title, ids = read[name]
        if title in prompts:
            raise ValueError(f"--texts has two texts named '{title}'")
        prompts[title] = [*prefix, *ids[:wanted]]
    if args.held_out:
        title, ids = read[args.held_out]
        if [*prefix, *ids[:wanted]] in prompts.values():
            raise ValueError(f"--held_out={args.held_out} is one of --texts")
        return prompts, title, [*prefix, *ids[:wanted]]
    for name in args.texts:
        title, ids = read[name]
        if len(ids) >= 2 * wanted:
            return prompts, f"{title}, second window", [*prefix, *ids[wanted:2 * wanted]]
    raise ValueError(f"no text of --texts has {2 * wanted} tokens, of which the second half would be the held-out prompt: "
                     f"give longer texts, --held_out or fewer --tokens")


def digest(path: Path) -> str:
    """The directory's name, and 16 hex digits over config.json and the weights. Not the service's fingerprint."""
    sums = hashlib.sha256()
    for file in [path / "config.json", *sorted(path.glob("*.safetensors"))]:
        with file.open("rb") as content:
            sums.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return f"{path.resolve().name}-{sums.hexdigest()[:16]}"


def maps_of(model: EvalModel, ids: Sequence[int], step: Callable[[int], None]) -> np.ndarray:
    """Abar of all heads of a dense run, f32 [layers, query heads, blocks, blocks]; step(layer) is called after each."""
    found = []

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, stats) -> None:
        found.append(block_averages(q, k).cpu().numpy())
        step(layer)

    model.prefill(ids, Tap(policies.make("dense"), visit))
    return np.stack(found)


def calibrate(model: EvalModel, prompts: Dict[str, List[int]], held_out: Sequence[int], say: Callable[[str], None]) -> tuple:
    """(mean map of each head, mean Jensen-Shannon distances of last rows, map of each head on the held-out prompt, heads of
    a layer), heads counted layer by layer; means are over prompts."""
    layers = model.model.config.num_hidden_layers
    progress = Progress(layers * (len(prompts) + 1), say)

    def run(name: str, ids: Sequence[int]) -> np.ndarray:
        return maps_of(model, ids, lambda layer: progress.step(1, f"{name}, layer {layer + 1} of {layers}"))

    mean, near = 0, 0
    for name, ids in prompts.items():
        maps = run(name, ids)
        heads, maps = maps.shape[1], maps.reshape(-1, *maps.shape[2:])
        mean = mean + maps / len(prompts)
        near = near + js_distances(maps[:, -1]) / len(prompts)
    held = run("held out", held_out)
    return mean, near, held.reshape(-1, *held.shape[2:]), heads


def build(args: argparse.Namespace, model_name: str, names: Sequence[str], held_name: str, maps: np.ndarray, near: np.ndarray,
          held: np.ndarray, heads: int) -> tuple:
    """(Clusters, distances of the embedded maps, their tree)."""
    def place(head: int) -> tuple:
        return tuple(divmod(int(head), heads))

    rows = np.full(held.shape[1], BLOCK_KEYS)
    rows[-1] = args.tokens - BLOCK_KEYS * (len(rows) - 1)

    def alike(members: np.ndarray) -> bool:
        return (pairs_p90(near, members) < args.max_distance
                and try_pivot(maps, members, heads, rows, args.gamma).worst() >= args.gamma)

    far = distances(embed(maps, args.dims))
    merges = linkage(far)
    found, tests = {}, {}
    for number, members in enumerate(cut(merges, alike)):
        found[number] = tuple(place(head) for head in members)
        if len(members) < 2:
            continue
        trial = try_pivot(held, members, heads, rows, args.gamma)
        mean = float(np.mean(trial.recall)) if trial.recall else 1.0
        tests[str(number)] = {
            "pivot": list(found[number][0]), "heads": len(trial.later), "recall_min": round(trial.worst(), 4),
            "recall_mean": round(mean, 4), "density": round(trial.density, 4),
            "distance_p90": round(pairs_p90(near, members), 4),
            "why": why_not(trial, heads, gamma=args.gamma, tolerance=args.tolerance, max_density=args.max_density)}
    shared = frozenset(int(key) for key, test in tests.items() if not test["why"])
    calibration = {"texts": list(names), "held_out": held_name, "tokens": args.tokens, "block_tokens": BLOCK_KEYS,
                   "dims": args.dims, "max_distance": args.max_distance, "tolerance": args.tolerance,
                   "max_density": args.max_density, "tests": tests}
    return Clusters(model_name, len(maps) // heads, heads, args.gamma, found, shared, calibration), far, merges


def summary(clusters: Clusters) -> str:
    """A line a cluster of two heads or more, shared ones first."""
    tests = clusters.calibration["tests"]
    lines = []
    for key in sorted(tests, key=lambda key: (tests[key]["why"] != "", int(key))):
        test, members = tests[key], clusters.clusters[int(key)]
        listed = " ".join(f"{layer}.{head}" for layer, head in members[:12]) + (" ..." if len(members) > 12 else "")
        lines.append(f"cluster {key}: {len(members)} heads ({listed}), recall {test['recall_min']:.3f}, density "
                     f"{test['density']:.3f}: {'not shared, ' + test['why'] if test['why'] else 'shared'}")
    sharing = sum(tests[str(name)]["heads"] for name in clusters.shared)
    lines.append(f"{len(clusters.clusters)} clusters of {clusters.layers * clusters.heads} heads; {len(clusters.shared)} are "
                 f"shared, {sharing} heads could take their pivots' patterns")
    return "\n".join(lines)


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        check(args)
        path = find_model(args.model)
        prompts, held_name, held_ids = prompts_of(args, load_tokenizer(path))
        model = EvalModel.load(path, args.device, DTYPES[dtype_name(args)])
        if args.tokens > model.max_tokens:
            raise ModelError(f"--tokens={args.tokens}; {path} is for {model.max_tokens} at most")
        maps, near, held, heads = calibrate(model, prompts, held_ids, say)
        clusters, far, merges = build(args, digest(path), list(prompts), held_name, maps, near, held, heads)
        save(args.output, clusters)
        print(summary(clusters))
        written = [args.output]
        if args.report is not None:
            from headwater.cluster import report

            written += report.write(args.report, clusters, maps, near, far, merges)
        say(f"written: {', '.join(map(str, written))}")
        return 0
    except (ValueError, OSError) as error:
        say(f"headwater.cluster: {error}")
        return 2
    except KeyboardInterrupt:
        say("headwater.cluster: broken off")
        return 130
