"""Experiment 1: time of prefill a token, with intervals over prompts, as SharePrefill's notes ask for it."""

import statistics
from typing import Any, Iterable, List, Mapping

from headwater.eval.metrics import bootstrap
from headwater.eval.seeds.bench import Bench, Cell, CellError, Experiment, Setting
from headwater.eval.seeds.report import table

DENSE = "dense"


def specs(bench: Bench) -> List[str]:
    share = f"share:clusters={bench.args.clusters}" if bench.args.clusters else "share:pivots_per_layer=1"
    return [DENSE, share, "vertical_slash", "flex"]


def cells(bench: Bench) -> Iterable[Cell]:
    if not bench.args.clusters:
        bench.note("no --clusters: share ran with one pivot a layer in their place")
    for length in bench.fitting(bench.args.tokens):
        yield Cell(f"{length} tokens", lambda length=length: measure(bench, length))


def measure(bench: Bench, length: int) -> dict:
    """Milliseconds of each policy and prompt. Policies take turns prompt by prompt, after one pass each that does not
    count; one that fails is noted and left out."""
    prompts = bench.text_prompts(length, bench.args.timed_prompts)
    chosen, times = {}, {}
    for spec in specs(bench):
        try:
            policy = bench.policy(spec)
            bench.model.prefill(prompts[0].ids, policy)
            chosen[spec] = policy
            times[spec] = {"prefill_ms": [], "attention_ms": [], "density": []}
        except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
            bench.fail(f"{spec} at {length}", error)
    done = 0
    for number, prompt in enumerate(prompts):
        if bench.late and number > 0:
            bench.note(f"{length} tokens: {len(prompts) - number} of {len(prompts)} prompts left out, the time is over")
            break
        order = list(chosen)
        for spec in order[number % len(order):] + order[:number % len(order)]:
            one = bench.model.prefill(prompt.ids, chosen[spec])
            for name, value in (("prefill_ms", one.prefill_ms), ("attention_ms", one.attention_ms()),
                                ("density", one.density())):
                times[spec][name].append(value)
        done += 1
    if not times:
        raise CellError(f"no policy ran at {length} tokens")
    return {"tokens": length, "times": times, "prompts": [prompt.name for prompt in prompts[:done]],
            "partial": len(chosen) < len(specs(bench)) or done < len(prompts)}


def rows(cells_by_name: Mapping[str, Any], setting: Setting) -> List[dict]:
    """value, dense_value: ms of prefill a token; delta: relative, paired by prompt, and its interval."""
    found = []
    for cell in cells_by_name.values():
        tokens, dense = cell["tokens"], cell["times"].get(DENSE)
        for spec, times in cell["times"].items():
            metrics = {"samples": len(times["prefill_ms"]), "density": statistics.fmean(times["density"])}
            for part, name in (("prefill", "value"), ("attention", "attention")):
                one = bootstrap([ms / tokens for ms in times[f"{part}_ms"]], seed=setting.seed)
                metrics.update({name if name == "value" else "attention_ms_per_token": one.value,
                                f"{name}_low": one.low, f"{name}_high": one.high,
                                f"{part}_ms": statistics.median(times[f"{part}_ms"])})
            if dense:
                change = bootstrap([ms / base - 1 for ms, base in zip(times["prefill_ms"], dense["prefill_ms"])],
                                   seed=setting.seed)
                metrics.update(dense_value=statistics.fmean(dense["prefill_ms"]) / tokens, delta=change.value,
                               ci_low=change.low, ci_high=change.high)
            found.append({"params": {"model": setting.model, "tokens": tokens, "policy": spec, "set": "prefill_ms_per_token"},
                          "metrics": metrics})
    return sorted(found, key=lambda row: row["params"]["tokens"])


def text(found: List[dict]) -> List[str]:
    lines = []
    for row in found:
        m = row["metrics"]
        lines.append([row["params"]["tokens"], row["params"]["policy"], f"{m['value']:.5f}",
                      f"{m['value_low']:.5f} to {m['value_high']:.5f}", f"{m['attention_ms_per_token']:.5f}",
                      f"{m['attention_low']:.5f} to {m['attention_high']:.5f}",
                      f"{m['delta']:+.3f} ({m['ci_low']:+.3f} to {m['ci_high']:+.3f})" if "delta" in m else None,
                      m["density"], m["samples"]])
    return ["Milliseconds a token, mean of prompts, with 95 % intervals over prompts; policies took turns, each was warmed "
            "up at the length. Prefill: the whole pass, with the logits of the last token. Attention: search and attention, "
            "all layers.", "",
            *table(("tokens", "policy", "prefill ms/token", "95 % interval", "attention ms/token", "95 % interval",
                    "prefill over dense, relative", "density", "prompts"), lines)]


def plot(found: List[dict], cells_by_name: Mapping[str, Any]):
    from matplotlib import pyplot

    if not found:
        return None
    lengths = sorted({row["params"]["tokens"] for row in found})
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(1.5 + 4.5 * len(lengths), 4.2), squeeze=False,
                                   constrained_layout=True)
    for axis, length in zip(axes.flat, lengths):
        here = [row for row in found if row["params"]["tokens"] == length]
        for shift, key, name, colour in ((-0.2, "value", "prefill", "tab:blue"),
                                         (0.2, "attention_ms_per_token", "attention", "tab:orange")):
            ends = "value" if key == "value" else "attention"
            values = [row["metrics"][key] for row in here]
            below = [row["metrics"][key] - row["metrics"][f"{ends}_low"] for row in here]
            above = [row["metrics"][f"{ends}_high"] - row["metrics"][key] for row in here]
            places = [place + shift for place in range(len(here))]
            axis.bar(places, values, 0.38, color=colour, label=name)
            axis.errorbar(places, values, [below, above], fmt="none", ecolor="black", capsize=3)
        names = [row["params"]["policy"].replace(":", "\n").replace("clusters=", "clusters\n") for row in here]
        axis.set_xticks(range(len(here)), [name[:32] for name in names], fontsize=8)
        axis.set_ylabel("ms a token")
        axis.set_title(f"{length} tokens", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes.flat[0].legend()
    return figure


EXPERIMENT = Experiment(1, "Prefill time a token (SharePrefill)", cells, rows, text, plot)
