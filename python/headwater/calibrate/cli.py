"""Flags of python -m headwater.calibrate, and what they ask for."""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Union

import torch

from headwater.calibrate.file import Calibration, save
from headwater.calibrate.meter import Meter, Prompt, is_text
from headwater.calibrate.search import Measured, Outcome, OutOfTime, Setting, most_of_first_round, search, text_of
from headwater.cluster.cli import digest
from headwater.eval import prompts, texts
from headwater.eval.cli import load_tokenizer
from headwater.eval.items import Item, by_length, read_items
from headwater.eval.model import EvalModel, ModelError, find_model
from headwater.eval.policies.headwater import Headwater
from headwater.eval.runner import Window

QUESTION_ROOM = 128  # tokens of a prompt made here that a question may take


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m headwater.calibrate", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Thresholds and windows of policy headwater for a model, within an error budget, on a GPU.")
    add = flags.add_argument
    add("model", help="model directory, or a name under HW_MODELS")
    add("--texts", nargs="+", required=True, metavar="FILE",
        help="calibration texts, of what will be served and not of what the model was trained on; names as in headwater.eval")
    add("--output", type=Path, required=True, metavar="FILE.json")
    add("--tokens", type=int, nargs="+", default=[32768],
        help="of the prompts: lengths that are to be served, the longest among them")
    add("--windows", type=int, default=4, help="of each text that judge; one of each text ranks")
    add("--targets", type=int, default=32768, help="last tokens of a window, whose loss counts: at most half of it")
    add("--own", nargs="*", choices=prompts.TASKS, default=["words", "uuids"],
        help="retrieval prompts made from the seed; what they lose counts, not how dense they are")
    add("--own_prompts", type=int, default=1, help="of a task")
    add("--questions", type=int, default=32, help="of such a prompt; more cost little and measure answers with less noise")
    add("--prompts", nargs="+", type=Path, default=[], metavar="FILE.jsonl", help="retrieval prompts, as in headwater.eval")
    add("--start", type=Path, metavar="FILE.json", help="goes on from this calibration, as of shorter prompts; saves most passes")
    add("--budget", type=float, default=0.003, help="nats a token that a text may lose: 0.003 is 0.3 %% of perplexity")
    add("--answer_budget", type=float, default=0.003,
        help="nats a token: KL divergence of answers from dense attention's, beyond what roundings alone make of it")
    add("--unit", choices=("head", "layer"), default="head", help="what has a setting of its own: a KV head, or a layer")
    add("--max_passes", type=int, default=50000, help="of the model over all prompts")
    add("--limit_s", type=float, default=math.inf, help="time of ranking; what was ranked until then is chosen from")
    add("--seed", type=int, default=1)
    add("--device", default="cuda")
    return flags


def check(args: argparse.Namespace) -> None:
    """ValueError where a flag is out of range."""
    for name, least in (("windows", 0), ("targets", 1), ("own_prompts", 0), ("questions", 1), ("max_passes", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)}; at least {least} is wanted")
    if min(args.tokens) < 1024 or len(set(args.tokens)) < len(args.tokens):
        raise ValueError(f"--tokens={' '.join(map(str, args.tokens))}; different lengths of at least 1024 are wanted")
    for name in ("budget", "answer_budget"):
        if not 0 < getattr(args, name) <= 10:
            raise ValueError(f"--{name}={getattr(args, name)}; over 0 and at most 10 is wanted")
    if not args.limit_s > 0:
        raise ValueError(f"--limit_s={args.limit_s:g}; over 0 is wanted")
    if not torch.cuda.is_available():
        raise ValueError("no GPU: calibration runs the kernels that will serve")


