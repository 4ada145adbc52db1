"""Runs experiments and keeps what they leave in DIR: seeds_N.json (all of experiment N), seeds_N.png, and of all experiments
in DIR report.md and rows.jsonl."""

import datetime
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from headwater.eval.files import write_text
from headwater.eval.report import json_line
from headwater.eval.seeds.bench import Bench, Experiment


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Folder:
    """DIR."""

    def __init__(self, path: Path):
        self._path = path

    def file(self, number: int, kind: str) -> Path:
        return self._path / f"seeds_{number}.{kind}"

    def read(self, number: int) -> Dict[str, Any]:
        """seeds_N.json, or {} where there is none. ValueError: it cannot be read."""
        path = self.file(number, "json")
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not {"setting", "cells", "rows", "notes", "date"} <= found.keys():
                raise ValueError("keys are missing")
            return found
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not of this program ({error}); move it away") from error

    def write(self, experiment: Experiment, bench: Bench, cells: Dict[str, Any], notes: List[str]) -> None:
        rows = experiment.rows(cells, bench.setting)
        for row in rows:
            row["params"]["experiment"] = f"seeds:{experiment.number}"
        write_text(self.file(experiment.number, "json"), json_line(
            {"setting": asdict(bench.setting), "date": now(), "notes": notes, "rows": rows, "cells": cells}))

    def summarise(self, experiments: Sequence[Experiment]) -> List[Path]:
        """report.md and rows.jsonl of what stands here, and pictures where matplotlib is there."""
        lines, rows, pictures = [], [], []
        for experiment in experiments:
            found = self.read(experiment.number)
            if not found:
                continue
            setting = found["setting"]
            picture = self._draw(experiment, found)
            pictures += [picture] if picture else []
            lines += [f"## {experiment.number}. {experiment.title}", "",
                      f"{setting['model']}, {setting['device']}, {setting['dtype']}, seed {setting['seed']}, "
                      f"commit {setting['commit'] or 'unknown'}, {found['date']}.", ""]
            lines += [f"- {note}" for note in found["notes"]] + [""] * bool(found["notes"])
            lines += experiment.text(found["rows"]) + [""]
            lines += [f"![experiment {experiment.number}]({picture.name})", ""] if picture else []
            rows += [json_line({"bench": "policies", "device": setting["device"], "commit": setting["commit"],
                                "date": found["date"], **row, "peers": row.get("peers", {})}) for row in found["rows"]]
        texts = {"report.md": "\n".join(["# The papers' experiments", "", *lines]), "rows.jsonl": "".join(rows)}
        for name, text in texts.items():
            write_text(self._path / name, text)
        return [self._path / name for name in texts] + pictures

    def _draw(self, experiment: Experiment, found: dict):
        try:
            from headwater.eval import figures
        except ImportError:
            return None
        figure = experiment.plot(found["rows"], found["cells"])
        if figure is None:
            return None
        figure.suptitle(f"{experiment.number}. {experiment.title} ({found['setting']['model']}, "
                        f"{found['setting']['device']})", fontsize=11)
        figures.save(figure, self.file(experiment.number, "png"), dpi=120)
        return self.file(experiment.number, "png")


def run(experiment: Experiment, bench: Bench, folder: Folder, limit_s: float) -> bool:
    """Runs the cells that DIR has not. False where one failed; the notes say why, and what was out of time."""
    kept = folder.read(experiment.number)
    if kept and kept["setting"] != json.loads(json_line(asdict(bench.setting))):
        bench.say(f"{folder.file(experiment.number, 'json')} is of other flags or another commit: begun anew")
        kept = {}
    cells = {name: cell for name, cell in kept.get("cells", {}).items() if not cell.get("partial")}
    begin = time.monotonic()
    bench.notes, bench.failed, bench.deadline = [], False, begin + limit_s
    every, left_out = list(experiment.cells(bench)), []
    if every and all(cell.name in cells for cell in every):
        bench.say(f"experiment {experiment.number}: all of it stands in {folder.file(experiment.number, 'json')}")
        return True
    try:
        for number, cell in enumerate(every, 1):
            if cell.name in cells:
                continue
            if bench.late:
                left_out.append(cell.name)
                continue
            bench.say(f"experiment {experiment.number}, {cell.name} ({number} of {len(every)}), "
                      f"{time.monotonic() - begin:.0f} s so far")
            try:
                cells[cell.name] = cell.run()
            except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
                bench.fail(cell.name, error)
            bench.release()
            folder.write(experiment, bench, cells, bench.notes)
    except KeyboardInterrupt:
        bench.note("broken off; what was done until then stands here")
        folder.write(experiment, bench, cells, bench.notes)
        raise
    if left_out:
        bench.note(f"left out, the {limit_s:g} s are over: {'; '.join(left_out)}")
    folder.write(experiment, bench, cells, bench.notes)
    return not bench.failed


def table(headers: Sequence[str], lines: Sequence[Sequence[Any]]) -> List[str]:
    """Markdown; None is an empty cell, a float has four digits."""
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers),
            *("| " + " | ".join(map(cell, line)) + " |" for line in lines)]


def lines_over(axis, points: Dict[str, List[tuple]], title: str, *, x: str = "tokens", log_x: bool = True, log_y: bool = False,
               styles: Optional[Dict[str, dict]] = None) -> None:
    """A line a label through its (x, y), ascending; what has no points has no line."""
    for label, some in points.items():
        some = sorted(point for point in some if point[1] is not None)
        if some:
            axis.plot(*zip(*some), **{"marker": "o", "markersize": 4, "label": label, **(styles or {}).get(label, {})})
    if log_x:
        axis.set_xscale("log", base=2)
        ticks = sorted({place for some in points.values() for place, _ in some})
        shown = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.4 * ticks[i - 1]]
        axis.set_xticks(shown, [tokens_name(tick) for tick in shown], fontsize=8)
        axis.minorticks_off()
    if log_y:
        plain_log(axis)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.grid(alpha=0.3)


def plain_log(axis) -> None:
    """A logarithmic y axis that is labelled with plain numbers."""
    from matplotlib import ticker

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0) if high / low > 4 else tuple(map(float, range(1, 10)))
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=20))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def tokens_name(tokens: float) -> str:
    """8192 is 8K."""
    if tokens >= 1 << 20 and tokens % (1 << 20) == 0:
        return f"{int(tokens) >> 20}M"
    return f"{tokens / 1024:.4g}K" if tokens >= 1024 else f"{tokens:g}"
