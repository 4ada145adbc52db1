#!/usr/bin/env python3
"""Short prompts through the whole service on one GPU, beside the same prompts packed by hand; appends a row to
bench/results/prefill.jsonl.

    cmake --preset release -DHW_CUDA=ON && cmake --build --preset release
    python3 bench/packed_bench.py [--layers 32] [--prompts 1000]

Writes a checkpoint of Llama-3-8B's shape with random weights to --folder (16 GB for 32 layers). packed_prefill packs the
prompts by hand and times the passes alone; then a coordinator, a worker on the GPU and a decode node that checks every KV
block (--sink=verify) take them from `headwater batch`, after a few that warm up. A decode node holds 1,024 caches.
"""

import argparse
import datetime
import json
import math
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
             head_dim=128)
WARM_UP_PROMPTS = 20


class BenchError(Exception):
    pass


def tensors(layers: int):
    """(name, shape, whether it is a norm's) of every tensor."""
    hidden, inner, q, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 4096, 1024
    yield "model.embed_tokens.weight", (SHAPE["vocab_size"], hidden), False
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in (("self_attn.q_proj", (q, hidden)), ("self_attn.k_proj", (kv, hidden)),
                            ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, q)),
                            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
                            ("mlp.down_proj", (hidden, inner))):
            yield f"{prefix}{name}.weight", shape, False
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (hidden,), True
    yield "model.norm.weight", (hidden,), True
    yield "lm_head.weight", (SHAPE["vocab_size"], hidden), False


