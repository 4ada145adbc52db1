"""Experiment 4: SparseSkeleton's perplexity over length, the FLOP of attention to a million tokens, its sparsity, the
threshold by epsilon against the one by budget; what the threshold leaves of the possible sparsity is in .criteria."""

import math
import statistics
from typing import Any, Dict, Iterable, List, Mapping, Optional

from headwater.eval.seeds import criteria
from headwater.eval.seeds.bench import Bench, Cell, Experiment, Setting, quality_cells, quality_rows
from headwater.eval.seeds.report import lines_over, table, tokens_name
from headwater.eval.seeds.structured import THETA, structured_qkv

SKELETON = "skeleton:epsilon=0.8"
OTHERS = ("vertical_slash", "flex")  # what the paper compares with
# Of LLaMA-3-8B-Instruct-1048K (the paper's section 1).
PUBLISHED = {10240: 0.89, 131072: 0.97, 1048576: 0.995}
MOST = 1 << 20
FITTED = 3  # lengths that an extrapolation is made from
MEASURED, STRUCTURED, EXTRAPOLATED = "measured", "structured", "extrapolated"


def budgets(bench: Bench) -> List[str]:
    return [f"skeleton:budget_blocks={count:g}" for count in bench.args.budget_blocks]


def cells(bench: Bench) -> Iterable[Cell]:
    lengths = bench.fitting(bench.args.skeleton_tokens)
    if lengths:
        prompts = bench.prompts(lengths, windows=bench.args.windows)
        yield from quality_cells(bench, [SKELETON, *budgets(bench), *OTHERS], prompts)
    for length in bench.fitting(bench.args.criteria_tokens):
        yield Cell(f"criteria at {length}", lambda length=length: criteria.measure(bench, length, SKELETON))
    for spec in (SKELETON, *budgets(bench), *OTHERS):
        for length in sorted(set(bench.args.structured_tokens)):
            yield Cell(f"{spec} on structured inputs at {length}",
                       lambda spec=spec, length=length: structured(bench, spec, length))


