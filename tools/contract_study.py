#!/usr/bin/env python3
"""What the quality contract min_recall is worth: prompts of mixed kind, and the recall of their attention over all rows.

    contract_study.py make MODEL_DIR --tokens 32768 131072 --count 200 --text FILE... --output prompts.jsonl
    headwater bench prefill --model=MODEL_DIR --prompts=prompts.jsonl --policy=headwater --min_recall=0.95
        --warm_up=0 --repeat=1 --json --output=bench.jsonl
    contract_study.py check MODEL_DIR --prompts prompts.jsonl --results bench.jsonl --details details.jsonl --output rows.jsonl
    headwater bench prefill ... --output=free.jsonl, and with --measure_recall --output=measured.jsonl, in turn
    contract_study.py overhead --free free.jsonl --measured measured.jsonl --output rows.jsonl

`make` deals kinds and lengths out in turn; names are KIND:LENGTH:NUMBER. `check` makes the lists of every prompt again from
the bench's report (tools/contract_recall.py) and holds the exact recall of each layer and KV head (a group) against
min_recall and against the sampled estimate. It needs a GPU, torch, transformers and headwater_kernels (HEADWATER_KERNELS).
Prompts that --details already has are not measured again, so it may be run in parts (--limit_s).

A group is dense by its calibration, or falls back to dense where the contract ends so. Shares of groups:

- kept: recall holds and the group did not fall back (dense by calibration holds), of all groups;
- kept_sparse: not dense and recall holds, of all groups;
- kept_of_sparse: the same, of groups that are not dense.

`overhead` holds what measuring adds to the time to the first token, the medians of a prompt beside each other, against 2 %.

Exit status 0 of check: `kept` is at least 99 %, at most 10 % of the groups are dense, the mean density is at most 0.25 at 32768
tokens and 0.10 at 131072, and no group's lists as made again are more than 0.01 off the reported density; of overhead: it holds.
1: one of these fails, or prompts have not been measured; 2: input that cannot be used. Lengths count for the next power of two.
"""

import argparse
import base64
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from contract_recall import Kernels, Report, measure  # noqa: E402
from headwater.eval import prompts as own  # noqa: E402
from headwater.eval import texts  # noqa: E402
from headwater.eval.cli import load_tokenizer  # noqa: E402
from headwater.eval.metrics import percentile  # noqa: E402
from headwater.eval.model import EvalModel, find_model  # noqa: E402
from policy_masks import Rows, device_name  # noqa: E402

KINDS = ("text", *own.TASKS)
MOST_PROMPTS = 100000
KEPT, MOST_DENSE = 0.99, 0.10
MOST_DENSITY = {32768: 0.25, 131072: 0.10}
MOST_ADDED = 0.02  # to the time to the first token, by measuring
REBUILT = 0.01  # density of a group's lists as they were made again, off what was reported


