"""The live page in a real headless Chromium: an empty coordinator, a cluster of CPU processes with prompts in flight, and one
whose coordinator is gone."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

try:
    import grpc
    from headwater import Client, HeadwaterError, PrefillOptions
    from headwater.v1 import worker_pb2, worker_pb2_grpc
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)

from demo_cluster import Cluster, free_ports  # noqa: E402
from page_browser import Browser  # noqa: E402
from small_model import VOCAB, write_model  # noqa: E402

BIN = os.environ.get("HEADWATER_BIN", "")
if not os.access(Path(BIN) / "headwater-coordinator", os.X_OK):
    print(f"SKIPPED: HEADWATER_BIN={BIN} has no headwater-coordinator")
    sys.exit(77)
if shutil.which("chromium") is None:
    print("SKIPPED: chromium is not installed (make deps installs it)")
    sys.exit(77)

LAYERS, TOKENS = 32, 9_000  # a layer takes 0.2 s on quick cores and some seconds on slow ones: the prompt is cancelled
MARKUP = "<img/src=x/onerror=window.pwned=1>"  # a device or a model may be named so
# Of every element that shows text: its colour against the first opaque background below it, by WCAG 2.
CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255).map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const seen = [];
  for (const node of document.body.querySelectorAll('*')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest('noscript, script, style')) continue;
    let under = node;
    while (under && parse(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
    const front = light(parse(getComputedStyle(node).color));
    const back = light(parse(getComputedStyle(under || document.body).backgroundColor));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    seen.push({ ratio, text: node.textContent.slice(0, 40), name: node.className || node.tagName });
  }
  return seen;
})()"""
OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth;
  const out = [...document.body.querySelectorAll('*')].filter((node) => node.checkVisibility() && !node.closest('thead') &&
    node.getBoundingClientRect().right > width + 0.5).map((node) => node.className || node.tagName);
  return { width, scroll: document.documentElement.scrollWidth, out };
})()"""


class PageCase(unittest.TestCase):
    """`browser` and `page` (an address) are the class's."""

    def text(self, element: str) -> str:
        return self.browser.evaluate(f"document.getElementById('{element}').innerText")

    def wait_text(self, element: str, wanted: str, timeout_s: float = 20) -> None:
        self.browser.wait(f"document.getElementById('{element}').innerText.includes({json.dumps(wanted)})", timeout_s)

    def check_contrast(self) -> None:
        backs = set()
        for scheme in ("light", "dark"):
            self.browser.scheme(scheme)
            seen = self.browser.evaluate(CONTRAST)
            backs.add(self.browser.evaluate("getComputedStyle(document.body).backgroundColor"))
            self.assertGreater(len(seen), 20, scheme)
            self.assertEqual([item for item in seen if item["ratio"] < 4.5], [], scheme)
        self.assertEqual(len(backs), 2, "light and dark differ")
        self.browser.scheme("light")

    def check_widths(self) -> None:
        for width in (390, 1280):
            self.browser.size(width)
            found = self.browser.evaluate(OVERFLOW)
            self.assertEqual((found["width"], found["out"]), (width, []))
            self.assertLessEqual(found["scroll"], width)

    def check_silence(self) -> None:
        """Neither errors nor requests to anyone else, since the browser started."""
        self.assertEqual(self.browser.console_errors, [])
        others = [url for url in self.browser.requests
                  if not url.startswith((f"http://{self.page}/", "data:", "about:")) and url != f"http://{self.page}/"]
        self.assertEqual(others, [])
        self.assertIn(f"http://{self.page}/state.json", self.browser.requests)

    def check_no_markup(self, *texts: str) -> None:
        body = self.browser.evaluate("document.body.innerText")
        for text in texts:
            self.assertIn(text, body)
        self.assertEqual(self.browser.evaluate("document.querySelectorAll('img, iframe, object, script[src]').length"), 0)
        self.assertIsNone(self.browser.evaluate("window.pwned === undefined ? null : window.pwned"))


def registration(worker_id: str) -> worker_pb2.ConnectRequest:
    return worker_pb2.ConnectRequest(registration=worker_pb2.WorkerRegistration(
        worker_id=worker_id, incarnation="i", rendezvous_address="127.0.0.1:1", device=MARKUP, policies=["dense"],
        protocol_version=1, memory=worker_pb2.MemoryModel(budget_bytes=10**9, bytes_per_token=1000),
        model=worker_pb2.ServedModel(name="<script>window.pwned=1</script>", fingerprint="f", vocab_size=9, max_position=9,
                                     num_layers=2, num_kv_heads=1, head_dim=8)))


