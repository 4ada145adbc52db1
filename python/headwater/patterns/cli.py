"""Flags of python -m headwater.patterns, and what they ask for."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import torch

from headwater.eval import policies, texts
from headwater.eval.blocks import BLOCK_KEYS
from headwater.eval.cli import DTYPES, dtype_name, load_tokenizer
from headwater.eval.files import write_text
from headwater.eval.maps import Tap
from headwater.eval.model import EvalModel, ModelError, find_model
from headwater.eval.policies import Policy
from headwater.patterns.measure import measure

LEAST_TOKENS = 2 * BLOCK_KEYS


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m headwater.patterns", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Maps of attention mass with the blocks that a policy selected, and patterns.json.")
    add = flags.add_argument
    add("model", help="model directory, or a name under HW_MODELS")
    prompt = flags.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="FILE", help="a text; names as in headwater.eval")
    prompt.add_argument("--token_file", type=Path, metavar="FILE", help="token ids, separated by whitespace or commas")
    add("--policy", required=True, metavar="NAME[:PARAMETER=VALUE,...]", help=f"of {', '.join(policies.names())}")
    add("--output", type=Path, required=True, metavar="DIR", help="layer_NN.png, summary.png, patterns.json")
    add("--tokens", type=int, default=0, help="of the prompt, from its start; 0: all")
    add("--layers", default="all", metavar="0,3-5", help="layers to draw; all of them run")
    add("--heads", default="all", metavar="0,3-5", help="query heads to draw")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, f32 else")
    return flags


def token_ids(text: str) -> List[int]:
    """Ids separated by whitespace or commas, as the `headwater` command reads them. ValueError names the first bad word."""
    ids = []
    for number, word in enumerate(text.replace(",", " ").split(), 1):
        if not (word.isascii() and word.isdigit() and len(word) <= 10):
            raise ValueError(f"word {number}, '{word[:40]}', is not a token id")
        ids.append(int(word))
    return ids


def read_prompt(args: argparse.Namespace, tokenizer) -> List[int]:
    name = args.prompt or args.token_file
    if args.prompt:
        ids = tokenizer.encode(texts.read_text(args.prompt)[1]).ids
    else:
        try:
            ids = token_ids(args.token_file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{args.token_file}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{args.token_file}: {error}") from error
    if args.tokens and (args.tokens < LEAST_TOKENS or args.tokens > len(ids)):
        raise ValueError(f"--tokens={args.tokens}; {LEAST_TOKENS} to the {len(ids)} of {name} are wanted")
    if len(ids) < LEAST_TOKENS:
        raise ValueError(f"{name} has {len(ids)} tokens; at least {LEAST_TOKENS} are wanted")
    return ids[:args.tokens or None]


def chosen(flag: str, text: str, count: int) -> List[int]:
    """Numbers below `count` that a flag names: "all", or numbers and ranges, ascending."""
    if text == "all":
        return list(range(count))
    found = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        numbers = (first, last if dash else first)
        if not all(number.isascii() and number.isdigit() and len(number) <= 9 for number in numbers):
            raise ValueError(f"{flag}={text}: '{part}' is not a number or a range as 3-5")
        low, high = map(int, numbers)
        if low > high or high >= count:
            raise ValueError(f"{flag}={text}: '{part}' is not in 0 to {count - 1}")
        found.update(range(low, high + 1))
    return sorted(found)


def run(args: argparse.Namespace, model: EvalModel, policy: Policy, ids: Sequence[int], title: str,
        say: Callable[[str], None]) -> List[dict]:
    """Measures and draws layer by layer. Returns the layers of patterns.json."""
    from headwater.patterns import plot

    config = model.model.config
    layers = set(chosen("--layers", args.layers, config.num_hidden_layers))
    heads = chosen("--heads", args.heads, config.num_attention_heads)
    found = []

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor, stats) -> None:
        if layer not in layers:
            return
        one = measure(layer, q, k, stats, heads)
        path = args.output / f"layer_{layer:02d}.png"
        plot.draw_layer(path, one, f"{title}: layer {layer}, ran {one.ran}, computed {one.density:.3f} of the pairs")
        found.append(one.as_json())
        say(f"written: {path}")

    model.prefill(ids, Tap(policy, visit))
    plot.draw_summary(args.output / "summary.png", found, title)
    return found


def table(layers: List[dict]) -> str:
    """Means over the heads, a line a layer."""
    lines = ["| layer | ran | computed | density | recall | least head |", "|---|---|---|---|---|---|"]
    for layer in layers:
        density, recall = ([head[key] for head in layer["heads"]] for key in ("density", "recall"))
        worst = min(layer["heads"], key=lambda head: head["recall"])
        lines.append(f"| {layer['layer']} | {layer['ran']} | {layer['density']:.4f} | {sum(density) / len(density):.4f} | "
                     f"{sum(recall) / len(recall):.4f} | {worst['recall']:.4f} (head {worst['head']}) |")
    return "\n".join(lines)


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("matplotlib is not installed (pip install matplotlib)")
        policy = policies.make(args.policy)
        path = find_model(args.model)
        ids = read_prompt(args, load_tokenizer(path))
        model = EvalModel.load(path, args.device, DTYPES[dtype_name(args)])
        if len(ids) > model.max_tokens:
            raise ModelError(f"the prompt has {len(ids)} tokens; {path} is for {model.max_tokens} at most (--tokens)")
        if max(ids) >= model.model.config.vocab_size:
            raise ModelError(f"token id {max(ids)}; the vocabulary of {path} has {model.model.config.vocab_size}")
        name = path.resolve().name
        layers = run(args, model, policy, ids, f"{name}, {args.policy}, {len(ids)} tokens", say)
        write_text(args.output / "patterns.json", json.dumps(
            {"format": 1, "model": name, "policy": args.policy, "device": args.device, "dtype": dtype_name(args),
             "tokens": len(ids), "block_tokens": BLOCK_KEYS, "layers": layers}, indent=1) + "\n")
        print(table(layers))
        say(f"written: {args.output / 'summary.png'}, {args.output / 'patterns.json'}")
        return 0
    except (ValueError, OSError) as error:
        say(f"headwater.patterns: {error}")
        return 2
    except (RuntimeError, NotImplementedError) as error:
        say(f"headwater.patterns: {args.policy}: {type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"headwater.patterns: broken off; pictures of finished layers are in {args.output}")
        return 130
