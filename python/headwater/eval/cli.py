"""Flags of python -m headwater.eval, and what they ask for."""

import argparse
import datetime
import platform
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

import tokenizers
import torch

from headwater.eval import policies, prompts, report, texts
from headwater.eval.items import by_length, read_items
from headwater.eval.model import EvalModel, ModelError, find_model
from headwater.eval.runner import Runner, Settings, Window

REPORTS = ("policies", "seeds")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m headwater.eval", description="Quality and cost of attention policies.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = flags.add_argument
    add("model", help="model directory, or a name under HW_MODELS")
    add("--report", choices=REPORTS, default=REPORTS[0],
        help="seeds: the experiments of the papers that the policies come from; flags of its own (--report seeds --help)")
    add("--output", type=Path, required=True, metavar="DIR", help="results.json, report.md, rows.jsonl, plots.png")
    add("--policy", nargs="+", default=["a_shape", "probe"], metavar="NAME[:PARAMETER=VALUE,...]",
        help=f"of {', '.join(policies.names())}; dense always runs, first")
    add("--tokens", nargs="+", type=int, default=[4096, 8192], help="prompt lengths")
    add("--text", nargs="+", default=[], metavar="FILE",
        help="texts for perplexity and to hide things in; a name as emma, persuasion or kjv finds Debian's packages")
    add("--windows", type=int, default=8, help="of a text and length; 0: texts are only what things are hidden in")
    add("--targets", type=int, default=2048, help="last tokens of a window, which are scored")
    add("--prompts", nargs="+", type=Path, default=[], metavar="FILE.jsonl",
        help="retrieval prompts: token ids, RULER's or InfiniteBench's form")
    add("--prompts_at_most", type=int, default=0, help="of a file's task and length; 0: all")
    add("--own", nargs="*", choices=prompts.TASKS, default=list(prompts.TASKS), help="retrieval prompts made from the seed")
    add("--own_prompts", type=int, default=4, help="of a task and length")
    add("--questions", type=int, default=8, help="of a prompt with many answers")
    add("--share_context", action="store_true",
        help="several questions of a context share its cache and attend exactly: quick, and flatters sparse policies")
    add("--recall_prompts", type=int, default=1, help="of a set and length that recall is sampled on; also warms up")
    add("--recall_rows", type=int, default=64, help="sampled rows of such a prompt")
    add("--limit_s", type=float, default=float("inf"), help="time of one policy")
    add("--commit", default="", help="that rows name, where the checkout has no git history of its own")
    add("--seed", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, f32 else")
    return flags


def dtype_name(args: argparse.Namespace) -> str:
    """Of --dtype, or what it stands for by default."""
    return args.dtype or ("bf16" if args.device.startswith("cuda") else "f32")


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path} has no tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def gather(args: argparse.Namespace, tokenizer, notes: List[str]) -> dict:
    """Windows and items by length. What cannot be had is named in `notes`, unless a flag named a file that is not there."""
    lengths = sorted(set(args.tokens))
    found = {length: [] for length in lengths}
    prefix = tokenizer.encode("").ids
    hay = []
    for name in args.text:
        title, text = texts.read_text(name)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        hay = hay or ids
        for length, windows in make_windows(title, ids, prefix, lengths, args, notes).items():
            found[length] += windows
    for path in args.prompts:
        for length, items in by_length(list(read_items(path, tokenizer)), lengths).items():
            if length is None:
                notes.append(f"{path}: {len(items)} prompts over {lengths[-1]} tokens left out")
                continue
            kept = {}
            for item in items:
                kept.setdefault(item.task, []).append(item)
            found[length] += [item for some in kept.values() for item in some[:args.prompts_at_most or None]]
    for length in lengths:
        for task in args.own:
            try:
                found[length] += prompts.make_items(task, tokenizer, length=length, count=args.own_prompts, seed=args.seed,
                                                    questions=args.questions, text_ids=hay)
            except ValueError as error:
                notes.append(f"own prompts {task}: {error}")
    return {length: some for length, some in found.items() if some}