def socket_open(address: str):
    """A connection to an address that a process is about to listen on."""
    end = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(address.split(":"), timeout=1)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


class LonelyTest(PageCase):
    """A coordinator that nobody has registered with."""

    def setUp(self):
        ports = free_ports(2)
        self.listen, self.page = (f"127.0.0.1:{port}" for port in ports)
        # It ends with this process. No preexec_fn: gRPC's threads do not bear a fork.
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", Path(BIN) / "headwater-coordinator", f"--listen={self.listen}", "--metrics=",
             f"--page={self.page}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        with socket_open(self.page):
            pass
        self.browser = self.enterContext(Browser())
        self.browser.size(1280)
        self.browser.open(f"http://{self.page}/")

    def test_it_says_what_it_waits_for_then_who_came_and_then_that_it_is_stale(self):
        self.wait_text("verdict", "Waiting for workers")
        self.assertIn("headwater-worker --coordinator", self.text("start"))
        for section, nothing in (("running", "No request is in flight."), ("workers", "No worker is registered."),
                                 ("waiting", "No request waits."), ("decode_nodes", "No decode node is registered."),
                                 ("maps", "No prompt has reported a layer yet."), ("ended", "No request has ended yet.")):
            self.assertIn(nothing, self.text(section))
        self.check_contrast()
        self.check_widths()

        # A worker whose device and model are markup, and which falls silent at once.
        leave = threading.Event()

        def messages():
            yield registration("quiet-worker")
            leave.wait(60)

        with grpc.insecure_channel(self.listen) as channel:
            stream = worker_pb2_grpc.WorkerControlServiceStub(channel).Connect(messages())
            self.addCleanup(leave.set)
            self.wait_text("workers", "quiet-worker")
            self.wait_text("verdict", "Waiting for a decode node")
            self.check_no_markup(MARKUP, "<script>window.pwned=1</script>")
            self.browser.wait("document.querySelector('#workers .pill.bad')?.innerText === 'silent'", 10)
            self.assertIn("1 worker is silent: quiet-worker", self.text("attention"))
            self.wait_text("attention", "Worker quiet-worker left")
            self.wait_text("verdict", "Not serving: no workers")
            leave.set()
            stream.cancel()
        self.check_silence()

        # It accepts connections and answers none.
        self.process.send_signal(signal.SIGSTOP)
        self.wait_text("stale", "does not answer (no answer in 2.5 s)", 10)
        self.process.send_signal(signal.SIGCONT)
        self.wait_text("verdict", "Not serving: no workers")
        self.assertFalse(self.browser.evaluate("document.getElementById('stale').checkVisibility()"))

        self.process.send_signal(signal.SIGKILL)
        self.wait_text("verdict", "Stale", 10)
        self.assertRegex(self.text("stale"), r"Stale since \d\d:\d\d:\d\d: the coordinator does not answer")
        self.assertIn("quiet-worker left", self.text("attention"), "what was known stays")
        self.check_contrast()


