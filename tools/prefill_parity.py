#!/usr/bin/env python3
"""Holds a device's prefill of real checkpoints against the CPU's in f32 and against transformers.

    prefill_parity.py prompts MODEL_DIR... --output DIR          writes DIR/MODEL-*.tokens
    prefill_parity.py run MODEL_DIR... --tokens DIR [--device cuda:0] [--ranks 2] [--share_gpu] [--no-cpu]
    prefill_parity.py run MODEL_DIR... --tokens DIR --device cpu --linear f32 --ranks 2,4,8 [--policy a_shape]

prompts takes what a folder has: golden.safetensors' tokens (tests/model/golden); eval/*.jsonl's shortest prompts, or with
--longest its longest one (longctx-36m); else the demo's document and question (needs the PyPI packages tokenizers and jinja2).

run calls prefill_parity for each prompt: relative differences ||a - b|| / ||b|| of K and V at most --tolerance in every
layer, and, but for golden models, whose weights are random, the same best token. With --ranks over 1 each prompt is then shared
by so many GPUs (with --share_gpu threads on one), or CPU ranks over TCP, in every partition and strategy that they have, and
held against one, at most --ranks_tolerance; with --no-cpu that is all. Where torch and transformers are there and the policy is dense, the last token's logits are held against
transformers in f32 on the CPU, too, at most --logits_tolerance. Exit status 1: a difference is too large.
"""

import argparse
import array
import base64
import datetime
import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))


class ParityError(Exception):
    pass


def golden_tokens(path: Path) -> list:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    begin, end = json.loads(data[8:8 + size])["tokens"]["data_offsets"]
    return list(struct.unpack(f"<{(end - begin) // 4}i", data[8 + size + begin:8 + size + end]))


def eval_tokens(path: Path, longest: bool) -> list:
    """The first two prompts of the shortest length, or the longest one, in a file of longctx-36m's eval/."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    key = next(key for key in ("prompt_ids_u16_b64", "context_ids_u16_b64") if key in rows[0])
    prompts = [base64.b64decode(row[key]) for row in rows]
    prompts = [list(struct.unpack(f"<{len(prompt) // 2}H", prompt)) for prompt in prompts]
    return [max(prompts, key=len)] if longest else sorted(prompts, key=len)[:2]


def document_tokens(model: Path) -> list:
    from headwater import demo_prompt
    from headwater.chat import ChatTokenizer

    text = demo_prompt.DOCUMENT.read_text(encoding="utf-8")
    return [ChatTokenizer(model).document_prompt(text, demo_prompt.QUESTION, tokens)
            for tokens in (500, demo_prompt.DOCUMENT_TOKENS)]


def make_prompts(model: Path, longest: bool) -> dict:
    """Prompts by name."""
    if (model / "golden.safetensors").is_file():
        return {"golden": golden_tokens(model / "golden.safetensors")}
    if (model / "eval").is_dir():
        return {f"{path.stem}{i}": prompt for path in sorted((model / "eval").glob("*.jsonl"))
                for i, prompt in enumerate(eval_tokens(path, longest))}
    return {f"document{i}": prompt for i, prompt in enumerate(document_tokens(model))}


def read_logits(path: Path) -> array.array:
    values = array.array("f")
    values.frombytes(path.read_bytes())
    return values


def relative_error(a, b) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum(y * y for y in b))


class Transformers:
    """The last token's logits in f32 on the CPU; `why_not` says why there are none."""

    def __init__(self):
        self.why_not, self.models = "", {}
        try:
            import torch
            import transformers
            self.torch, self.auto, self.version = torch, transformers.AutoModelForCausalLM, transformers.__version__
        except ImportError as error:
            self.why_not = str(error)

    def logits(self, directory: Path, tokens: list) -> list:
        if directory not in self.models:
            self.models = {directory: self.auto.from_pretrained(directory, dtype=self.torch.float32,
                                                                attn_implementation="sdpa").eval()}
        with self.torch.inference_mode():
            return self.models[directory](self.torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].tolist()


def describe(row: dict) -> str:
    ways = "" if row["policy"] == "dense" else f", {row['policy']}"
    if row["ranks"] > 1:
        ways += f", {row['ranks']} ranks, {row['partition']}, {row['strategy']}"
    if "equals_allgather" in row:
        ways += f" ({'equal' if row['equals_allgather'] else 'NOT EQUAL'} to allgather)"
    return (f"{row['tokens']} tokens on {row['device']}, {row['linear']}{ways}: K {max(row['k_errors']):.4g}, V {max(row['v_errors']):.4g}, "
            f"logits {row['logits_error']:.4g}, top {row['top']} ({row['reference']}: {row['reference_top']})")


def make_row(prompt: str, row: dict, arguments) -> dict:
    extra = {"share_gpu": True} if arguments.share_gpu and row["ranks"] > 1 else {}
    names = ("model", "tokens", "linear", "policy", "ranks", "partition", "strategy", "reference", "tolerance")
    metrics = {"k_error": max(row["k_errors"]), "v_error": max(row["v_errors"]), "logits_error": row["logits_error"], "top": row["top"],
               "reference_top": row["reference_top"], "ok": row["ok"]}
    metrics |= {name: row[name] for name in ("density", "exchange_bytes", "equals_allgather") if name in row}
    return {"bench": "prefill_parity", "device": row["device"], "commit": arguments.commit,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "params": {"prompt": prompt, **{name: row[name] for name in names if name in row}, **extra}, "metrics": metrics, "peers": {}}