def write_checkpoint(folder: Path, layers: int) -> None:
    """Normal numbers of deviation 0.02, one block of them over and over; norms are 1."""
    import numpy

    folder.mkdir(parents=True, exist_ok=True)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=layers, rms_norm_eps=1e-5,
                  rope_theta=500000.0, max_position_embeddings=8192, tie_word_embeddings=False, hidden_act="silu",
                  torch_dtype="bfloat16", bos_token_id=128000, eos_token_id=128001, **SHAPE)
    header, at = {}, 0
    for name, shape, _ in tensors(layers):
        size = num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = numpy.random.default_rng(1).normal(0, 0.02, 48_611_147).astype(numpy.float32)
    block = (values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes()
    with open(folder / "model.safetensors", "wb", buffering=0) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        begin = 0  # in the block: no two tensors are alike
        for _, shape, norm in tensors(layers):
            left = num_bytes(shape)
            if norm:
                out.write(struct.pack("<H", 0x3F80) * (left // 2))
                continue
            while left > 0:
                count = min(left, len(block) - begin)
                out.write(memoryview(block)[begin:begin + count])
                begin, left = (begin + count) % len(block), left - count
    # Last: where it is, the checkpoint is whole.
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def num_bytes(shape: tuple) -> int:
    return 2 * math.prod(shape)


def free_ports(count: int) -> list:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


class Service:
    """A coordinator, one GPU worker, one decode node."""

    def __init__(self, arguments, model: Path):
        self.coordinator, coordinator_metrics, worker, worker_metrics, decode, self.decode_metrics = (
            f"127.0.0.1:{port}" for port in free_ports(6))
        self.processes = []
        try:
            self.start_all(arguments, model, coordinator_metrics, worker, worker_metrics, decode)
        except OSError:
            self.stop()
            raise

    def start_all(self, arguments, model: Path, coordinator_metrics: str, worker: str, worker_metrics: str, decode: str) -> None:
        self.start(arguments, "headwater-coordinator", f"--listen={self.coordinator}", f"--metrics={coordinator_metrics}")
        self.start(arguments, "headwater-worker", f"--model={model}", "--device=cuda:0", f"--coordinator={self.coordinator}",
                   f"--listen={worker}", f"--metrics={worker_metrics}")
        self.start(arguments, "headwater-decode", f"--model={model}", "--sink=verify", f"--coordinator={self.coordinator}",
                   f"--listen={decode}", f"--metrics={self.decode_metrics}", "--decode_node=d0")

    def start(self, arguments, program: str, *flags: str) -> None:
        log = open(arguments.folder / f"{program}.log", "wb")
        self.processes.append(subprocess.Popen([arguments.bin / program, *flags], stdout=log, stderr=subprocess.STDOUT,
                                               stdin=subprocess.DEVNULL))

    def wait_ready(self, arguments, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            for process in self.processes:
                if process.poll() is not None:
                    raise BenchError(f"{process.args[0]} ended with status {process.returncode}; see {arguments.folder}")
            workers, nodes = (run_json(arguments, what, f"--coordinator={self.coordinator}") for what in ("workers", "nodes"))
            if workers and nodes:
                return
            time.sleep(0.5)
        raise BenchError(f"worker and decode node did not register within {limit_s:g} s; see {arguments.folder}")

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


def run_json(arguments, *words: str) -> bool:
    """Whether `headwater WORDS --json` succeeds and lists something."""
    done = subprocess.run([arguments.bin / "headwater", *words, "--json", "--connect_timeout=1s"], capture_output=True, text=True)
    return done.returncode == 0 and ('"worker_id"' in done.stdout or '"decode_node"' in done.stdout)


def run_batch(arguments, service: Service, requests: Path) -> float:
    """Seconds of the whole call."""
    start = time.monotonic()
    done = subprocess.run([arguments.bin / "headwater", "batch", f"--requests={requests}", f"--coordinator={service.coordinator}",
                           "--json"], capture_output=True, text=True, timeout=arguments.limit_s)
    seconds = time.monotonic() - start
    if done.returncode != 0:
        raise BenchError(f"headwater batch ended with status {done.returncode}: {done.stderr[-1000:]} {done.stdout[-1000:]}")
    return seconds


def first_of(requests: Path, count: int, to: Path) -> Path:
    """Some of the prompts under other ids: a known id is answered from memory."""
    lines = requests.read_text(encoding="utf-8").splitlines()[:count]
    to.write_text("".join(line.replace('"packed-', '"warm-up-') + "\n" for line in lines), encoding="utf-8")
    return to


def counters(address: str, prefix: str) -> dict:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(prefix)}


def measure(arguments) -> dict:
    model = arguments.folder / f"llama-3-8b-random-{arguments.layers}-layers"
    if not (model / "config.json").is_file():
        begin = time.monotonic()
        write_checkpoint(model, arguments.layers)
        print(f"checkpoint written in {time.monotonic() - begin:.1f} s", flush=True)
    requests = arguments.folder / "requests.jsonl"
    done = subprocess.run([arguments.bin / "packed_prefill", f"--model={model}", f"--prompts={arguments.prompts}",
                           f"--requests={requests}"], capture_output=True, text=True, timeout=arguments.limit_s)
    if done.returncode != 0:
        raise BenchError(f"packed_prefill ended with status {done.returncode}: {done.stderr[-1000:]}")
    by_hand = json.loads(done.stdout)
    print(f"by hand: {by_hand}", flush=True)
    service = Service(arguments, model)
    try:
        service.wait_ready(arguments, arguments.limit_s)
        run_batch(arguments, service, first_of(requests, WARM_UP_PROMPTS, arguments.folder / "warm-up.jsonl"))
        seconds = run_batch(arguments, service, requests)
        for line, value in counters(service.decode_metrics, "headwater_kv_ingress").items():
            print(f"  {line} {value:.0f}", flush=True)
    finally:
        service.stop()
    rate = by_hand["tokens"] / seconds
    print(f"service: {seconds:.2f} s, {rate:.0f} tokens/s, {100 * rate / by_hand['tokens_per_s']:.1f} % of by hand", flush=True)
    return {"bench": "prefill", "device": by_hand.pop("device"), "commit": arguments.commit,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "params": {"model": "llama-3-8b", "layers": arguments.layers, "prompts": by_hand["prompts"], "tokens": by_hand["tokens"],
                       "prompt_tokens": "64 to 2048", "policy": "dense", "linear": "bf16", "sink": "verify", "case": "packed"},
            "metrics": {"seconds": round(seconds, 3), "tokens_per_s": round(rate, 1),
                        "share_of_by_hand": round(rate / by_hand["tokens_per_s"], 4), "floor_s": round(by_hand["seconds"], 3)},
            "peers": {"packed_by_hand": by_hand}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT / "build" / "release" / "bin")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/headwater-packed"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--limit_s", type=float, default=240, help="for each program")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "prefill.jsonl")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        row = measure(arguments)
    except (BenchError, OSError, subprocess.TimeoutExpired) as error:
        print(f"packed_bench: {error}", file=sys.stderr)
        return 1
    with open(arguments.output, "a", encoding="utf-8") as output:
        output.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
