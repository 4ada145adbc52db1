#!/usr/bin/env python3
"""Writes docs/page-*.png: the live page of an empty coordinator, and of a cluster of CPU processes under load.

    page_screenshots.py --bin build/bin [--output docs]
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from demo_cluster import Cluster, end_with_parent, free_ports
from page_browser import Browser
from small_model import VOCAB, write_model

ROOT = Path(__file__).resolve().parents[1]
WIDTH, NARROW = 1280, 390
WORKERS, LAYERS = 4, 32
ENDED_BEFORE_S = 60
# (tokens, ranks, policy, priority); a number for a policy: a_shape with so long a window
SHORT = [(900, 1, "dense", 0), (2600, 2, 512, 0), (1800, 1, 256, 0)]
LONG = [(40000, 2, 1024, 0), (10000, 1, "dense", 0), (40000, 1, 256, 0), (12000, 4, 2048, 0),
        (3000, 1, "dense", 5), (800, 1, "dense", 0), (16000, 2, 512, -5)]


class Load:
    """Prompts that run until cancel()."""

    def __init__(self, client):
        self._client = client
        self._threads = []
        self._number = 4100

    def send(self, tokens: int, ranks: int, policy, priority: int) -> None:
        from headwater import HeadwaterError, PrefillOptions

        self._number += 1
        name = f"req-{self._number}"
        window = {} if isinstance(policy, str) else {"policy_parameters": {"window_tokens": policy}}
        options = replace(PrefillOptions(), world_size=ranks, policy="a_shape" if window else policy, priority=priority,
                          **window)

        def prefill() -> None:
            try:
                self._client.prefill([index % (VOCAB - 1) + 1 for index in range(tokens)], request_id=name, options=options,
                                     timeout_s=300)
            except HeadwaterError:
                pass  # the cluster ends before it does

        self._threads.append(threading.Thread(target=prefill, daemon=True))
        self._threads[-1].start()
        time.sleep(0.2)

    def wait(self) -> None:
        end = time.monotonic() + ENDED_BEFORE_S
        for thread in self._threads:
            thread.join(timeout=max(0.1, end - time.monotonic()))


@contextlib.contextmanager
def lonely_coordinator(binaries: Path, page: str):
    process = subprocess.Popen([binaries / "headwater-coordinator", f"--listen=127.0.0.1:{free_ports(1)[0]}", "--metrics=",
                                f"--page={page}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, preexec_fn=end_with_parent)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def take(browser: Browser, output: Path, name: str) -> None:
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.screenshot(output / f"page-{name}-{scheme}.png", WIDTH)


def take_all(binaries: Path, output: Path, folder: Path) -> None:
    from headwater import Client

    model = folder / "small-32l"
    model.mkdir()
    write_model(model, LAYERS)
    page = f"127.0.0.1:{free_ports(1)[0]}"
    flags = (f"--page={page}",)
    with Browser() as browser:
        browser.size(WIDTH)
        with lonely_coordinator(binaries, page):
            browser.open_when_served(f"http://{page}/")
            browser.wait("document.getElementById('verdict').innerText === 'Waiting for workers'", 20)
            take(browser, output, "empty")
        browser.open("about:blank")
        with Cluster(binaries, model, folder, WORKERS, compute="f32", coordinator_flags=flags,
                     worker_flags=("--threads=1", "--measure_rates=false")) as cluster, Client(cluster.coordinator) as client:
            cluster.wait_registered(client, lambda *_: None)
            browser.open(f"http://{page}/")
            load = Load(client)
            for prompt in SHORT:
                load.send(*prompt)
            load.wait()
            for prompt in LONG:
                load.send(*prompt)
            # Three in flight, each some layers along, with others behind them.
            browser.wait("[...document.querySelectorAll('#maps details')].filter((map) => map.innerText.includes('in flight')" +
                         " && map.querySelectorAll('.cells i[class]').length > 6).length === 3", 120)
            take(browser, output, "busy")
            browser.scheme("light")
            browser.size(NARROW)
            browser.screenshot(output / "page-narrow.png", NARROW, 1700)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        take_all(arguments.bin, arguments.output, Path(folder))
    for path in sorted(arguments.output.glob("page-*.png")):
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