def structured(bench: Bench, spec: str, length: int) -> dict:
    """Density of one layer of the model's shape on structured inputs, whose rotation is not the model's."""
    s = bench.setting
    q, k, v = structured_qkv(length, s.q_heads, s.kv_heads, s.head_dim, bench.args.seed, bench.model.device)
    frequencies = tuple(THETA ** (-2 * i / s.head_dim) for i in range(s.head_dim // 2))
    _, stats = bench.policy(spec, {"rope_frequencies": frequencies}).attend(0, q, k, v)
    return {"policy": spec, "tokens": length, "structured_density": stats.density()}


def extrapolate(densities: Mapping[int, float], tokens: int) -> Optional[float]:
    """By the power law through the densities of the last lengths of at least 4,096 tokens. None: fewer than two, or no
    density above 0."""
    points = [(math.log(n), math.log(rho)) for n, rho in sorted(densities.items()) if n >= 4096 and rho > 0][-FITTED:]
    if len(points) < 2:
        return None
    x, y = (statistics.fmean(values) for values in zip(*points))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return min(1.0, math.exp(y + slope * (math.log(tokens) - x)))


def flop(setting: Setting, tokens: int) -> float:
    """Of causal dense attention, both products, all layers."""
    return 2.0 * setting.layers * setting.q_heads * setting.head_dim * tokens * tokens


def rows(cells_by_name: Mapping[str, Any], setting: Setting) -> List[dict]:
    """headwater.eval's rows on texts; the criteria's; and set attention_pflop (params.basis: measured on text, structured
    inputs, or extrapolated from the measured): value is the policy's PFLOP, dense_value dense's, sparsity 1 - density."""
    found = quality_rows(cells_by_name, setting)
    measured: Dict[str, Dict[int, List[float]]] = {}
    for row in found:
        p = row["params"]
        measured.setdefault(p["policy"], {}).setdefault(p["tokens"], []).append(row["metrics"]["density"])
    found += criteria.rows(cells_by_name, setting)

    def add(policy: str, tokens: int, density: float, basis: str) -> None:
        dense = flop(setting, tokens) / 1e15
        found.append({"params": {"model": setting.model, "tokens": tokens, "policy": policy, "set": "attention_pflop",
                                 "basis": basis},
                      "metrics": {"value": density * dense, "dense_value": dense, "delta": density - 1, "density": density,
                                  "sparsity": 1 - density}})

    for policy, by_length in measured.items():
        densities = {tokens: statistics.fmean(some) for tokens, some in by_length.items()}
        for tokens, density in sorted(densities.items()):
            add(policy, tokens, density, MEASURED)
        for tokens in (1 << i for i in range(MOST.bit_length())):
            density = 1.0 if policy == "dense" else extrapolate(densities, tokens)
            if tokens > max(densities) and density is not None:
                add(policy, tokens, density, EXTRAPOLATED)
    for cell in cells_by_name.values():
        if "structured_density" in cell:
            add(cell["policy"], cell["tokens"], cell["structured_density"], STRUCTURED)
    return found


def of_set(found: List[dict], name: str) -> List[dict]:
    return [row for row in found if row["params"]["set"].startswith(name)]


def text(found: List[dict]) -> List[str]:
    quality = [[row["params"]["tokens"], row["params"]["set"].removeprefix("ppl:"), row["params"]["policy"], m["value"],
                f"{m['delta']:+.4f} ({m['ci_low']:+.4f} to {m['ci_high']:+.4f})" if "delta" in m else None, m["density"],
                m.get("recall_mean"), m.get("recall_p1"), m.get("rel_error"), m["attention_ms"]]
               for row in of_set(found, "ppl:") for m in [row["metrics"]]]
    cost = sorted(of_set(found, "attention_pflop"), key=lambda row: (row["params"]["tokens"], row["params"]["basis"]))
    costs = [[row["params"]["tokens"], row["params"]["policy"], row["params"]["basis"], row["metrics"]["value"],
              row["metrics"]["dense_value"], row["metrics"]["density"]] for row in cost]
    return ["### Perplexity", "", "The same target tokens at every length; against dense: relative rise, 95 % interval.", "",
            *table(("tokens", "text", "policy", "perplexity", "against dense", "density", "recall", "recall p1", "error",
                    "attention ms"), quality),
            "", "### FLOP of attention", "",
            "Both products of the pairs that are computed, all layers, without the search. Measured: on the texts. Structured: "
            "bench/structured_qkv.py, one layer of the model's shape, which lengths beyond the model's limit need; its pattern "
            "is not the model's. Extrapolated: the power law through the last measured densities.", "",
            *table(("tokens", "policy", "density is", "PFLOP", "dense PFLOP", "density"), costs),
            "", "### Sparsity", "", *sparsities(found), "", "### What a threshold leaves of the possible sparsity", "",
            *criteria.text(of_set(found, "criteria"))]


def sparsities(found: List[dict]) -> List[str]:
    """At the paper's lengths; a length within 5 % counts."""
    lines = []
    cost = of_set(found, "attention_pflop")
    for policy in dict.fromkeys(row["params"]["policy"] for row in cost if row["params"]["policy"].startswith("skeleton")):
        for basis in (MEASURED, STRUCTURED, EXTRAPOLATED):
            line = [policy, basis]
            for tokens in PUBLISHED:
                line.append(next((row["metrics"]["sparsity"] for row in cost
                                  if (row["params"]["policy"], row["params"]["basis"]) == (policy, basis)
                                  and abs(row["params"]["tokens"] / tokens - 1) < 0.05), None))
            lines.append(line)
    lines.append(["published, LLaMA-3-8B-Instruct-1048K", "", *PUBLISHED.values()])
    return table(("policy", "density is", *map(tokens_name, PUBLISHED)),
                 [line for line in lines if any(one is not None for one in line[2:])])


def plot(found: List[dict], cells_by_name: Mapping[str, Any]):
    from matplotlib import pyplot

    if not found:
        return None
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 9), constrained_layout=True)
    quality, cost = of_set(found, "ppl:"), of_set(found, "attention_pflop")
    named = list(dict.fromkeys(row["params"]["policy"] for row in found if "criteria" not in row["params"]["set"]))
    colours = {policy: f"C{i}" for i, policy in enumerate(named)}
    styles = {policy: {"color": colour} for policy, colour in colours.items()}

    def points(some: List[dict], key: str) -> Dict[str, list]:
        groups: Dict[str, Dict[int, list]] = {}
        for row in some:
            if key in row["metrics"]:
                groups.setdefault(row["params"]["policy"], {}).setdefault(row["params"]["tokens"], []).append(
                    row["metrics"][key])
        return {policy: [(n, statistics.fmean(values)) for n, values in by.items()] for policy, by in groups.items()}

    lines_over(axes[0][0], points(quality, "value"), "perplexity", styles=styles)
    lines_over(axes[0][1], points(quality, "delta"), "perplexity over dense, relative", styles=styles)
    lines_over(axes[1][0], points(quality, "recall_mean"), "recall, mean", styles=styles)
    for axis, key, title in ((axes[0][2], "value", "attention, PFLOP"), (axes[1][1], "density", "density")):
        _draw_cost(axis, cost, key, title, points, colours)
    axes[1][1].scatter(PUBLISHED.keys(), [1 - one for one in PUBLISHED.values()], marker="*", s=80, color="black", zorder=3,
                       label="published (other model)")
    axes[0][0].legend(fontsize=8)
    axes[1][1].legend(fontsize=8)
    criteria.draw(axes[1][2], cells_by_name)
    return figure


def _draw_cost(axis, cost: List[dict], key: str, title: str, points, colours: Dict[str, str]) -> None:
    """Solid: measured; dotted: extrapolated, from the last measured length on; crosses: structured."""
    basis = {name: points([row for row in cost if row["params"]["basis"] == name], key)
             for name in (MEASURED, EXTRAPOLATED, STRUCTURED)}
    for policy, some in basis[EXTRAPOLATED].items():
        line = sorted([max(basis[MEASURED][policy]), *some])
        axis.plot(*zip(*line), linestyle=":", color=colours[policy])
    for policy, some in basis[STRUCTURED].items():
        axis.plot(*zip(*sorted(some)), linestyle="none", marker="x", color=colours[policy])
    lines_over(axis, {"": [(row["params"]["tokens"], None) for row in cost]}, title, log_y=True)
    for policy, some in basis[MEASURED].items():
        axis.plot(*zip(*sorted(some)), marker="o", markersize=4, color=colours[policy])
    axis.set_title(f"{title} (dotted: extrapolated; x: structured)", fontsize=10)


EXPERIMENT = Experiment(4, "SparseSkeleton: perplexity, FLOP, sparsity, criteria", cells, rows, text, plot)
