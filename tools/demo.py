#!/usr/bin/env python3
"""The demo: a real model's long prompt is prefilled by several workers, and a decode node writes on.

    demo.py [--model DIR] [--prompt FILE] [--question TEXT] [--workers 2] [--device cpu]

make demo builds the programs and calls this. With --check the generated tokens must be those that transformers
generates from the same weights and prompt (tests/demo/reference.json).
"""

import argparse
import hashlib
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

import fetch_model
from demo_cluster import Cluster, ClusterError, read_metrics, usable_cpus
from make_certificates import CertificateError, make_certificates

from headwater import Client, HeadwaterError, PrefillOptions, demo_prompt, tls_credentials
from headwater.chat import ChatError, ChatTokenizer, StreamDecoder

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "demo" / "reference.json"
SKIPPED = 77
# Shown from each process, where it has them.
METRICS = ("headwater_requests_total", "headwater_prompt_tokens_total", "headwater_kv_egress_bytes_total",
           "headwater_kv_ingress_blocks_total", "headwater_decode_tokens_total", "headwater_workers")


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


class Steps:
    def __init__(self, first: int, total: int):
        self._next, self._total = first, total

    def begin(self, what: str) -> None:
        print(f"[{self._next}/{self._total}] {what}", flush=True)
        self._next += 1


class ProgressBar:
    """One line that is drawn again on a terminal; elsewhere a line for every tenth."""

    WIDTH = 30

    def __init__(self):
        self._live = sys.stdout.isatty()
        self._last_tenth = -1

    def __call__(self, progress) -> None:
        if progress.num_layers == 0:
            if progress.queue_position:
                print(f"    queued, {progress.queue_position} requests ahead", flush=True)
            return
        share = progress.layers_done / progress.num_layers
        filled = int(share * self.WIDTH)
        line = (f"    [{'#' * filled}{'.' * (self.WIDTH - filled)}] layer {progress.layers_done}/{progress.num_layers}  "
                f"KV acknowledged {mib(progress.bytes_acked)} of {mib(progress.bytes_total)}")
        if progress.layers_done > 0:
            line += f"  {progress.tokens_per_second:.0f} tokens/s  ETA {progress.eta_s:.0f} s"
        if self._live:
            print(f"\r{line}\033[K", end="", flush=True)
        elif int(share * 10) != self._last_tenth:
            self._last_tenth = int(share * 10)
            print(line, flush=True)

    def end(self) -> None:
        if self._live:
            print(flush=True)


def mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def find_model(given: str) -> Path:
    if given:
        model = Path(given)
        if not (model / "config.json").is_file():
            raise DemoError(f"{model} has no config.json: MODEL must be a Hugging Face model directory")
        return model
    try:
        return fetch_model.fetch(say=lambda text: print(f"    {text}", flush=True))
    except fetch_model.FetchError as error:
        raise DemoError(f"{error}.\nPass a model instead: make demo MODEL=dir, where dir is a Hugging Face directory of a "
                        "Llama, Mistral, Qwen2 or Qwen3 model (config.json, *.safetensors, tokenizer.json)") from error


def build_prompt(tokenizer: ChatTokenizer, model: Path, arguments) -> list:
    """The prompt's ids. A document that leaves no room for question and answer is cut, and that is said."""
    path = Path(arguments.prompt) if arguments.prompt else demo_prompt.DOCUMENT
    if not path.is_file():
        raise DemoError(f"no such file: {path} (pass a text: make demo PROMPT=file.txt)")
    document = path.read_text(encoding="utf-8", errors="replace")
    if not document.strip():
        raise DemoError(f"{path} is empty")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings", 1 << 20)
    overhead = len(tokenizer.document_prompt("x", arguments.question, 1))
    room = positions - overhead - arguments.max_new_tokens
    if room < 1:
        raise DemoError(f"the model has {positions} positions; the question and its answer take them all")
    wanted = len(tokenizer.encode(document))
    used = min(wanted, room, room if arguments.prompt else demo_prompt.DOCUMENT_TOKENS)
    ids = tokenizer.document_prompt(document, arguments.question, used)
    cut = f", the first {used} of {wanted} tokens" if used < wanted else ""
    print(f"    document {path}{cut}; question: {arguments.question}")
    print(f"    prompt: {len(ids)} tokens, chat template applied", flush=True)
    return ids


