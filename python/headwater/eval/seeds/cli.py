"""Flags of python -m headwater.eval --report seeds."""

import argparse
import sys
from pathlib import Path
from typing import Callable, List, Optional

import torch

from headwater.eval import cli, prompts, texts
from headwater.eval.model import EvalModel, find_model
from headwater.eval.seeds import audit, dense_heads, flash, flex_sweep, latency, skeleton
from headwater.eval.seeds.bench import Bench, Setting
from headwater.eval.seeds.report import Folder, run

EXPERIMENTS = {one.number: one for one in (latency.EXPERIMENT, dense_heads.EXPERIMENT, audit.EXPERIMENT,
                                           skeleton.EXPERIMENT, flex_sweep.EXPERIMENT, flash.EXPERIMENT)}
LENGTHS = ("tokens", "audit_tokens", "skeleton_tokens", "criteria_tokens", "structured_tokens", "flash_tokens")
COUNTS = ("timed_prompts", "windows", "targets", "own_prompts", "questions", "recall_rows", "audit_prompts",
          "criteria_groups", "repeats")
NOT_OF_FIGURES = ("model", "output", "experiments", "limit_s", "draw", "commit")  # flags that change no figure


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m headwater.eval --report seeds", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="The experiments of the papers that the policies come from: " +
        "; ".join(f"{one.number} {one.title}" for one in EXPERIMENTS.values()) + ".")
    add = flags.add_argument
    add("model", nargs="?", default="", help="model directory, or a name under HW_MODELS")
    add("--output", type=Path, required=True, metavar="DIR",
        help="seeds_N.json and seeds_N.png; report.md and rows.jsonl of all that are there. What DIR has is not run again")
    add("--experiments", default=",".join(map(str, EXPERIMENTS)), metavar="1,3,5")
    add("--limit_s", type=float, default=float("inf"), help="time of one experiment; what is left out is named")
    add("--draw", action="store_true", help="measure nothing: tables and pictures of what stands in DIR, which needs no model")
    add("--text", nargs="+", default=["emma", "persuasion"], metavar="FILE", help="texts; names as in headwater.eval")
    add("--clusters", default="", metavar="FILE", help="of python -m headwater.cluster, for share (1, 2)")
    add("--tokens", nargs="+", type=int, default=[32768, 131072], help="lengths of 1, 2 and 5")
    add("--timed_prompts", type=int, default=8, help="of a length (1)")
    add("--windows", type=int, default=4, help="of a text and length that perplexity is taken on (2, 4, 5)")
    add("--targets", type=int, default=2048, help="last tokens of a window, which are scored; half of the shortest at most")
    add("--own", nargs="*", choices=prompts.TASKS, default=list(prompts.TASKS), help="retrieval prompts (2, 3)")
    add("--own_prompts", type=int, default=4, help="of a task and length (2)")
    add("--questions", type=int, default=4, help="of a prompt with many answers (2)")
    add("--recall_rows", type=int, default=64, help="sampled rows of a prompt (2, 4, 5)")
    add("--audit_tokens", type=int, default=32768, help="length of 3")
    add("--audit_prompts", type=int, default=6, help="texts, and as far as half of them retrieval prompts (3)")
    add("--audit_policy", default="flex", metavar="NAME[:PARAMETER=VALUE,...]", help="whose lists are compared (3)")
    add("--skeleton_tokens", nargs="+", type=int, default=[1024, 4096, 10240, 32768, 65536, 102400, 131072],
        help="lengths of 4")
    add("--structured_tokens", nargs="*", type=int, default=[131072, 262144, 524288, 1048576],
        help="lengths whose density is taken on structured inputs (4)")
    add("--criteria_tokens", nargs="*", type=int, default=[10240, 131072], help="lengths of the criteria of sparsity (4)")
    add("--criteria_groups", type=int, default=16, help="groups of 64 rows that they are taken on (4)")
    add("--budget_blocks", nargs="*", type=float, default=[16, 64], help="skeleton's blocks of 64 a row, beside epsilon (4)")
    add("--flash_tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 65536, 131072, 262144],
        help="lengths of 6")
    add("--repeats", type=int, default=7, help="timed calls of 6, half of them above 65536 tokens")
    add("--seed", type=int, default=1)
    add("--commit", default="", help="that rows name, where the checkout has no git history of its own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=cli.DTYPES, help="default: bf16 on a GPU, f32 else")
    return flags


def check(args: argparse.Namespace) -> List[int]:
    """The experiments' numbers. ValueError where a flag is out of range."""
    for name in COUNTS:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)}; at least 1 is wanted")
    for name in LENGTHS:
        value = getattr(args, name)
        for length in value if isinstance(value, list) else [value]:
            if length < 256 or length > 1 << 22:
                raise ValueError(f"--{name}={length}; 256 to {1 << 22} is wanted")
    if args.audit_prompts < 2:
        raise ValueError(f"--audit_prompts={args.audit_prompts}; at least 2 are wanted")
    numbers = []
    for part in args.experiments.split(","):
        if not part.strip().isdecimal() or int(part) not in EXPERIMENTS:
            raise ValueError(f"--experiments={args.experiments}: '{part}' is not one of {', '.join(map(str, EXPERIMENTS))}")
        numbers.append(int(part))
    if args.clusters:
        from headwater import cluster

        cluster.load(args.clusters)
    return sorted(set(numbers))


def setting_of(args: argparse.Namespace, name: str, device: str, dtype: str, config) -> Setting:
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_OF_FIGURES}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Setting(name, device, dtype, args.commit or cli.commit_of_tree(), args.seed, config.num_hidden_layers,
                   config.num_attention_heads, config.num_key_value_heads, head_dim, flags)


def summarise(folder: Folder, output: Path, say: Callable[[str], None]) -> None:
    written = folder.summarise(list(EXPERIMENTS.values()))
    print((output / "report.md").read_text(encoding="utf-8"), end="")
    if not any(path.suffix == ".png" for path in written):
        say("no plots: matplotlib is not installed (pip install matplotlib); with it, --draw makes them of DIR")
    say(f"written: {', '.join(map(str, written))}")


def load(args: argparse.Namespace, say: Callable[[str], None]) -> Bench:
    path = find_model(args.model)
    tokenizer = cli.load_tokenizer(path)
    for name in args.text:  # before the model is loaded, which takes longer
        texts.read_text(name)
    dtype = cli.dtype_name(args)
    model = EvalModel.load(path, args.device, cli.DTYPES[dtype])
    setting = setting_of(args, path.resolve().name, cli.device_name(args.device), dtype, model.model.config)
    return Bench(model, tokenizer, args, setting, say)


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    folder = Folder(args.output)
    try:
        numbers = check(args)
        args.output.mkdir(parents=True, exist_ok=True)
        for number in EXPERIMENTS:
            folder.read(number)
        if args.draw:
            summarise(folder, args.output, say)
            return 0
        bench = load(args, say)
    except (ValueError, OSError) as error:
        say(f"headwater.eval: {error}")
        return 2
    status = 0
    try:
        for number in numbers:
            if not run(EXPERIMENTS[number], bench, folder, args.limit_s):
                status = 1
    except KeyboardInterrupt:
        status = 130
    summarise(folder, args.output, say)
    return status