def make_prompts(tokenizer, texts_ids: Sequence[Sequence[int]], lengths: Sequence[int], count: int, seed: int,
                 mixed: bool) -> Iterator[tuple]:
    """(name, token ids). mixed: lengths from the least to the largest of `lengths`, evenly on a log scale."""
    prefix = tokenizer.encode("").ids
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        draw = random.Random(f"{seed} contract {number}")
        length = lengths[number // len(KINDS) % len(lengths)]
        if mixed:
            length = round(math.exp(draw.uniform(math.log(min(lengths)), math.log(max(lengths)))))
        if kind == "text":
            long_ones = [ids for ids in texts_ids if len(ids) >= length]
            if not long_ones:
                raise ValueError(f"the longest text has {max(map(len, texts_ids))} tokens; {length} are wanted")
            ids = draw.choice(long_ones)
            found = texts.window(ids, draw.randint(length, len(ids)), length, prefix)
        else:
            item = own.make_items(kind, tokenizer, length=length, count=1, seed=f"{seed}:{number}", questions=1,
                                  text_ids=draw.choice(texts_ids))[0]
            found = [*item.context_ids, *item.questions[0].prompt_ids]
        name = f"{kind}:{length}:{number}"
        if len(found) > length:
            raise ValueError(f"{name}: the {len(found)} tokens of such a prompt do not fit")
        yield name, found


def prompt_line(name: str, ids: Sequence[int], vocab: int) -> str:
    if vocab > 1 << 16:
        return json.dumps({"name": name, "tokens": list(ids)})
    return json.dumps({"name": name, "tokens_u16_b64": base64.b64encode(np.array(ids, "<u2").tobytes()).decode()})


def make(args: argparse.Namespace) -> int:
    for name, value, most in (("count", args.count, MOST_PROMPTS), ("tokens", min(args.tokens), 1 << 24)):
        if not 1 <= value <= most:
            raise ValueError(f"--{name}: {value} is not from 1 to {most}")
    tokenizer = load_tokenizer(find_model(args.model))
    texts_ids = [tokenizer.encode(texts.read_text(name)[1], add_special_tokens=False).ids for name in args.text]
    vocab = tokenizer.get_vocab_size()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", encoding="utf-8") as output:
        for name, ids in make_prompts(tokenizer, texts_ids, args.tokens, args.count, args.seed, args.mixed_lengths):
            output.write(prompt_line(name, ids, vocab) + "\n")
    return 0


def read_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error


def by_name(path: Path, rows: Iterator[tuple]) -> dict:
    """ValueError where a name is there twice."""
    found = {}
    for name, row in rows:
        if name in found:
            raise ValueError(f"{path}: {name} is there twice")
        found[name] = row
    return found


def ids_of(line: dict) -> List[int]:
    if "tokens" in line:
        return line["tokens"]
    return np.frombuffer(base64.b64decode(line["tokens_u16_b64"], validate=True), "<u2").tolist()


def bucket_of(name: str) -> int:
    """The next power of two of LENGTH in KIND:LENGTH:NUMBER."""
    parts = name.split(":")
    if len(parts) != 3 or not parts[1].isdigit() or int(parts[1]) < 1:
        raise ValueError(f"prompt {name}: not KIND:LENGTH:NUMBER")
    return 1 << (int(parts[1]) - 1).bit_length()


def summary(details: Sequence[dict]) -> Dict[str, float]:
    """Shares of groups, densities and how far estimates are off; what there is none of is absent."""
    groups = [group for one in details for group in one["groups"]]
    least = details[0]["min_recall"]
    sparse = [group for group in groups if not group["dense"]]
    held = [group for group in sparse if group["recall"] >= least]
    fell_back = sum(group["fell_back"] for group in groups)
    dense = len(groups) - len(sparse)
    found = {"prompts": len(details), "groups": len(groups), "kept": (len(held) + dense - fell_back) / len(groups),
             "kept_sparse": len(held) / len(groups), "below": (len(sparse) - len(held)) / len(groups),
             "dense": dense / len(groups), "fell_back": fell_back / len(groups),
             "density": statistics.fmean(one["density"] for one in details),
             "density_rebuilt_error": max(abs(group["density"] - group["reported_density"]) for group in groups)}
    if sparse:
        found.update(kept_of_sparse=len(held) / len(sparse), recall_mean=statistics.fmean(g["recall"] for g in sparse),
                     recall_least=min(group["recall"] for group in sparse))
    errors = [group["estimate"] - group["recall"] for group in sparse if group["estimate"] is not None]
    if errors:
        found.update(estimate_bias=statistics.fmean(errors), estimate_error=statistics.fmean(map(abs, errors)),
                     estimate_error_p99=percentile(list(map(abs, errors)), 99))
    for name in ("floor_per_tile", "floor_mean"):
        floors = [group[name] for group in groups if name in group]
        if floors:
            found[name] = statistics.fmean(floors)
    return found


def verdicts(whole: Dict[str, float], lengths: Dict[int, Dict[str, float]]) -> List[tuple]:
    """(what, value, limit, whether it holds)."""
    found = [("kept", whole["kept"], f">= {KEPT}", whole["kept"] >= KEPT),
             ("dense", whole["dense"], f"<= {MOST_DENSE}", whole["dense"] <= MOST_DENSE)]
    for tokens, most in MOST_DENSITY.items():
        value = lengths[tokens]["density"] if tokens in lengths else math.nan  # no such prompt: does not hold
        found.append((f"density at {tokens}", value, f"<= {most}", value <= most))
    off = whole["density_rebuilt_error"]
    found.append(("density_rebuilt_error", off, f"<= {REBUILT}", off <= REBUILT))
    return found


def table(details: Sequence[dict]) -> str:
    """A line for each layer and KV head over all prompts."""
    keys = sorted({(group["layer"], group["kv_head"]) for one in details for group in one["groups"]})
    columns = ("kept_sparse", "below", "dense", "fell_back", "recall_mean", "recall_least", "density", "estimate_error")
    lines = ["| layer | KV head | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for layer, head in keys:
        some = []
        for one in details:
            groups = [group for group in one["groups"] if (group["layer"], group["kv_head"]) == (layer, head)]
            some.append({**one, "groups": groups, "density": statistics.fmean(group["density"] for group in groups)})
        found = summary(some)
        cells = (f"{found[name]:.4f}" if name in found else "" for name in columns)
        lines.append(f"| {layer} | {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(details: Sequence[dict], rows: Rows, model: str) -> bool:
    """Writes rows and prints tables. Whether every target holds."""
    base = {"model": model, "policy": "headwater", "set": "contract", "min_recall": details[0]["min_recall"]}
    lengths = {}
    for tokens in sorted({bucket_of(one["name"]) for one in details}):
        lengths[tokens] = summary([one for one in details if bucket_of(one["name"]) == tokens])
    whole = summary(details)
    print(table(details) + "\n")
    kinds = {kind: summary([one for one in details if one["name"].split(":")[0] == kind])
             for kind in sorted({one["name"].split(":")[0] for one in details})}
    for name, found in [*lengths.items(), *kinds.items(), ("all", whole)]:
        print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in found.items()))
    judged = verdicts(whole, lengths)
    for what, value, limit, holds in judged:
        print(f"{'holds' if holds else 'FAILS'}: {what} {value:.4f} ({limit})")
    for tokens, found in lengths.items():
        rows.write({**base, "tokens": tokens}, found)
    rows.write({**base, "lengths": "all"}, {**whole, "holds": all(holds for *_, holds in judged)})
    return all(holds for *_, holds in judged)


def read_details(path: Path, reports: Dict[str, Report]) -> dict:
    """What earlier parts of this run left. ValueError: it is of another run."""
    if not path.is_file():
        return {}
    have = by_name(path, ((one["name"], one) for one in read_lines(path)))
    for name, one in have.items():
        told = reports.get(name)
        if told is None or (one["density"], one["min_recall"]) != (told.density, told.min_recall):
            raise ValueError(f"{path}: {name} is of another run than --results")
    return have


def measure_all(args: argparse.Namespace, prompts: dict, reports: Dict[str, Report], load_model,
                kernels: Kernels) -> List[dict]:
    """Details of prompts in the order of their file, as far as the time goes."""
    start, have = time.monotonic(), read_details(args.details, reports)
    model = None
    with args.details.open("a", encoding="utf-8") as output:
        for name in prompts:
            if name in have or name not in reports:
                continue
            if time.monotonic() - start > args.limit_s:
                break
            model = model or load_model()
            have[name] = measure(model, ids_of(prompts[name]), reports[name], kernels, args.oracle)
            output.write(json.dumps(have[name]) + "\n")
            output.flush()
            recalls = [group["recall"] for group in have[name]["groups"]]
            print(f"{name}: density {have[name]['density']:.4f}, recall {statistics.fmean(recalls):.4f}, least "
                  f"{min(recalls):.4f}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return [have[name] for name in prompts if name in have]


def check(args: argparse.Namespace, kernels: Optional[Kernels] = None, dtype: torch.dtype = torch.bfloat16) -> int:
    path = find_model(args.model)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    prompts = by_name(args.prompts, ((line["name"], line) for line in read_lines(args.prompts)))
    rows = by_name(args.results, ((row["params"].get("prompt"), row) for row in read_lines(args.results)))
    if unknown := sorted(str(name) for name in rows if name not in prompts):
        raise ValueError(f"{args.results}: {unknown[0]} is not in {args.prompts}")
    for name in prompts:
        bucket_of(name)
    reports = {name: Report.of(row, config["num_hidden_layers"], kv_heads) for name, row in rows.items()}
    if len({one.min_recall for one in reports.values()}) > 1:
        raise ValueError(f"{args.results}: runs with different --min_recall")
    args.details.parent.mkdir(parents=True, exist_ok=True)
    details = measure_all(args, prompts, reports, lambda: EvalModel.load(path, args.device, dtype), kernels or Kernels())
    missing = len(prompts) - len(details)
    if missing:
        print(f"not measured: {missing} of {len(prompts)} prompts ({len(prompts) - len(reports)} without a result)",
              file=sys.stderr)
    if not details:
        return 1
    holds = report(details, Rows(args.output, device_name(args.device), args.commit), path.resolve().name)
    return 0 if holds and not missing else 1


def times(path: Path, measured: bool) -> dict:
    """Of the bench's rows by prompt and length: seconds to the first token, each run's. ValueError where one measured recall and
    should not, or the reverse."""
    found: Dict[object, list] = {}
    for row in read_lines(path):
        params = row["params"]
        if bool(params.get("measure_recall")) != measured:
            raise ValueError(f"{path}: a row {'without' if measured else 'with'} measure_recall")
        if params["policy"] != "headwater" or "min_recall" in params:
            bound = " and min_recall" if "min_recall" in params else ""
            raise ValueError(f"{path}: a row of policy {params['policy']}{bound}; headwater alone is wanted")
        found.setdefault((params["model"], params["tokens"], params.get("prompt", "")), []).append(row["metrics"]["ttft_s"])
        found.setdefault("run", []).append((row["device"], row["commit"]))
    return found


def overhead(args: argparse.Namespace) -> int:
    """Of each model and length (the next power of two). 0: measuring adds at most MOST_ADDED."""
    free, measured = times(args.free, False), times(args.measured, True)
    runs = {*free.pop("run", []), *measured.pop("run", [])}
    if len(runs) != 1 or free.keys() != measured.keys():
        raise ValueError(f"{args.free} and {args.measured}: the same prompts, device and commit are wanted in both")
    rows, ratios = Rows(args.output, *runs.pop()), {}
    for key in free:
        bucket = 1 << (key[1] - 1).bit_length()
        ratios.setdefault((key[0], bucket), []).append(
            [*(statistics.median(one[key]) for one in (free, measured)), len(free[key])])
    holds = True
    for (model, tokens), pairs in sorted(ratios.items()):
        added = statistics.median(with_it / without - 1 for without, with_it, _ in pairs)
        holds = holds and added <= MOST_ADDED
        free_s = statistics.median(without for without, *_ in pairs)
        print(f"{model}, {tokens} tokens, prompts {len(pairs)}: {free_s:.6g} s, measuring adds {100 * added:+.2f} %")
        rows.write({"model": model, "policy": "headwater", "set": "measuring", "tokens": tokens},
                   {"prompts": len(pairs), "runs": min(runs for *_, runs in pairs), "ttft_s": free_s, "added": added})
    return 0 if holds else 1


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = flags.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make", help="prompts")
    one.add_argument("model", help="directory with config.json and tokenizer.json, or a name under HW_MODELS")
    one.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    one.add_argument("--mixed_lengths", action="store_true", help="any length between those")
    one.add_argument("--count", type=int, default=200, help="of all lengths and kinds together")
    one.add_argument("--text", nargs="+", required=True, metavar="FILE", help="or a name, as python -m headwater.eval takes")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--output", type=Path, required=True, metavar="PROMPTS.jsonl")
    one = commands.add_parser("check", help="recall over all rows")
    one.add_argument("model")
    one.add_argument("--prompts", type=Path, required=True)
    one.add_argument("--results", type=Path, required=True, help="of the bench, a row a prompt")
    one.add_argument("--details", type=Path, required=True,
                     help="a line a prompt, appended to; what is there is not done again")
    one.add_argument("--output", type=Path, required=True, metavar="ROWS.jsonl", help="appended to")
    one.add_argument("--oracle", action="store_true", help="also the least density that could hold min_recall")
    one.add_argument("--limit_s", type=float, default=math.inf, help="no prompt is begun after it")
    one.add_argument("--device", default="cuda:0")
    one.add_argument("--commit", default="", help="where the checkout has no git history")
    one = commands.add_parser("overhead", help="what measuring recall costs")
    one.add_argument("--free", type=Path, required=True, metavar="ROWS.jsonl", help="of the bench")
    one.add_argument("--measured", type=Path, required=True, metavar="ROWS.jsonl", help="of the bench with --measure_recall")
    one.add_argument("--output", type=Path, required=True, metavar="ROWS.jsonl", help="appended to")
    return flags


def main(arguments: Optional[Sequence[str]] = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return {"make": make, "check": check, "overhead": overhead}[args.command](args)
    except (ValueError, KeyError, OSError) as error:
        print(f"contract_study: {error!r}" if isinstance(error, KeyError) else f"contract_study: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