def show_answer(client: Client, tokenizer: ChatTokenizer, result, arguments) -> tuple:
    """Streams the answer; returns (tokens, seconds)."""
    decoder = StreamDecoder(tokenizer)
    tokens, begin = [], time.monotonic()
    print("\n    ", end="")
    for token in client.generate(result, arguments.max_new_tokens, stop_token_ids=tokenizer.stop_token_ids):
        tokens.append(token)
        print(decoder.push(token.token_id).replace("\n", "\n    "), end="", flush=True)
    print("\n")
    return tokens, time.monotonic() - begin


def show_table(result, verified: str, ttft_s: float, tokens: list, decode_s: float) -> None:
    stages = "  ".join(f"{name} {value:.2f} s" for name, value in result.stages_s.items() if name != "total")
    rows = [
        ("time to first token", f"{ttft_s:.2f} s for {result.num_tokens} tokens (as the client saw it)"),
        ("prefill", f"{result.tokens_per_second:.0f} tokens/s on {result.world_size} workers "
                    f"({', '.join(result.worker_ids)}), {result.partition}"),
        ("stages, slowest rank", stages),
        ("attention density", f"{result.density:.3f}"),
        ("KV streamed", f"{mib(result.kv_bytes)} in {result.kv_blocks} blocks, {result.kv_blocks_resent} sent again, "
                        f"{result.kv_stream_resumes} streams resumed"),
        ("KV verified", f"{verified} block checksums at the decode node; digest of the whole cache {result.kv_digest}"),
        ("decode", f"{len(tokens)} tokens, {len(tokens) / decode_s:.1f} tokens/s, ended by {tokens[-1].finish_reason}"),
    ]
    for name, value in rows:
        print(f"    {name:<22} {value}")


def show_metrics(cluster: Cluster) -> None:
    print("    metrics (Prometheus text), while the demo runs:")
    for process in cluster.processes:
        text = read_metrics(process.metrics)
        print(f"      {process.name:<12} http://{process.metrics}/metrics" + ("" if text else "  (no answer)"))
        lines = [line for line in (text or "").splitlines() if line.startswith(METRICS) and not line.endswith(" 0")]
        for line in lines[:2]:
            print(f"        {line}")


def blocks_verified(cluster: Cluster) -> str:
    """What the decode node says it has checked and stored."""
    address = next(process.metrics for process in cluster.processes if process.name == "decode")
    for line in (read_metrics(address) or "").splitlines():
        if line.startswith('headwater_kv_ingress_blocks_total{result="stored"}'):
            return f"{float(line.split()[-1]):.0f}"
    return "unknown"


def compare_with_reference(reference: dict, ids: list, question: str, generated: list) -> dict:
    """How far `generated` agrees with transformers: {"f32" and "bf16": (equal tokens from the start, tokens that are firm)}.

    Firm are the tokens before the first one of which transformers itself is in doubt: whose two best logits are closer than
    0.05. Empty where the reference has no such prompt.
    """
    ids_hash = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
    case = next((case for case in reference["cases"]
                 if case["question"] == question and case["prompt_sha256"] == ids_hash), {})
    result = {}
    for arithmetic in ("f32", "bf16") if case else ():
        expected, gaps = case[arithmetic]["token_ids"], case[arithmetic]["top2_logit_gaps"]
        firm = next((index for index, gap in enumerate(gaps) if gap < 0.05), len(expected))
        equal = next((index for index, (a, b) in enumerate(zip(expected, generated)) if a != b),
                     min(len(expected), len(generated)))
        result[arithmetic] = equal, firm
    return result