def gather(args: argparse.Namespace, tokenizer) -> List[Union[Window, Item]]:
    """Windows of texts and retrieval questions. A set is a text or a task at one length."""
    prefix = tokenizer.encode("").ids
    found: List[Union[Window, Item]] = []
    read = []
    for name in args.texts:
        title, text = texts.read_text(name)
        if title in [other for _, other, _ in read]:
            raise ValueError(f"--texts: {name} is called {title} as another is; different names are wanted")
        read.append((name, title, tokenizer.encode(text, add_special_tokens=False).ids))
    given = by_length([item for path in args.prompts for item in read_items(path, tokenizer)], args.tokens)
    if None in given:
        long = given[None][0]
        raise ValueError(f"--prompts: {long.name} has {long.tokens()} tokens; --tokens has {max(args.tokens)} at most")
    asked = QUESTION_ROOM * args.questions
    if args.own and 2 * asked > min(args.tokens):
        raise ValueError(f"--questions={args.questions} take up to {asked} tokens; at most half of --tokens={min(args.tokens)} is "
                         "wanted")
    for tokens in args.tokens:
        room = tokens - len(prefix)
        targets = min(args.targets, room // 2)
        for name, title, ids in read:
            if len(ids) < room:
                raise ValueError(f"text {name} has {len(ids)} tokens; {room} are wanted")
            for end in texts.window_ends(len(ids), room, targets, args.windows) if args.windows else []:
                found.append(Window(f"ppl:{title}:{tokens}", title, texts.window(ids, end, tokens, prefix), targets))
        items = given.get(tokens, [])
        for task in args.own:
            items = [*items, *prompts.make_items(task, tokenizer, length=tokens - asked, count=args.own_prompts, seed=args.seed,
                                                 questions=args.questions, text_ids=read[0][2])]
        found += [replace(item, task=f"{item.task}:{tokens}") for item in items]
    if not found:
        raise ValueError("nothing to calibrate on: give --windows, --own or --prompts")
    return found


def watched(rank: Callable[..., Measured], limit_s: float, say: Callable[[str], None]) -> Callable[..., Measured]:
    """Stops ranking when its time is over, and tells what it takes."""
    start, calls = time.monotonic(), 0

    def ranked(*settings: Sequence[Setting]) -> Measured:
        nonlocal calls
        begin = time.monotonic()
        if begin - start > limit_s:
            raise OutOfTime
        found = rank(*settings)
        calls += 1
        if calls == 10:  # the first layers'
            say(f"{time.monotonic() - begin:.2f} s a change at most, half of that on average")
        if calls % 500 == 0:
            say(f"{calls} changes in {time.monotonic() - start:.0f} s")
        return found
    return ranked


def result(args: argparse.Namespace, name: str, meter: Meter, out: Outcome) -> Calibration:
    def rows(values: list) -> list:
        return [values[at:at + meter.kv_heads] for at in range(0, len(values), meter.kv_heads)]

    thresholds, windows = meter.tables(out.settings)
    sets = {name: {"dense": round(meter.dense[name], 6), "loss": round(loss, 6)} for name, loss in out.measured.loss.items()}
    return Calibration(name, meter.layers, meter.kv_heads, rows(thresholds), rows(windows),
                       {"tokens": args.tokens, "budget": args.budget, "answer_budget": args.answer_budget, "sets": sets,
                        "density": round(out.measured.density, 6), "passes": out.passes, "whole": out.whole,
                        "texts": [Path(name).name for name in args.texts]})


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        check(args)
        path = find_model(args.model)
        tokenizer = load_tokenizer(path)
        found = gather(args, tokenizer)
        model = EvalModel.load(path, args.device, torch.bfloat16)
        if short := [tokens for tokens in args.tokens if tokens < Headwater.dense_below_tokens]:
            say(f"headwater.calibrate: prompts shorter than {Headwater.dense_below_tokens} tokens, as those of {short[0]}, are "
                "served dense unless dense_below_tokens says otherwise")
        longest = max(len(Prompt.of(one).ids) for one in found)
        if longest > model.max_tokens:
            raise ModelError(f"a prompt of {longest} tokens; {path} is for {model.max_tokens} at most")
        config = model.model.config
        units = config.num_hidden_layers * (1 if args.unit == "layer" else config.num_key_value_heads)
        least = most_of_first_round(units, args.start is not None)
        if args.max_passes < least:
            raise ValueError(f"--max_passes={args.max_passes}; a first round of {units} units takes up to {least}")
        meter = Meter(model, found, config.num_key_value_heads if args.unit == "layer" else 1, args.start)
        budgets = {name: args.budget if is_text(name) else args.answer_budget for name in meter.dense}
        made_for = digest(path)

        def keep(found: Outcome) -> None:
            save(args.output, result(args, made_for, meter, found))

        out = search(meter.units, watched(meter.rank, args.limit_s, say), meter, budgets, start=meter.start,
                     most_passes=args.max_passes, say=say, keep=keep)
        keep(out)
        print(f"{out.passes} passes; {text_of(out.measured)}")
        if out.measured.density == 1:
            say(f"headwater.calibrate: nothing sparser than dense attention was found within --budget={args.budget:g} and "
                f"--answer_budget={args.answer_budget:g}: every head is dense")
        if not out.whole:
            say(f"headwater.calibrate: ended by --max_passes={args.max_passes} or --limit_s={args.limit_s:g}; sparser choices "
                "may hold too")
        say(f"written: {args.output}")
        return 0
    except (ValueError, OSError, RuntimeError) as error:  # the GPU's memory among them
        say(f"headwater.calibrate: {type(error).__name__ + ': ' if isinstance(error, RuntimeError) else ''}{error}")
        return 2
    except KeyboardInterrupt:
        say(f"headwater.calibrate: broken off; {args.output} has the best choice until then, if one was found")
        return 130
