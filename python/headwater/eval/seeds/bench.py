"""What experiments are made of, and what they share: the model, texts and prompts, timing."""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch

from headwater.eval import cli, policies
from headwater.eval.attention import Stats, dense_attention, dense_stats
from headwater.eval.model import EvalModel
from headwater.eval.policies import Policy
from headwater.eval.policies.published import KERNELS, release
from headwater.eval.report import make_rows
from headwater.eval.runner import Result, Runner, Settings, Window

RECALL = ("recall_mean", "recall_p1", "recall_worst_layer", "rel_error")


class CellError(RuntimeError):
    """Why a cell has no figures."""


@dataclass(frozen=True)
class Cell:
    name: str  # unique in its experiment
    run: Callable[[], Any]  # what JSON can hold


@dataclass(frozen=True)
class Experiment:
    number: int
    title: str
    cells: Callable[["Bench"], Iterable[Cell]]
    # (what cells left, by name; Setting) -> rows {"params", "metrics"}, and "peers" where there are some
    rows: Callable[[Mapping[str, Any], "Setting"], List[dict]]
    text: Callable[[List[dict]], List[str]]  # Markdown of the rows
    plot: Callable[[List[dict], Mapping[str, Any]], Any]  # a matplotlib figure of rows and cells, or None


@dataclass(frozen=True)
class Setting:
    """Of a run; what is left in DIR by another one is not mixed in."""

    model: str
    device: str
    dtype: str
    commit: str
    seed: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    flags: Dict[str, Any] = field(default_factory=dict)


class Bench:
    """One model and the flags. `deadline` is the running experiment's, by time.monotonic()."""

    def __init__(self, model: EvalModel, tokenizer, args: argparse.Namespace, setting: Setting, say: Callable[[str], None]):
        self.model, self.tokenizer, self.args, self.setting, self.say = model, tokenizer, args, setting, say
        self.deadline = float("inf")
        self.notes: List[str] = []  # of the running experiment
        self.failed = False  # something in it
        self._gathered: Dict[tuple, dict] = {}

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def cuda(self) -> bool:
        return self.model.device.type == "cuda"

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    def fail(self, what: str, error: Exception) -> None:
        """Notes an error that leaves `what` without figures."""
        self.failed = True
        lines = str(error).splitlines()
        self.note(f"failed: {what}: " + ("" if isinstance(error, CellError) else f"{type(error).__name__}: ") +
                  (lines[0] if lines else ""))

    def policy(self, spec: str, model: Optional[Mapping[str, Any]] = None) -> Policy:
        """model: other values than this model's, of headwater.eval.policies.make()."""
        made = policies.make(spec, self.model.policy_values() if model is None else model)
        if getattr(made, "dense_below_tokens", 0) == KERNELS:  # the methods as published, at short lengths too
            made = replace(made, dense_below_tokens=0)
        return made

    def fitting(self, lengths: Sequence[int]) -> List[int]:
        """Those that the model is for, ascending; the others are noted."""
        most = self.model.max_tokens
        over = [length for length in lengths if length > most]
        if over:
            self.note(f"{', '.join(map(str, over))} tokens left out: the model is for {most} at most")
        return sorted({length for length in lengths if length <= most})

    def prompts(self, lengths: Sequence[int], *, windows: int, tasks: Sequence[str] = ()) -> dict:
        """Windows of the texts and own retrieval prompts by length; the windows' targets are the same at all lengths."""
        a, key = self.args, (tuple(lengths), windows, tuple(tasks))
        if key not in self._gathered:
            wanted = SimpleNamespace(tokens=list(lengths), text=a.text, windows=windows, prompts=[], prompts_at_most=0,
                                     own=list(tasks), own_prompts=a.own_prompts, questions=a.questions, seed=a.seed,
                                     targets=min(a.targets, min(lengths) // 2))
            notes: List[str] = []
            self._gathered[key] = cli.gather(wanted, self.tokenizer, notes)
            for note in notes:
                self.note(note)
        return self._gathered[key]

    def text_prompts(self, length: int, count: int) -> List[Window]:
        """At most `count` windows of that length, taken from the texts in turn. CellError: there is none."""
        found = self.prompts([length], windows=-(-count // len(self.args.text))).get(length, [])
        by_text: Dict[str, list] = {}
        for window in found:
            by_text.setdefault(window.set, []).append(window)
        turns = [some[i] for i in range(count) for some in by_text.values() if i < len(some)]
        if not turns:
            raise CellError(f"no text of --text has {length} tokens")
        return turns[:count]

    def quality(self, spec: str, length: int, prompts: Sequence) -> dict:
        """A policy's results on prompts of one length, and its recall by set."""
        if not prompts:
            raise CellError(f"no prompts of {length} tokens")
        left = max(0.0, self.deadline - time.monotonic())
        settings = Settings(self.args.seed, 1, self.args.recall_rows, False, left)
        runner = Runner(self.model, settings, self.say, lambda records: None)
        runner.run({spec: self.policy(spec)}, {length: prompts})
        if runner.failed or not runner.records.results:
            raise CellError(runner.records.notes[-1] if runner.records.notes else "no results")
        for note in runner.records.notes:
            self.note(note)
        recalls = {row["params"]["set"]: {key: row["metrics"][key] for key in RECALL if key in row["metrics"]}
                   for row in make_rows(runner.records, model="", seed=self.args.seed)}
        return {"results": [asdict(one) for one in runner.records.results], "recalls": recalls,
                "partial": bool(runner.records.notes)}

    def time_ms(self, run: Callable[[], Any], repeats: int) -> float:
        """Median of `repeats` calls after one that is not timed."""
        run()
        times = []
        for _ in range(repeats):
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def release(self) -> None:
        """Device memory that no cell needs any more."""
        release()
        if self.cuda:
            torch.cuda.empty_cache()


def quality_cells(bench: Bench, specs: Sequence[str], prompts: Mapping[int, Sequence]) -> Iterable[Cell]:
    """A cell a policy and length; short ones first, of these dense, which the rows compare with."""
    for length in sorted(prompts):
        for spec in dict.fromkeys(["dense", *specs]):
            yield Cell(f"{spec} at {length}",
                       lambda spec=spec, length=length: bench.quality(spec, length, prompts[length]))


def quality_rows(cells: Mapping[str, Any], setting: Setting) -> List[dict]:
    """headwater.eval's rows of cells of quality_cells(); cells of other kinds are passed over."""
    results, recalls = [], {}
    for cell in cells.values():
        if "results" not in cell:
            continue
        found = [Result(**one) for one in cell["results"]]
        results += found
        for name, values in cell["recalls"].items():
            recalls[found[0].tokens, name, found[0].policy] = values
    records = SimpleNamespace(results=results, recalls=[])
    rows = make_rows(records, model=setting.model, seed=setting.seed)
    for row in rows:
        params = row["params"]
        row["metrics"].update(recalls.get((params["tokens"], params["set"], params["policy"]), {}))
    return rows


@dataclass(frozen=True)
class OnDense:
    """Dense attention that shows every layer: visit(layer, q, k, v)."""

    visit: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
    name = "on_dense"

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, Stats]:
        self.visit(layer, q, k, v)
        return dense_attention(q, k, v), dense_stats()