def check_reference(arguments, ids: list, tokens: list) -> bool:
    """Says how far the tokens agree with transformers'; True where they do as far as they must.

    Computing in f32 they must all be those of transformers in f32. Otherwise they must agree with transformers, in f32 or in
    bf16, as far as that is firm: the two differ from each other where bf16's rounding turns a close choice.
    """
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    generated = [token.token_id for token in tokens]
    compared = compare_with_reference(reference, ids, arguments.question, generated)
    if not compared:
        print("    no reference tokens of transformers for this prompt")
        return False
    print("    of the tokens, " + ", ".join(f"the first {equal} are those of transformers in {arithmetic} ({firm} are firm)"
                                           for arithmetic, (equal, firm) in compared.items()))
    if arguments.compute == "f32":
        return compared["f32"][0] == len(generated)
    return any(equal >= firm for equal, firm in compared.values())


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="Hugging Face model directory; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--prompt", default="", help="text file; default: 7,000 tokens of the GPL-3 that Debian ships")
    parser.add_argument("--question", default=demo_prompt.QUESTION)
    parser.add_argument("--workers", type=int, help="default: 2, or 1 on GPUs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="what the workers compute on; cuda: each on a GPU of its own, each prompt on one of them")
    parser.add_argument("--max_new_tokens", type=int, default=demo_prompt.MAX_NEW_TOKENS)
    parser.add_argument("--compute", choices=["auto", "f32", "bf16"], default="auto")
    parser.add_argument("--kv_dtype", choices=["f32", "f16", "bf16"], default="bf16")
    parser.add_argument("--policy", default="dense")
    parser.add_argument("--bin", type=Path, default=ROOT / "build" / "release" / "bin", help="directory of the programs")
    parser.add_argument("--state", type=Path, default=ROOT / ".demo", help="directory of logs and KV files")
    parser.add_argument("--tls", action="store_true", help="mutual TLS between all of them, with certificates made for it")
    parser.add_argument("--check", action="store_true", help="fail unless the tokens are transformers'")
    parser.add_argument("--no_fetch", action="store_true", help="end with status 77 where the model is not there yet")
    parser.add_argument("--first_step", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers is None:
        arguments.workers = 1 if arguments.device == "cuda" else 2
    if not 1 <= arguments.workers <= 64:
        parser.error(f"--workers is {arguments.workers}, must be 1 to 64")
    if not 1 <= arguments.max_new_tokens <= 65536:
        parser.error(f"--max_new_tokens is {arguments.max_new_tokens}, must be 1 to 65536")
    return arguments


def run(arguments) -> int:
    steps = Steps(arguments.first_step, arguments.steps)
    steps.begin("Model")
    model = find_model(arguments.model)
    tokenizer = ChatTokenizer(model)
    ids = build_prompt(tokenizer, model, arguments)

    steps.begin(f"Start a coordinator, {arguments.workers} workers and a decode node on loopback "
                f"({usable_cpus()} CPUs, workers on {arguments.device}, logs in {os.path.relpath(arguments.state)}/logs)")
    tls = credentials = None
    if arguments.tls:
        tls = (arguments.state / "tls").resolve()
        make_certificates(tls)
        credentials = tls_credentials(tls / "admin.crt", tls / "admin.key", tls / "ca.crt")
        print(f"    mutual TLS, certificates in {os.path.relpath(tls)}")
    with Cluster(arguments.bin, model, arguments.state, arguments.workers, arguments.compute,
                 arguments.device, tls) as cluster, \
            Client(cluster.coordinator, credentials=credentials) as client:
        cluster.wait_registered(client, lambda workers, nodes: print(
            f"    {workers}/{arguments.workers} workers, {nodes}/1 decode nodes registered", flush=True))

        steps.begin("Prefill")
        bar = ProgressBar()
        options = PrefillOptions(policy=arguments.policy, kv_dtype=arguments.kv_dtype, decode_node="decode-0")
        begin = time.monotonic()
        try:
            result = client.prefill(ids, options=options, on_progress=bar)
        finally:
            bar.end()
        ttft_s = time.monotonic() - begin

        steps.begin(f"Answer of {result.decode_node}, from the KV cache that it received")
        tokens, decode_s = show_answer(client, tokenizer, result, arguments)

        steps.begin("What happened")
        show_table(result, blocks_verified(cluster), ttft_s, tokens, decode_s)
        agrees = check_reference(arguments, ids, tokens) if arguments.check or not (arguments.model or arguments.prompt) else True
        show_metrics(cluster)
        print(f"    released {mib(client.release(result))} at {result.decode_node}", flush=True)
        killed = cluster.stop()
        print("    all processes have ended" + (f" ({killed} had to be killed)" if killed else ""))
    if arguments.check and (not agrees or killed):
        print("CHECK FAILED", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    arguments = parse_arguments()
    if arguments.no_fetch and not arguments.model and \
            not (fetch_model.CACHE / f"{fetch_model.NAME}-bf16" / "config.json").is_file():
        print("SKIPPED: the model is absent (tools/fetch_model.py fetches it)")
        return SKIPPED

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; all processes have ended", file=sys.stderr)
        return 130
    except (DemoError, ClusterError, ChatError, CertificateError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except HeadwaterError as error:
        print(f"demo: {error}\nthe logs of the processes are in {arguments.state}/logs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