def make_windows(title: str, ids: list, prefix: list, lengths: list, args: argparse.Namespace, notes: List[str]) -> dict:
    """Windows of a text by length; the longest length that fits says where they end."""
    if args.windows == 0:
        return {}
    targets = min(args.targets, lengths[0] - len(prefix) - 1)
    fitting = [length for length in lengths if length - len(prefix) <= len(ids)]
    if len(fitting) < len(lengths):
        longer = ", ".join(map(str, lengths[len(fitting):]))
        notes.append(f"text {title} has {len(ids)} tokens: none of its windows at {longer}")
    if not fitting:
        return {}
    ends = texts.window_ends(len(ids), fitting[-1] - len(prefix), targets, args.windows)
    return {length: [Window(f"ppl:{title}", f"{title}@{end}", texts.window(ids, end, length, prefix), targets) for end in ends]
            for length in fitting}


def commit_of_tree() -> str:
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True,
                          text=True, check=False)
    return done.stdout.strip()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU ({platform.machine()})"


def describe(args: argparse.Namespace, path: Path, dtype: str) -> dict:
    """What results.json and the report say of the run."""
    import transformers

    device = device_name(args.device)
    flags = {name: [str(one) for one in value] if isinstance(value, list) else str(value)
             for name, value in vars(args).items()}
    questions = ("Several questions of a context share its cache and attend exactly." if args.share_context else
                 "Every question was prefilled with its context (dense: after it, which is the same).")
    return {"model": path.resolve().name, "device": device, "dtype": dtype, "seed": args.seed, "questions": questions,
            "commit": args.commit or commit_of_tree(), "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
            "flags": flags, "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def check(args: argparse.Namespace) -> None:
    """ValueError where a flag's number is out of range."""
    for name, least in (("windows", 0), ("targets", 1), ("own_prompts", 0), ("questions", 1), ("recall_prompts", 0),
                        ("recall_rows", 1), ("prompts_at_most", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)}; at least {least} is wanted")
    if min(args.tokens) < 16:
        raise ValueError(f"--tokens={min(args.tokens)}; at least 16 is wanted")


def main(arguments: Optional[List[str]] = None) -> int:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--report", choices=REPORTS, default=REPORTS[0])
    chosen_report, rest = first.parse_known_args(arguments)
    if chosen_report.report == "seeds":
        from headwater.eval.seeds import cli

        return cli.main(rest)
    args = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        check(args)
        for spec in args.policy:  # before the model is loaded, which takes longer
            policies.make(spec)
        path = find_model(args.model)
        tokenizer = load_tokenizer(path)
        notes = []
        gathered = gather(args, tokenizer, notes)
        dtype = dtype_name(args)
        model = EvalModel.load(path, args.device, DTYPES[dtype])
        chosen = {spec: policies.make(spec, model.policy_values()) for spec in ["dense", *args.policy]}
        if max(args.tokens) > model.max_tokens:
            raise ModelError(f"--tokens={max(args.tokens)}; {path} is for {model.max_tokens} at most")
    except (ValueError, OSError) as error:
        say(f"headwater.eval: {error}")
        return 2
    for note in notes:
        say(note)
    if not gathered:
        say("headwater.eval: nothing to measure; give --text, --prompts or --own")
        return 2
    meta = describe(args, path, dtype)
    runner = Runner(model, Settings(args.seed, args.recall_prompts, args.recall_rows, args.share_context, args.limit_s), say,
                    lambda records: report.write(args.output, records, meta, final=False))
    runner.records.notes += notes
    status = 0
    try:
        runner.run(chosen, gathered)
        status = int(runner.failed)
    except KeyboardInterrupt:
        status = 130
    written = report.write(args.output, runner.records, meta, final=True)
    print((args.output / "report.md").read_text(encoding="utf-8"), end="")
    if not any(path.suffix == ".png" for path in written):
        say("no plots: matplotlib is not installed")
    say(f"written: {', '.join(map(str, written))}")
    return status
