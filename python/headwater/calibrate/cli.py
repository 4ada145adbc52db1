"""Flags of python -m headwater.calibrate, and what they ask for."""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import torch

from headwater.calibrate.file import Calibration, save
from headwater.calibrate.search import CANDIDATES, DENSE, Measured, Outcome, descend, front, text_of
from headwater.cluster.cli import digest
from headwater.eval import policies, prompts, texts
from headwater.eval.attention import Stats
from headwater.eval.cli import load_tokenizer
from headwater.eval.items import Item, by_length, read_items
from headwater.eval.model import EvalModel, ModelError, find_model
from headwater.eval.runner import Window


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m headwater.calibrate", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Thresholds and windows of policy headwater for a model, within an error budget, on a GPU.")
    add = flags.add_argument
    add("model", help="model directory, or a name under HW_MODELS")
    add("--texts", nargs="+", required=True, metavar="FILE", help="calibration texts; names as in headwater.eval")
    add("--output", type=Path, required=True, metavar="FILE.json")
    add("--tokens", type=int, default=32768, help="of each prompt: the longest that is to be served, if there is time for it")
    add("--windows", type=int, default=2, help="of each text")
    add("--targets", type=int, default=2048, help="last tokens of a window, whose loss counts")
    add("--own", nargs="*", choices=prompts.TASKS, default=["words", "uuids"], help="retrieval prompts made from the seed")
    add("--own_prompts", type=int, default=1, help="of a task")
    add("--questions", type=int, default=2, help="of such a prompt")
    add("--prompts", nargs="+", type=Path, default=[], metavar="FILE.jsonl", help="retrieval prompts, as in headwater.eval")
    add("--budget", type=float, default=0.003, help="nats a token that each set may lose to dense attention")
    add("--unit", choices=("head", "layer"), default="head", help="what moves together: a KV head, or a layer's")
    add("--share", type=float, default=0.2, help="of the units that move in a round")
    add("--max_passes", type=int, default=5000, help="of the model over all prompts")
    add("--seed", type=int, default=1)
    add("--device", default="cuda")
    return flags


def check(args: argparse.Namespace) -> None:
    """ValueError where a flag is out of range."""
    for name, least in (("windows", 0), ("targets", 1), ("own_prompts", 0), ("questions", 1), ("max_passes", len(CANDIDATES) + 2),
                        ("tokens", 8192)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)}; at least {least} is wanted")
    if not 0 < args.budget <= 10:
        raise ValueError(f"--budget={args.budget}; over 0 and at most 10 is wanted")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share={args.share}; over 0 and at most 1 is wanted")
    if not torch.cuda.is_available():
        raise ValueError("no GPU: calibration runs the kernels that will serve")


class Trial:
    """Policy headwater on one choice of rungs, as headwater.eval takes policies."""

    name = "headwater"

    def __init__(self, thresholds: Sequence[float], windows: Sequence[int], model: dict):
        from headwater import ops

        self._run = ops.PatternPolicy("headwater", {"dense_below_tokens": 0}, thresholds=thresholds, windows=windows, **model)

    def attend(self, layer, q, k, v):
        if layer == 0:
            self._run.begin(len(q))
        out, found = self._run.attention(layer, q, k, v)
        return out, Stats(self.name, found.density)


@dataclass
class Prompt:
    set: str
    ids: Sequence[int]
    targets: int = 0  # of a window
    answer: Sequence[int] = ()


def gather(args: argparse.Namespace, tokenizer) -> List[Prompt]:
    """Windows of texts and retrieval questions, each of args.tokens."""
    prefix = tokenizer.encode("").ids
    found, hay = [], []
    for name in args.texts:
        title, text = texts.read_text(name)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        hay = hay or ids
        room = args.tokens - len(prefix)
        if len(ids) < room:
            raise ValueError(f"text {name} has {len(ids)} tokens; {room} are wanted for --tokens={args.tokens}")
        targets = min(args.targets, room - 1)
        for end in texts.window_ends(len(ids), room, targets, args.windows) if args.windows else []:
            window = Window(f"ppl:{title}", title, texts.window(ids, end, args.tokens, prefix), targets)
            found.append(Prompt(window.set, window.ids, targets))
    items: List[Item] = []
    for task in args.own:
        items += prompts.make_items(task, tokenizer, length=args.tokens, count=args.own_prompts, seed=args.seed,
                                    questions=args.questions, text_ids=hay)
    for path in args.prompts:
        items += by_length(list(read_items(path, tokenizer)), [args.tokens]).get(args.tokens, [])
    for item in items:
        for question in item.questions:
            found.append(Prompt(item.task, [*item.context_ids, *question.prompt_ids], answer=question.answer_ids))
    if not found:
        raise ValueError("nothing to calibrate on: give --windows, --own or --prompts")
    return found


