"""Experiment 5: FlexPrefill's gamma and tau, one at a time around the published 0.9 and 0.1."""

import statistics
from typing import Any, Dict, Iterable, List, Mapping

from headwater.eval.seeds.bench import Bench, Cell, Experiment, quality_cells, quality_rows
from headwater.eval.seeds.report import lines_over, table

GAMMAS = (0.8, 0.85, 0.9, 0.95, 0.99)
TAUS = (0.0, 0.05, 0.1, 0.2)
PUBLISHED = (0.9, 0.1)


def spec(gamma: float, tau: float) -> str:
    return f"flex:gamma={gamma:g},tau={tau:g}"


def values_of(policy: str) -> tuple:
    """(gamma, tau) of a spec()."""
    return tuple(float(part.split("=")[1]) for part in policy.removeprefix("flex:").split(","))


def cells(bench: Bench) -> Iterable[Cell]:
    lengths = bench.fitting(bench.args.tokens)
    if lengths:
        sweep = [spec(gamma, PUBLISHED[1]) for gamma in GAMMAS] + [spec(PUBLISHED[0], tau) for tau in TAUS]
        yield from quality_cells(bench, sweep, bench.prompts(lengths, windows=bench.args.windows))


def text(found: List[dict]) -> List[str]:
    lines = []
    for row in found:
        p, m = row["params"], row["metrics"]
        gamma, tau = values_of(p["policy"]) if p["policy"] != "dense" else ("dense", None)
        interval = f"{m['delta']:+.4f} ({m['ci_low']:+.4f} to {m['ci_high']:+.4f})" if "delta" in m else None
        lines.append([p["tokens"], p["set"].removeprefix("ppl:"), gamma, tau, m["value"], interval, m["density"],
                      m.get("recall_mean"), m.get("recall_p1"), m.get("rel_error"), m["attention_ms"]])
    return ["gamma at tau 0.1, tau at gamma 0.9. Against dense: relative rise of perplexity on the same windows, and its 95 % "
            "interval.", "",
            *table(("tokens", "text", "gamma", "tau", "perplexity", "against dense", "density", "recall", "recall p1",
                    "error", "attention ms"), lines)]


PANELS = (("perplexity over dense, relative", "delta"), ("density", "density"), ("recall, mean", "recall_mean"),
          ("attention, ms (dotted: dense)", "attention_ms"))


def plot(found: List[dict], cells_by_name: Mapping[str, Any]):
    from matplotlib import pyplot

    if not found:
        return None
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7), constrained_layout=True)
    lengths = sorted({row["params"]["tokens"] for row in found})
    styles = {f"{tokens} tokens": {"color": f"C{i}"} for i, tokens in enumerate(lengths)}
    for line, (name, own, other) in zip(axes, (("gamma, at tau 0.1", 0, 1), ("tau, at gamma 0.9", 1, 0))):
        for axis, (title, key) in zip(line, PANELS):
            points: Dict[str, Dict[float, list]] = {}
            for row in found:
                p = row["params"]
                if p["policy"] == "dense" or key not in row["metrics"]:
                    continue
                values = values_of(p["policy"])
                if values[other] == PUBLISHED[other]:
                    points.setdefault(f"{p['tokens']} tokens", {}).setdefault(values[own], []).append(row["metrics"][key])
            lines_over(axis, {label: [(x, statistics.fmean(some)) for x, some in by_value.items()]
                              for label, by_value in points.items()}, title, x=name, log_x=False, styles=styles)
            axis.set_xticks(GAMMAS if own == 0 else TAUS)
        for tokens, style in zip(lengths, styles.values()):
            dense = [row["metrics"]["attention_ms"] for row in found
                     if (row["params"]["policy"], row["params"]["tokens"]) == ("dense", tokens)]
            if dense:
                line[3].axhline(statistics.fmean(dense), linestyle=":", linewidth=1.2, **style)
    axes[0][0].legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(5, "gamma and tau (FlexPrefill)", cells, quality_rows, text, plot)
