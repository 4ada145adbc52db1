"""Tables of a run: rows with their difference to dense, as JSON and Markdown, and plots."""

import json
import math
import statistics
from pathlib import Path
from typing import Dict, List, Optional

from headwater.eval.files import write_text
from headwater.eval.metrics import bootstrap, percentile, perplexity, relative_perplexity

DENSE = "dense"
COLUMNS = (("value", "value", "{:.4g}"), ("dense", "dense_value", "{:.4g}"), ("difference", "delta", "{:+.4f}"),
           ("95 % interval", "interval", "{}"), ("NLL", "nll", "{:.4f}"), ("NLL difference", "nll_delta", "{:+.4f}"),
           ("n", "samples", "{}"), ("recall", "recall_mean", "{:.4f}"), ("recall p1", "recall_p1", "{:.4f}"),
           ("error", "rel_error", "{:.4f}"), ("density", "density", "{:.4f}"), ("attention ms", "attention_ms", "{:.1f}"),
           ("prefill ms", "prefill_ms", "{:.1f}"))


def make_rows(records, *, model: str, seed: int, confidence: float = 0.95) -> List[dict]:
    """One row a policy, length and set: {"params": {model, tokens, policy, set}, "metrics": {...}}.

    metrics.value is perplexity (sets "ppl:...") or the share of right answers; delta is the perplexity's relative rise over
    dense, or the difference of shares; ci_low and ci_high are delta's interval. nll is the mean of targets or answer tokens,
    in nats. Compared are only windows and questions that both policies did. Times are medians of prompts, density their mean.
    """
    groups = {}
    for result in records.results:
        groups.setdefault((result.tokens, result.set, result.policy), {})[result.name] = result
    recalls = {}
    for one in records.recalls:
        recalls.setdefault((one.tokens, one.set, one.policy), []).append(one)
    order = {label: i for i, label in enumerate(dict.fromkeys(result.policy for result in records.results))}
    rows = []
    for key in sorted(groups, key=lambda k: (k[0], k[1], order[k[2]])):
        tokens, set_name, policy = key
        metrics = {**_quality(groups[key], groups.get((tokens, set_name, DENSE)), set_name, seed, confidence),
                   **_costs(groups[key]), **_recall(recalls.get(key, []))}
        rows.append({"params": {"model": model, "tokens": tokens, "policy": policy, "set": set_name}, "metrics": metrics})
    return rows


def _quality(own: dict, dense: Optional[dict], set_name: str, seed: int, confidence: float) -> dict:
    is_text = set_name.startswith("ppl:")
    nll = statistics.fmean(result.nll for result in own.values())
    metrics = {"nll": nll, "samples": len(own)}
    metrics["value"] = perplexity(nll) if is_text else statistics.fmean(result.correct for result in own.values())
    both = [name for name in own if name in dense] if dense else []
    if not both:
        return metrics
    names = [own[name].group for name in both]
    nll_change = bootstrap([own[name].nll - dense[name].nll for name in both], seed=seed, confidence=confidence, groups=names)
    metrics.update(nll_delta=nll_change.value, nll_ci_low=nll_change.low, nll_ci_high=nll_change.high, paired=len(both))
    if is_text:
        metrics["dense_value"] = perplexity(statistics.fmean(dense[name].nll for name in both))
        change = [relative_perplexity(x) for x in (nll_change.value, nll_change.low, nll_change.high)]
    else:
        metrics["dense_value"] = statistics.fmean(dense[name].correct for name in both)
        hits = bootstrap([float(own[name].correct) - float(dense[name].correct) for name in both], seed=seed,
                         confidence=confidence, groups=names)
        change = [hits.value, hits.low, hits.high]
    metrics.update(zip(("delta", "ci_low", "ci_high"), change))
    return metrics


def _costs(own: dict) -> dict:
    prompts = {(result.group, result.attention_ms): result for result in own.values()}.values()
    return {"density": statistics.fmean(result.density for result in prompts),
            "attention_ms": statistics.median(result.attention_ms for result in prompts),
            "prefill_ms": statistics.median(result.prefill_ms for result in prompts)}


def _recall(recalls: list) -> dict:
    """Over all layers, heads and rows; rel_error is the mean over layers."""
    if not recalls:
        return {}
    values = [value for one in recalls for layer in one.recall for value in layer]
    worst = min(statistics.fmean(layer) for one in recalls for layer in one.recall)
    return {"recall_mean": statistics.fmean(values), "recall_p1": percentile(values, 1), "recall_worst_layer": worst,
            "rel_error": statistics.fmean(error for one in recalls for error in one.error)}