class Meter:
    """The model's loss on all prompts under a choice of rungs."""

    def __init__(self, model: EvalModel, found: Sequence[Prompt], per_unit: int):
        config = model.model.config
        self.kv_heads, self.layers = config.num_key_value_heads, config.num_hidden_layers
        self._shape = {"layers": self.layers, "q_heads": config.num_attention_heads, "kv_heads": self.kv_heads,
                       "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
        self._model, self._prompts, self._per_unit = model, found, per_unit
        self.units, self.ladder, self.passes = self.layers * self.kv_heads // per_unit, [*CANDIDATES, DENSE], 0
        self.dense = self._losses(policies.make("dense"))[0]
        for name, loss in self.dense.items():
            if not math.isfinite(loss):
                raise ValueError(f"dense attention's loss on {name} is {loss}")

    def tables(self, rungs: Sequence[int]) -> tuple:
        """(thresholds, windows), [layers * kv_heads] each."""
        steps = [self.ladder[rung] for rung in rungs for _ in range(self._per_unit)]
        return [step[0] for step in steps], [step[1] for step in steps]

    def __call__(self, rungs: Sequence[int]) -> Measured:
        losses, density = self._losses(Trial(*self.tables(rungs), self._shape))
        return Measured({name: loss - self.dense[name] for name, loss in losses.items()}, density)

    def keep_front(self, budgets: Dict[str, float], say: Callable[[str], None]) -> List[Measured]:
        """Leaves on the ladder what is worth a rung, and says what all units together measure there."""
        measured = [self([rung] * self.units) for rung in range(len(self.ladder) - 1)]
        kept = front(measured, budgets)
        for rung, (step, found) in enumerate(zip(self.ladder, measured)):
            say(f"threshold {step[0]:g}, window {step[1]}: {text_of(found)}{'' if rung in kept else ' (no rung)'}")
        self.ladder = [*(self.ladder[rung] for rung in kept), DENSE]
        return [measured[rung] for rung in kept]

    def _losses(self, policy) -> tuple:
        """(mean nats a token by set, mean density)."""
        self.passes += 1
        sums: Dict[str, List[float]] = {}
        densities = []
        for prompt in self._prompts:
            one = self._model.prefill(prompt.ids, policy, keep_cache=bool(prompt.answer))
            if prompt.answer:
                loss = self._model.score_answer(one, [], prompt.answer)[0]
            else:
                loss = float(self._model.score_last(one, prompt.ids, prompt.targets).double().mean())
            sums.setdefault(prompt.set, []).append(loss)
            densities.append(one.density())
        return {name: sum(each) / len(each) for name, each in sums.items()}, sum(densities) / len(densities)


def result(args: argparse.Namespace, path: Path, meter: Meter, out: Outcome) -> Calibration:
    def rows(values: list) -> list:
        return [values[at:at + meter.kv_heads] for at in range(0, len(values), meter.kv_heads)]

    thresholds, windows = meter.tables(out.rungs)
    sets = {name: {"dense": round(meter.dense[name], 6), "loss": round(loss, 6)} for name, loss in out.measured.loss.items()}
    return Calibration(digest(path), meter.layers, meter.kv_heads, rows(thresholds), rows(windows),
                       {"tokens": args.tokens, "budget": args.budget, "sets": sets, "density": round(out.measured.density, 6),
                        "passes": meter.passes, "whole": out.whole, "texts": [str(name) for name in args.texts]})


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        check(args)
        path = find_model(args.model)
        found = gather(args, load_tokenizer(path))
        model = EvalModel.load(path, args.device, torch.bfloat16)
        if args.tokens > model.max_tokens:
            raise ModelError(f"--tokens={args.tokens}; {path} is for {model.max_tokens} at most")
        config = model.model.config
        per_unit = config.num_key_value_heads if args.unit == "layer" else 1
        meter = Meter(model, found, per_unit)
        budgets = {name: args.budget for name in meter.dense}
        rungs = meter.keep_front(budgets, say)
        out = descend(meter.units, meter, budgets, rungs=rungs, share=args.share, most_passes=args.max_passes - meter.passes,
                      say=say)
        save(args.output, result(args, path, meter, out))
        print(f"density {out.measured.density:.4f} at {args.tokens} tokens, {meter.passes} passes; "
              + ", ".join(f"{name} {loss:+.5f} nats" for name, loss in out.measured.loss.items()))
        if not out.whole:
            say(f"headwater.calibrate: ended by --max_passes={args.max_passes}; sparser choices may hold too")
        say(f"written: {args.output}")
        return 0
    except (ValueError, OSError) as error:
        say(f"headwater.calibrate: {error}")
        return 2