def run_one(arguments, model: Path, tokens: Path, peer: Transformers) -> bool:
    is_golden = (model / "golden.safetensors").is_file()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(arguments.program), f"--model={model}", f"--tokens={tokens}", f"--device={arguments.device}",
                   f"--ranks={arguments.ranks}", f"--partition={arguments.partition}",
                   f"--linear={arguments.linear}", f"--tolerance={arguments.tolerance}",
                   f"--ranks_tolerance={arguments.ranks_tolerance}", f"--logits={folder}/logits",
                   f"--policy={arguments.policy}", "--nosame_top" if is_golden else "--same_top"]
        command += ["--share_gpu"] if arguments.share_gpu else []
        if not arguments.cpu:
            command = [word for word in command if not word.startswith("--logits=")] + ["--nocpu"]
        if arguments.policy_parameters:
            command.append(f"--policy_parameters={arguments.policy_parameters}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit_s)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ParityError(str(error)) from error
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode not in (0, 1) or not rows or all(row["ok"] for row in rows) != (done.returncode == 0):
            raise ParityError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
        ok = True
        for row in rows:
            fits = row["ok"] and row["logits_error"] <= arguments.logits_tolerance
            print(f"{tokens.stem}: {describe(row)}: {'ok' if fits else 'TOO FAR'}", flush=True)
            ok = ok and fits
        if arguments.output:
            with open(arguments.output, "a", encoding="utf-8") as output:
                output.writelines(json.dumps(make_row(tokens.stem, row, arguments)) + "\n" for row in rows)
        if peer.why_not or arguments.policy != "dense" or not arguments.cpu:
            return ok
        wanted = peer.logits(model, [int(word) for word in tokens.read_text().split()])
        top = max(range(len(wanted)), key=wanted.__getitem__)
        for name, ours in (("device", rows[0]["top"]), ("reference", rows[0]["reference_top"])):
            if not (Path(folder) / f"logits.{name}.f32").is_file():
                continue  # the device was its own reference
            error = relative_error(read_logits(Path(folder) / f"logits.{name}.f32"), wanted)
            fits = error <= arguments.logits_tolerance and (is_golden or ours == top)
            print(f"  {name:9s} against transformers {peer.version}: logits {error:.4g}, top {ours} ({top}): "
                  f"{'ok' if fits else 'TOO FAR'}", flush=True)
            ok = ok and fits
        return ok


def run(arguments) -> int:
    peer, failed = Transformers(), []
    if peer.why_not:
        print(f"transformers is not here ({peer.why_not}): the CPU alone is the reference")
    for model in arguments.models:
        files = sorted(arguments.tokens.glob(f"{model.name}-*.tokens"))
        if not files:
            raise ParityError(f"no {model.name}-*.tokens in {arguments.tokens}; 'prompts' writes them")
        for path in files:
            try:
                fits = run_one(arguments, model, path, peer)
            except ParityError as error:
                print(f"{path.stem}: {error}", flush=True)
                fits = False
            if not fits:
                failed.append(path.stem)
    print(f"too far, or not run: {', '.join(failed)}" if failed else "all within their tolerances")
    return 1 if failed else 0


def prompts(arguments) -> int:
    arguments.output.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        for name, tokens in make_prompts(model, arguments.longest).items():
            path = arguments.output / f"{model.name}-{name}.tokens"
            path.write_text(" ".join(map(str, tokens)) + "\n")
            print(f"{path}: {len(tokens)} tokens")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making, running = commands.add_parser("prompts"), commands.add_parser("run")
    for each in (making, running):
        each.add_argument("models", type=lambda text: Path(text).resolve(), nargs="+", metavar="MODEL_DIR")
    making.add_argument("--output", type=Path, required=True)
    making.add_argument("--longest", action="store_true", help="the longest prompt of each file of eval/, not the shortest")
    running.add_argument("--tokens", type=Path, required=True, help="folder that prompts wrote")
    running.add_argument("--device", default="cuda:0", help="cuda:N, or cpu")
    running.add_argument("--ranks", default="1", help="over 1: so many share each prompt, too; 2,4,8: each of these")
    running.add_argument("--share_gpu", action="store_true", help="of GPU ranks: they are threads that share --device")
    running.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True, help="hold one rank against the CPU, too (yes)")
    running.add_argument("--partition", choices=["all", "contiguous", "zigzag", "striped"], default="all", help="of several ranks")
    running.add_argument("--linear", choices=["auto", "bf16", "fp8", "f32"], default="auto",
                         help="fp8 needs other tolerances; f32: of a CPU, its ranks against one")
    running.add_argument("--policy", default="dense", help="attention policy; one that a CPU has not needs --ranks")
    running.add_argument("--policy_parameters", default="", help="of the policy: name=value,...")
    running.add_argument("--tolerance", type=float, default=2e-2)
    running.add_argument("--ranks_tolerance", type=float, default=1e-3)
    running.add_argument("--logits_tolerance", type=float, default=3e-2)
    running.add_argument("--limit_s", type=float, default=300, help="for each prompt")
    running.add_argument("--output", type=Path, help="file that every comparison is added to, as JSON")
    running.add_argument("--commit", default="", help="for those rows")
    running.add_argument("--program", type=Path, default=ROOT / "build" / "release" / "bin" / "prefill_parity")
    arguments = parser.parse_args()
    try:
        return prompts(arguments) if arguments.command == "prompts" else run(arguments)
    except (ParityError, ImportError, OSError, ValueError) as error:
        print(f"prefill_parity: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
