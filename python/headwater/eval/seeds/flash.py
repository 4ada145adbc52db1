"""Experiment 6: speed-up of the search and attention of flash, flash2 and headwater over dense attention, as FlashPrefill
quotes it, on the model's own activations and on structured inputs."""

from typing import Any, Dict, Iterable, List, Mapping

import torch

from headwater.eval.attention import Stats, recall_and_error
from headwater.eval.metrics import percentile
from headwater.eval.runner import sample_rows
from headwater.eval.seeds.bench import Bench, Cell, CellError, Experiment, OnDense, Setting
from headwater.eval.seeds.report import lines_over, table, tokens_name
from headwater.eval.seeds.structured import dense_engines, structured_qkv

# A layer is timed by itself, as layer 0: flash2 leaves the first four dense unless told otherwise.
SPECS = ("flash", "flash2:dense_layers=0", "headwater")
STRUCTURED, CAPTURED = "structured", "captured"
SHAPE = (32, 8, 128)  # query heads, KV heads, head_dim of structured inputs: Llama-3-8B's, which the papers quote
LAYERS = 4  # of captured ones, spread evenly
RECALL_ROWS = 32
# Over FlashAttention 2. V1: arXiv:2603.06199, Qwen3-30B-A3B, GPU not stated. The others: arXiv:2608.19758, H20,
# Llama-3.1-8B, densities of its benchmarks.
PUBLISHED = (("FlashPrefill V1, its paper", 4096, 1.71, None), ("FlashPrefill V1, its paper", 262144, 27.78, None),
             ("FlashPrefill V1, V2's paper", 4096, 1.21, 0.740), ("FlashPrefill V1, V2's paper", 131072, 22.67, 0.045),
             ("FlashPrefill V2 BF16", 4096, 1.66, 0.760), ("FlashPrefill V2 BF16", 131072, 27.21, 0.046))


def cells(bench: Bench) -> Iterable[Cell]:
    lengths = sorted(set(bench.args.flash_tokens))
    for length in lengths:
        yield Cell(f"{STRUCTURED} at {length}", lambda length=length: structured(bench, length))
    for length in bench.fitting(lengths):
        yield Cell(f"{CAPTURED} at {length}", lambda length=length: captured(bench, length))


def structured(bench: Bench, length: int) -> dict:
    shape = SHAPE if bench.cuda else (bench.setting.q_heads, bench.setting.kv_heads, bench.setting.head_dim)
    q, k, v = structured_qkv(length, *shape, bench.args.seed, bench.model.device)
    layers = {"0": operator(bench, q, k, v)}
    return {"tokens": length, "inputs": STRUCTURED, "shape": list(shape), "layers": layers, "partial": lacking(layers)}


def captured(bench: Bench, length: int) -> dict:
    """Layers of a prompt, each timed when the pass comes to it."""
    count = bench.setting.layers
    wanted = sorted({round(i * (count - 1) / max(1, LAYERS - 1)) for i in range(LAYERS)})
    found: Dict[str, dict] = {}

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer in wanted:
            found[str(layer)] = operator(bench, q, k, v)

    bench.model.prefill(bench.text_prompts(length, 1)[0].ids, OnDense(visit))
    s = bench.setting
    return {"tokens": length, "inputs": CAPTURED, "shape": [s.q_heads, s.kv_heads, s.head_dim], "layers": found,
            "partial": lacking(found)}


def lacking(layers: Mapping[str, dict]) -> bool:
    """Whether a policy failed on some layer."""
    return any(spec not in layer for layer in layers.values() for spec in SPECS)