def markdown(rows: List[dict], meta: dict, notes: List[str]) -> str:
    """A table a length and set."""
    lines = [f"# {meta['model']}: what policies cost and save", "",
             f"{meta['device']}, {meta['dtype']}, seed {meta['seed']}, {meta['date']}. Value: perplexity (ppl) or share of "
             "right answers; difference: to dense, relative for perplexity, of shares else, on the same windows and "
             "questions; NLL in nats a token; recall: dense attention's mass on attended keys, over sampled rows of all "
             f"layers and heads. {meta['questions']}", ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    last = None
    for row in rows:
        params, metrics = row["params"], dict(row["metrics"])
        if (params["tokens"], params["set"]) != last:
            last = (params["tokens"], params["set"])
            lines += [""] * (lines[-1] != "") + [f"## {params['tokens']} tokens, {params['set']}", "",
                      "| policy | " + " | ".join(name for name, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        if "ci_low" in metrics:
            metrics["interval"] = f"{metrics['ci_low']:+.4f} to {metrics['ci_high']:+.4f}"
        cells = (form.format(metrics[key]) if key in metrics else "" for _, key, form in COLUMNS)
        lines.append(f"| {params['policy']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, records, meta: dict, *, final: bool) -> List[Path]:
    """results.json (all of it, samples too), report.md, rows.jsonl (rows of bench/results), and at the end plots.png where
    matplotlib is there. Returns what was written."""
    rows = make_rows(records, model=meta["model"], seed=meta["seed"])
    texts = {
        "results.json": json_line({"meta": meta, "rows": rows, **records.as_dict()}),
        "report.md": markdown(rows, meta, records.notes),
        "rows.jsonl": "".join(json_line({"bench": "policies", **{key: meta[key] for key in ("device", "commit", "date")},
                                     **row, "peers": {}}) for row in rows)}
    for name, text in texts.items():
        write_text(folder / name, text)
    written = [folder / name for name in texts]
    if final and plot(folder / "plots.png", rows):
        written.append(folder / "plots.png")
    return written


def json_line(value) -> str:
    """A line; null for what is not finite (a policy may fail so)."""
    def clean(part):
        if isinstance(part, dict):
            return {key: clean(one) for key, one in part.items()}
        if isinstance(part, (list, tuple)):
            return [clean(one) for one in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(clean(value), allow_nan=False) + "\n"


PANELS = (("perplexity over dense, relative", "delta", True), ("right answers, share", "value", False),
          ("answer NLL, nats a token", "nll", False), ("recall, mean", "recall_mean", None), ("density", "density", None),
          ("attention, ms", "attention_ms", None))


TRADES = (("perplexity over dense, relative", "delta", True), ("answer NLL over dense, nats", "nll_delta", False))


def plot(path: Path, rows: List[dict]) -> bool:
    """Six panels over prompt length, a line a policy, its sets averaged, and two at the longest: what is lost over attention's
    time. False where matplotlib is absent."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(20, 9), constrained_layout=True)
    policies = list(dict.fromkeys(row["params"]["policy"] for row in rows))
    for axis, (title, key, of_text) in zip(axes[:, :3].flat, PANELS):
        for policy in policies:
            points = _means(rows, policy, key, of_text)
            axis.plot(list(points), list(points.values()), marker="o")
        axis.set_xscale("log", base=2)
        axis.set_title(title)
        axis.set_xlabel("tokens")
    longest = max((row["params"]["tokens"] for row in rows), default=0)
    for axis, (title, key, of_text) in zip(axes[:, 3], TRADES):
        for policy in policies:
            time, lost = (_means(rows, policy, name, of_text).get(longest) for name in ("attention_ms", key))
            axis.plot(*([[time], [lost]] if None not in (time, lost) else [[], []]), marker="o", linestyle="", markersize=9)
        axis.set_title(f"{title}, {longest} tokens")
        axis.set_xlabel("attention, ms")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    if policies:
        figure.legend(axes[0, 0].lines, policies, loc="outside lower center", ncols=min(4, len(policies)))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _means(rows: List[dict], policy: str, key: str, of_text: Optional[bool]) -> Dict[int, float]:
    """By length, of a metric over the sets of texts, of questions, or (None) all."""
    points: Dict[int, List[float]] = {}
    for row in rows:
        is_text = row["params"]["set"].startswith("ppl:")
        if row["params"]["policy"] == policy and key in row["metrics"] and of_text in (None, is_text):
            points.setdefault(row["params"]["tokens"], []).append(row["metrics"][key])
    return {length: statistics.fmean(points[length]) for length in sorted(points)}
