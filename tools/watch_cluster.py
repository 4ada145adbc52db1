"""A small cluster of CPU processes with a tiny model, and prompts for it that end well, that fail, and that are refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from demo_cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "model" / "golden" / "llama"  # 3 layers, 256 tokens, 2048 positions
WORKERS = 2


def small_cluster(binaries: Path, state: Path) -> Cluster:
    """A context manager: coordinator, two workers and a decode node that keep their logs and caches in `state`."""
    return Cluster(binaries, MODEL, state, WORKERS, compute="f32")


def tokens(count: int) -> list:
    return [index % 250 + 1 for index in range(count)]


def send_prompts(client) -> Counter:
    """Sends each kind of prompt once, on one worker and on two, and returns how many ended with which (code, reason)."""
    from headwater import HeadwaterError, PrefillOptions

    plain = PrefillOptions()
    kinds = [(tokens(100), plain), (tokens(700), replace(plain, world_size=2, strategy="ring")),
             (tokens(900), replace(plain, world_size=2, strategy="sparse")), (tokens(1500), replace(plain, policy="a_shape")),
             (tokens(2000), replace(plain, deadline_s=0.001)),  # accepted, and too late
             ([], plain), ([9999], plain), (tokens(3000), plain), (tokens(10), replace(plain, decode_node="nowhere"))]
    ended = Counter()
    for prompt, options in kinds:
        try:
            result = client.prefill(prompt, options=options, timeout_s=60)
        except HeadwaterError as error:
            ended[error.code.name, error.reason] += 1
            continue
        ended["OK", ""] += 1
        for _ in client.generate(result, 2, timeout_s=60):
            pass
        client.release(result, timeout_s=60)
    return ended