def operator(bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict:
    """Milliseconds of dense engines and policies, which take turns twice, the lower median counting; what policies computed."""
    repeats = bench.args.repeats if len(q) <= 65536 else max(1, bench.args.repeats // 2)
    engines = dense_engines(q, k, v)
    stats: Dict[str, Stats] = {}
    for spec in SPECS:
        try:
            policy = bench.policy(spec)
        except (ValueError, NotImplementedError, OSError) as error:
            bench.fail(f"{spec} at {len(q)} tokens", error)
            continue

        def run(policy=policy, spec=spec) -> torch.Tensor:
            out, stats[spec] = policy.attend(0, q, k, v)
            return out

        engines[spec] = run
    times: Dict[str, float] = {}
    for _ in range(2):
        for name, engine in list(engines.items()):
            try:
                times[name] = min(bench.time_ms(engine, repeats), times.get(name, float("inf")))
            except (RuntimeError, NotImplementedError) as error:
                bench.fail(f"{name} at {len(q)} tokens", error)
                engines.pop(name)
                times.pop(name, None)
    if not times.keys() & set(SPECS):
        raise CellError(f"no policy ran at {len(q)} tokens")
    rows_ = sample_rows(len(q), RECALL_ROWS, bench.args.seed, "flash").to(q.device)
    found: Dict[str, dict] = {name: {"ms": ms} for name, ms in times.items()}
    for spec in times.keys() & set(SPECS):
        out = engines[spec]()  # its lists are the last that the policy made
        recall, error = recall_and_error(q, k, v, out, stats[spec], rows_)
        found[spec].update(density=stats[spec].density(), ran=stats[spec].ran, rel_error=error,
                           recall_mean=float(recall.mean()), recall_p1=percentile(recall.flatten().tolist(), 1))
    return found


def rows(cells_by_name: Mapping[str, Any], setting: Setting) -> List[dict]:
    """value: the policy's ms, dense_value: FA2's (a CPU's dense); delta: relative; speedup_*: dense over policy. Of captured
    layers the sums of times and the means of the rest."""
    found = []
    for cell in cells_by_name.values():
        layers = list(cell["layers"].values())
        total = {name: sum(layer[name]["ms"] for layer in layers) for name in layers[0]
                 if all(name in layer for layer in layers)}
        dense = {name: ms for name, ms in total.items() if name not in SPECS}
        base = next((dense[name] for name in ("fa2", "sdpa", "cudnn") if name in dense), None)
        for spec in SPECS:
            if spec not in total:
                continue
            ms = total[spec]
            metrics = {"value": ms, "attention_ms": ms, "layers": len(layers)}
            if base is not None:
                metrics.update(dense_value=base, delta=ms / base - 1)
            metrics.update({f"speedup_{name}": other / ms for name, other in dense.items()})
            for key in ("density", "recall_mean", "recall_p1", "rel_error"):
                metrics[key] = sum(layer[spec][key] for layer in layers) / len(layers)
            q_heads, kv_heads, head_dim = cell["shape"]
            found.append({"params": {"model": setting.model if cell["inputs"] == CAPTURED else STRUCTURED,
                                     "tokens": cell["tokens"], "policy": spec, "set": f"attention:{cell['inputs']}",
                                     "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim},
                          "metrics": metrics, "peers": {name: {"ms": other} for name, other in dense.items()}})
    return sorted(found, key=lambda row: (row["params"]["set"], row["params"]["tokens"]))


def text(found: List[dict]) -> List[str]:
    names = list(dict.fromkeys(name for row in found for name in row["peers"]))
    lines = []
    for row in found:
        p, m = row["params"], row["metrics"]
        lines.append([p["set"].removeprefix("attention:"), p["tokens"], f"{p['q_heads']}/{p['kv_heads']}, {p['head_dim']}",
                      p["policy"], m["value"], *(row["peers"].get(name, {}).get("ms") for name in names),
                      *(f"{m[f'speedup_{name}']:.2f}x" if f"speedup_{name}" in m else None for name in names),
                      m["density"], m["recall_mean"], m["recall_p1"], m["rel_error"]])
    published = [[name, tokens_name(tokens), f"{times:.2f}x", density] for name, tokens, times, density in PUBLISHED]
    return ["Search and attention together, against torch's dense attention: fa2 its FlashAttention 2, cudnn its cuDNN "
            "(FlashAttention 3's class). Captured: the sum over "
            f"at most {LAYERS} layers of the model on text; each layer is timed by itself.", "",
            *table(("inputs", "tokens", "heads, dim", "policy", "ms", *(f"{name} ms" for name in names),
                    *(f"over {name}" for name in names), "density", "recall", "recall p1", "error"), lines),
            "", "Published, over FlashAttention 2 (arXiv:2603.06199 and 2608.19758; other models, and H20 where it is stated):",
            "", *table(("what", "tokens", "speed-up", "density"), published)]


def plot(found: List[dict], cells_by_name: Mapping[str, Any]):
    from matplotlib import pyplot

    if not found:
        return None
    sets = sorted({row["params"]["set"] for row in found}, reverse=True)
    names = list(dict.fromkeys(name for row in found for name in row["peers"]))
    figure, axes = pyplot.subplots(len(sets), len(names) + 1, figsize=(1 + 5 * (len(names) + 1), 0.5 + 4 * len(sets)),
                                   squeeze=False, constrained_layout=True)
    for line, set_name in zip(axes, sets):
        here = [row for row in found if row["params"]["set"] == set_name]
        shape = "{q_heads}/{kv_heads} heads of {head_dim}".format(**here[0]["params"])

        def points(key: str, here=here) -> dict:
            return {spec: [(row["params"]["tokens"], row["metrics"].get(key)) for row in here
                           if row["params"]["policy"] == spec] for spec in SPECS}

        for axis, name in zip(line, names):
            lines_over(axis, points(f"speedup_{name}"), f"{set_name.removeprefix('attention:')}, {shape}: speed-up over {name}",
                       log_y=True)
            axis.axhline(1, color="grey", linewidth=1)
            if name == "fa2":
                _draw_published(axis, {row["params"]["tokens"] for row in here})
            axis.legend(fontsize=7)
        lines_over(line[-1], points("density"), "density", log_y=True)
    return figure


def _draw_published(axis, lengths: set) -> None:
    for name, colour, marker in (("FlashPrefill V1, its paper", "black", "*"), ("FlashPrefill V1, V2's paper", "grey", "v"),
                                 ("FlashPrefill V2 BF16", "grey", "^")):
        some = [(tokens, times) for one, tokens, times, _ in PUBLISHED if one == name and tokens in lengths]
        if some:
            axis.scatter(*zip(*some), color=colour, marker=marker, zorder=3, label=f"published: {name}")


EXPERIMENT = Experiment(6, "Speed-up of attention over dense (FlashPrefill)", cells, rows, text, plot)
