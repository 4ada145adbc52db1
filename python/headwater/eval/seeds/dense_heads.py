"""Experiment 2: SharePrefill with more and fewer heads computed in full: latency, perplexity, retrieval."""

import statistics
from typing import Any, Dict, Iterable, List, Mapping

import torch

from headwater.eval.maps import Tap
from headwater.eval.runner import sample_rows
from headwater.eval.seeds.bench import Bench, Cell, Experiment, Setting, quality_cells, quality_rows
from headwater.eval.seeds.report import lines_over, table

PIVOTS = (1, 2, 4)
ROWS = 32  # of a prompt, on which heads' densities are taken


def specs(bench: Bench) -> List[str]:
    """share as it is: no clusters and no pivots, so that no head is dense and none shares."""
    clusters = [f"share:clusters={bench.args.clusters}"] if bench.args.clusters else []
    return ["share", *clusters, *(f"share:pivots_per_layer={count}" for count in PIVOTS)]


def cells(bench: Bench) -> Iterable[Cell]:
    lengths = bench.fitting(bench.args.tokens)
    if not bench.args.clusters:
        bench.note("no --clusters: share with the clusters of a file was not run")
    if not lengths:
        return
    prompts = bench.prompts(lengths, windows=bench.args.windows, tasks=bench.args.own)
    yield from quality_cells(bench, specs(bench), prompts)
    for length in sorted(prompts):
        for spec in specs(bench):
            yield Cell(f"heads of {spec} at {length}", lambda spec=spec, length=length: heads(bench, spec, length))


def heads(bench: Bench, spec: str, length: int) -> dict:
    """Of one prompt: density of each head, layers after layers, on sampled rows, and heads' roles where the policy tells."""
    ids = bench.text_prompts(length, 1)[0].ids
    rows_ = sample_rows(length, ROWS, bench.args.seed, "heads").to(bench.model.device)
    densities: List[List[float]] = []
    roles: List[List[str]] = []

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, stats) -> None:
        if stats.row_mask is None:
            densities.append([1.0] * q.shape[1])
        else:
            causal = torch.arange(len(k), device=k.device) <= rows_[:, None]
            seen = (stats.row_mask(rows_) & causal).sum(dim=(1, 2)) / causal.sum()
            densities.append([round(float(one), 5) for one in seen])
        if stats.roles is not None:
            roles.append(list(stats.roles()))

    bench.model.prefill(ids, Tap(bench.policy(spec), visit))
    return {"policy": spec, "tokens": length, "head_densities": densities, "roles": roles}


def rows(cells_by_name: Mapping[str, Any], setting: Setting) -> List[dict]:
    """As headwater.eval's, and the share of heads that attended to everything; pivots and shared ones by their roles."""
    found = quality_rows(cells_by_name, setting)
    extra: Dict[tuple, dict] = {}
    for cell in cells_by_name.values():
        if "head_densities" in cell:
            densities = [one for layer in cell["head_densities"] for one in layer]
            metrics = {"dense_heads": statistics.fmean(one >= 1 - 1e-6 for one in densities)}
            told = [one for layer in cell["roles"] for one in layer]
            if told:
                metrics.update(pivot_heads=told.count("pivot") / len(told), shared_heads=told.count("shared") / len(told))
            extra[cell["policy"], cell["tokens"]] = metrics
    for row in found:
        row["metrics"].update(extra.get((row["params"]["policy"], row["params"]["tokens"]), {}))
    return found


def text(found: List[dict]) -> List[str]:
    lines = []
    for row in found:
        p, m = row["params"], row["metrics"]
        interval = f"{m['delta']:+.4f} ({m['ci_low']:+.4f} to {m['ci_high']:+.4f})" if "delta" in m else None
        lines.append([p["tokens"], p["set"], p["policy"], m["value"], interval, m["nll"], m["density"], m.get("dense_heads"),
                      m.get("pivot_heads"), m.get("shared_heads"), m.get("recall_mean"), m.get("recall_p1"),
                      m["attention_ms"], m["prefill_ms"]])
    return ["Value: perplexity, or the share of right answers; NLL in nats a token (of answers for retrieval). Dense heads: "
            "share of all heads that attended to every causal key on sampled rows of one prompt, pivots above all.", "",
            *table(("tokens", "set", "policy", "value", "against dense", "NLL", "density", "dense heads", "pivots", "shared",
                    "recall", "recall p1", "attention ms", "prefill ms"), lines)]


PANELS = (("prefill, ms", "prefill_ms", None), ("attention, ms", "attention_ms", None), ("density", "density", None),
          ("perplexity over dense, relative", "delta", True), ("right answers, share", "value", False),
          ("answer NLL, nats a token", "nll", False))


def plot(found: List[dict], cells_by_name: Mapping[str, Any]):
    """Each panel over the ways to choose dense heads, a line a length, sets averaged."""
    from matplotlib import pyplot

    if not found:
        return None
    order = list(dict.fromkeys(label(row["params"]["policy"]) for row in found))
    order.sort(key=lambda name: (name == "all (dense)", name == "clusters"))
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    for axis, (title, key, of_text) in zip(axes.flat, PANELS):
        points: Dict[str, Dict[int, list]] = {}
        for row in found:
            p = row["params"]
            if key in row["metrics"] and of_text in (None, p["set"].startswith("ppl:")):
                place = order.index(label(p["policy"]))
                points.setdefault(f"{p['tokens']} tokens", {}).setdefault(place, []).append(row["metrics"][key])
        lines_over(axis, {name: [(place, statistics.fmean(values)) for place, values in some.items()]
                          for name, some in points.items()}, title, x="heads computed in full", log_x=False)
        axis.set_xticks(range(len(order)), order, fontsize=8)
    axes.flat[0].legend(fontsize=8)
    return figure


def label(spec: str) -> str:
    if spec.startswith("share:clusters="):
        return "clusters"
    return "all (dense)" if spec == "dense" else "none" if spec == "share" else \
        f"{spec.removeprefix('share:pivots_per_layer=')} a layer"


EXPERIMENT = Experiment(2, "How many heads are computed in full (SharePrefill)", cells, rows, text, plot)
