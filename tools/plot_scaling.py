#!/usr/bin/env python3
"""Shows how prefill scales over GPUs: a table in Markdown, and a plot of efficiency against one GPU.

    plot_scaling.py [ROWS.jsonl ...] [--device H200] [--output scaling.png]     the table goes to standard output

Rows are those of `headwater bench prefill`. Efficiency is one GPU's time over as many times the group's: of the same device, prompt
length, policy, density and type of linear layers, with the same sink where there is one. Of rows with equal parameters the last
one counts; lengths that have no row of several GPUs, and rows of packed prompts, are left out. A dash: not known. Needs matplotlib
for --output (pip install matplotlib); exit status 2 where it is missing.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = [ROOT / "bench" / "results" / name for name in ("prefill.jsonl", "scaling.jsonl")]
GIB = 2**30
HEAD = ("prompt", "linear", "GPUs", "strategy", "KV", "first token, s", "efficiency", "exposed", "imbalance", "peak GiB", "all KV, s",
        "predicted, s", "error")


def problem_of(row: dict) -> tuple:
    """What rows must share to be compared."""
    params = row["params"]
    density = round(row["metrics"].get("density", 1), 2) if params.get("density_mode") == "forced" else params.get("density_mode", "")
    return (row["device"], params["model"], params["policy"], density, params["tokens"], params["linear"])


def way_of(row: dict) -> tuple:
    """How it was run."""
    params = row["params"]
    return (params.get("gpus", 0), bool(params.get("emulated")), params.get("strategy", ""), params.get("partition", ""),
            params.get("sink", ""), params.get("checkpoint_layers", 0), params.get("link_gbytes_per_s", 0))


def read_rows(paths: list, device: str) -> dict:
    """Problem -> way -> row, both sorted. Raises ValueError for what is no prefill row."""
    problems = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if row["bench"] != "prefill":
                    raise ValueError(f"bench is {row['bench']!r}")
                if row["params"].get("case") == "packed" or "skipped" in row or device not in row["device"]:
                    continue
                row["metrics"]["ttft_s"]
                problems.setdefault(problem_of(row), {})[way_of(row)] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a prefill row ({error})") from error
    return {problem: dict(sorted(ways.items())) for problem, ways in sorted(problems.items(), key=str)
            if any(way[0] > 1 for way in ways)}


def efficiency(row: dict, ways: dict):
    """Against one GPU; None: no such row."""
    gpus, sink = row["params"].get("gpus", 0), row["params"].get("sink", "")
    alone = [other for way, other in ways.items() if way[0] == 1]
    alone.sort(key=lambda other: other["params"].get("sink", "") != sink)
    return alone[0]["metrics"]["ttft_s"] / (gpus * row["metrics"]["ttft_s"]) if alone and gpus else None


def number(value, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def percent(value) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def cells(row: dict, ways: dict) -> list:
    params, metrics, predicted = row["params"], row["metrics"], row.get("predicted", {})
    density = f" at {metrics['density']:.2g}" if params.get("density_mode") == "forced" else ""
    gpus = f"{params['gpus']} emulated" if params.get("emulated") else str(params["gpus"])
    sink = params.get("sink", "") + (", checkpoints" if params.get("checkpoint_layers") else "")
    return [f"{params['tokens']:,}, {params['policy']}{density}", params["linear"], gpus, params.get("strategy", "-"), sink,
            number(metrics["ttft_s"], 4), percent(efficiency(row, ways)) if params["gpus"] > 1 else "-",
            percent(metrics.get("exposed_comm_ratio")), number(metrics.get("imbalance"), 4), f"{metrics['peak_device_bytes'] / GIB:.1f}",
            number(metrics.get("kv_acked_s"), 4), number(predicted.get("ttft_s"), 4), percent(predicted.get("error"))]


def table(problems: dict) -> str:
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [cells(row, ways) for ways in problems.values() for row in ways.values()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(problems: dict, output: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, share) = pyplot.subplots(1, 2, figsize=(12, 6), constrained_layout=True)
    for (_, _, policy, density, tokens, linear), ways in problems.items():
        name = f"{tokens:,}, {policy}{f' at {density}' if isinstance(density, float) else ''}, {linear}"
        best = {}
        for way, row in ways.items():
            held = best.get(way[:2])
            if held is None or row["metrics"]["ttft_s"] < held["metrics"]["ttft_s"]:
                best[way[:2]] = row
        color = None
        for emulated, style in ((False, "-"), (True, "--")):
            rows = [best[way] for way in sorted(best) if way[1] == emulated or (emulated and way == (1, False))]
            if not any(row["params"].get("emulated", False) == emulated for row in rows):
                continue
            gpus = [row["params"]["gpus"] for row in rows]
            line, = time.plot(gpus, [row["metrics"]["ttft_s"] for row in rows], style, marker="s" if emulated else "o", color=color,
                              fillstyle="none" if emulated else "full", label=None if color else name)
            color = line.get_color()
            share.plot(gpus, [100 * (efficiency(row, ways) or float("nan")) for row in rows], style, marker="s" if emulated else "o",
                       color=color, fillstyle="none" if emulated else "full")
    for axes, title in ((time, "time to first token, s (dashed: emulated)"), (share, "efficiency against one GPU, %")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="GPUs", title=title, xticks=[1, 2, 4, 8], xticklabels=["1", "2", "4", "8"])
        axes.grid(True, which="both", alpha=0.25)
    time.set_yscale("log")
    share.set_ylim(60, 110)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(output, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="*", default=RESULTS)
    parser.add_argument("--device", default="", help="rows of devices whose names hold this; every device")
    parser.add_argument("--output", type=Path, help="the plot; without it only the table is made")
    arguments = parser.parse_args()
    try:
        problems = read_rows(arguments.rows, arguments.device)
        if not problems:
            raise ValueError("no rows of several GPUs")
        print(table(problems), end="")
        if arguments.output:
            draw(problems, arguments.output)
    except ImportError:
        print("plot_scaling: matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"plot_scaling: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
