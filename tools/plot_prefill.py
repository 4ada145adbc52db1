#!/usr/bin/env python3
"""Draws prefill rows: time and peak device memory against prompt length, both axes logarithmic.

    plot_prefill.py [ROWS.jsonl ...] [--device H100] --output prefill.png

One line a series (device, model, GPUs, partition, strategy, policy, linear layers, sink, checkpoints), dashed its floor, points its peers. Of rows with equal
parameters the last one counts; rows of packed prompts (bench/packed_bench.py) and of skipped lengths are left out. Needs matplotlib (pip install
matplotlib); exit status 2 where it is missing.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def series_name(row: dict, show_device: bool) -> str:
    params = row["params"]
    name = f"{params['model']}, {params['policy']}"
    if params.get("gpus", 0) > 1:
        emulated = " emulated" if params.get("emulated") else ""
        name += f", {params['gpus']}{emulated} GPUs ({params['partition']}, {params['strategy']})"
    if params.get("density_mode") == "forced":
        name += f" at {row['metrics']['density']:.2g}"
    name += f", {params['linear']}" + {"verify": ", KV verified", "memory": ", KV kept"}.get(params.get("sink"), "")
    if params.get("checkpoint_layers", 0) > 0:
        name += ", checkpoints"
    return f"{row['device']}: {name}" if show_device else name


def read_series(paths: list, device: str = "") -> dict:
    """Rows by series and length, of devices whose names hold `device`. Raises ValueError for what is no prefill row."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if row["bench"] != "prefill":
                    raise ValueError(f"bench is {row['bench']!r}")
                if row["params"].get("case") == "packed":
                    continue  # many prompts, of many lengths
                if "skipped" in row:
                    continue  # the device does not hold it
                row["metrics"]["ttft_s"], row["params"]["tokens"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a prefill row ({error})") from error
            if device in row["device"]:
                rows.append(row)
    show_device = len({row["device"] for row in rows}) > 1
    series = {}
    for row in rows:
        series.setdefault(series_name(row, show_device), {})[row["params"]["tokens"]] = row
    return {name: [by_length[n] for n in sorted(by_length)] for name, by_length in sorted(series.items())}


def points(rows: list, value) -> tuple:
    """Lengths and values of the rows that have one."""
    pairs = [(row["params"]["tokens"], value(row)) for row in rows if value(row) is not None]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def draw(series: dict, output: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(12, 6), constrained_layout=True)
    for name, rows in series.items():
        line, = time.plot(*points(rows, lambda row: row["metrics"]["ttft_s"]), marker="o", markersize=4, label=name)
        lengths, floors = points(rows, lambda row: row["metrics"].get("floor_s"))
        time.plot(lengths, floors, linestyle="--", color=line.get_color())
        memory.plot(*points(rows, lambda row: row["metrics"]["peak_device_bytes"] / GIB), marker="o", markersize=4)
    peers = sorted({peer for rows in series.values() for row in rows for peer, values in row["peers"].items() if "ttft_s" in values})
    for marker, peer in zip("sD^vPX", peers):
        for axes, key, scale in ((time, "ttft_s", 1), (memory, "peak_device_bytes", GIB)):
            found = [points(rows, lambda row: row["peers"].get(peer, {}).get(key)) for rows in series.values()]
            lengths, values = ([x for pair in found for x in pair[i]] for i in (0, 1))
            axes.plot(lengths, [value / scale for value in values], linestyle="", marker=marker, color="black", label=peer)
    for axes, title in ((time, "time to first token, s (dashed: floor)"), (memory, "peak device memory, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(True, which="both", alpha=0.25)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(output, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="*", default=[ROOT / "bench" / "results" / "prefill.jsonl"])
    parser.add_argument("--device", default="", help="rows of devices whose names hold this; every device")
    parser.add_argument("--output", type=Path, default=Path("prefill.png"))
    arguments = parser.parse_args()
    try:
        series = read_series(arguments.rows, arguments.device)
        if not series:
            raise ValueError("no rows")
        draw(series, arguments.output)
    except ImportError:
        print("plot_prefill: matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"plot_prefill: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {', '.join(series)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