class BusyTest(PageCase):
    """Two workers and a decode node, with one long prompt over both and others that wait behind it."""

    @classmethod
    def setUpClass(cls):
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        model = folder / "model"
        model.mkdir()
        write_model(model, LAYERS)
        cls.page = f"127.0.0.1:{free_ports(1)[0]}"
        cls.cluster = cls.enterClassContext(Cluster(
            Path(BIN), model, folder, 2, compute="f32", coordinator_flags=(f"--page={cls.page}",),
            worker_flags=("--threads=1", "--measure_rates=false")))
        cls.client = cls.enterClassContext(Client(cls.cluster.coordinator))
        cls.cluster.wait_registered(cls.client, lambda *_: None)
        cls.browser = cls.enterClassContext(Browser())
        cls.browser.size(1280)
        cls.browser.open(f"http://{cls.page}/")

    def send(self, name: str, tokens: int, **options) -> threading.Thread:
        def prefill():
            try:
                self.client.prefill([index % (VOCAB - 1) + 1 for index in range(tokens)], request_id=name,
                                    options=replace(PrefillOptions(), **options), timeout_s=120)
                self.ended[name] = "OK"
            except HeadwaterError as error:
                self.ended[name] = error.reason

        thread = threading.Thread(target=prefill)
        thread.start()
        self.addCleanup(thread.join)
        return thread

    def layers_done(self) -> int:
        row = self.browser.evaluate("document.querySelector('#running tbody tr')?.innerText || ''")
        found = re.search(r"(\d+) of %d" % LAYERS, row)
        return int(found[1]) if found else -1

    def test_prompts_in_flight(self):
        self.ended = {}
        self.wait_text("verdict", "Healthy")
        self.assertFalse(self.browser.evaluate("document.getElementById('start').checkVisibility()"))
        threads = [self.send("long-prompt", TOKENS, world_size=2)]
        self.wait_text("running", "long-prompt")
        threads.append(self.send("next-in-line", 500))
        self.wait_text("waiting", "next-in-line")

        cells = "document.querySelectorAll('#maps .cells i[class]').length"
        self.browser.wait(f"{cells} > 0", 60, "cells of the heat map")
        first, layers = self.browser.evaluate(cells), self.layers_done()
        self.assertGreater(layers, 0)
        self.assertLess(layers, LAYERS)
        self.check_in_flight()
        self.check_contrast()
        self.check_widths()
        self.browser.wait(f"{cells} > {first}", 60, "more cells")
        end = time.monotonic() + 60
        while self.layers_done() <= layers:  # those that both ranks have done
            self.assertLess(time.monotonic(), end, f"layers done stay {layers}")
            time.sleep(0.2)

        self.client.cancel("long-prompt")
        for thread in threads:
            thread.join()
        self.assertEqual(self.ended, {"long-prompt": "CANCELLED", "next-in-line": "OK"})
        self.wait_text("ended", "next-in-line")
        self.assertRegex(self.text("ended"), r"long-prompt[^w]+dense\s+CANCELLED")
        self.wait_text("running", "No request is in flight.")
        # What was known of the one, and all layers of the other.
        self.assertGreater(self.browser.evaluate(cells), first + LAYERS)
        self.check_silence()

    def check_in_flight(self) -> None:
        row = self.browser.evaluate("document.querySelector('#running tbody tr').innerText")
        for word in ("9000 tokens", "dense", "running", "w0", "w1", "group of 2", "tok/s", "to decode-0"):
            self.assertIn(word, row)
        workers = self.text("workers")
        for word in ("w0", "w1", "busy", "long-prompt (rank 0 of 2)", "long-prompt (rank 1 of 2)"):
            self.assertIn(word, workers)
        self.assertIn("decode-0", self.text("decode_nodes"))
        self.assertIn("connected", self.text("decode_nodes"))
        labels = self.browser.evaluate("[...document.querySelectorAll('#maps .cells')].map((row) => row.ariaLabel)")
        self.assertRegex(labels[0], r"Density, w\d by layer: mean 100 %, from 100 % to 100 %, \d+ of 32 layers")
        titles = self.browser.evaluate("[...document.querySelectorAll('#maps i[title]')].map((cell) => cell.title)")
        self.assertRegex(next(title for title in titles if title), r"^layer 0: \d+(\.\d)? %$")

    def test_what_the_state_says_is_text(self):
        """Ids that no process may have, put into the answers that the page reads."""
        self.ended = {}
        thread = self.send("shown", 500)
        thread.join()
        self.wait_text("ended", "shown")
        self.browser.evaluate("""(() => {
          const real = window.fetch;
          window.fetch = async (...words) => {
            const state = await (await real(...words)).json();
            const hostile = (id) => id + '"><img src=x onerror="window.pwned=1"><svg/onload=window.pwned=1>';
            for (const list of ['workers', 'decode_nodes', 'ended']) {
              for (const item of state[list].items) item.id = hostile(item.id);
            }
            const map = { first_layer: 0, left_out: false, rows: [
              { name: 'KV head 0', density: [0.5, 0.004, null], recall: [null, 0.8, 0.9991] },
              { name: hostile('KV head 1'), density: [1, 0.08, 1], recall: [] }] };
            for (const item of state.ended.items) Object.assign(item, { tenant: hostile('t'), policy: hostile('p'), map });
            state.lost_workers.items.push({ id: hostile('lost'), why: hostile('why'), ago_s: 1 });
            return new Response(JSON.stringify(state));
          };
        })()""")
        self.wait_text("workers", "w0\"><img src=x")
        self.check_no_markup("w0\"><img src=x", "shown\"><img", "decode-0\"><img", "p\"><img", "lost\"><img", "why\"><img")
        self.check_widths()
        self.check_silence()
        # What a GPU's worker would have told.
        rows = self.browser.evaluate("[...document.querySelectorAll('#maps .row')].map((row) => row.innerText)")
        self.assertIn("KV head 0", rows)
        steps = self.browser.evaluate("""[...document.querySelectorAll('#maps .cells')].slice(-4).map((row) =>
          [...row.children].map((cell) => cell.className).join(' '))""")
        self.assertEqual(steps, ["h7 h0 ", "h9 h4 h9", " r9 r0", "  "])


if __name__ == "__main__":
    unittest.main()
