"""A real Prometheus scrapes a small cluster for 20 seconds, with the rules loaded: targets, pages, counters, the account of
requests, rules."""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import promtool
import yaml
from promtool import ROOT

promtool.need("promtool", "prometheus")

try:
    from demo_cluster import end_with_parent, free_ports, read_metrics
    from headwater import Client
    from make_dashboards import boards
    from watch_cluster import WORKERS, send_prompts, small_cluster
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)

BIN = os.environ.get("HEADWATER_BIN", "")
if not os.access(Path(BIN) / "headwater-coordinator", os.X_OK):
    print(f"SKIPPED: HEADWATER_BIN={BIN} has no headwater-coordinator")
    sys.exit(77)

TRAFFIC_S, REST_S, CLIENTS = 16, 4, 2
SCRAPE_S = 0.5
MOST_SCRAPE_S, MOST_PAGE_BYTES, MOST_SERIES = 0.05, 1 << 20, 2000
# CPUs measure no recall and pack nothing, so that these have no samples here.
ON_GPUS = {"headwater:attention_recall:p10_5m", "headwater:attention_fallbacks:per_prompt15m"}
PANELS_ON_GPUS = {"Attention recall, p10", "Recall, p10", "Recall, mean", "Share of prompts with recall of 0.9 or less",
                  "Fallbacks", "Prompts a packed pass"}
PANELS_OF_TLS = {"Certificates end in"}  # this cluster is plaintext
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Prometheus:
    """The server, configured as deploy/prometheus.yml has it, but for targets and intervals."""

    def __init__(self, folder: Path, targets: dict):
        config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": f"{int(SCRAPE_S * 1000)}ms", "evaluation_interval": "1s"}
        config["rule_files"] = [str(ROOT / "deploy" / file) for file in config["rule_files"]]
        for scrape in config["scrape_configs"]:
            scrape["static_configs"] = [{"targets": targets[scrape["job_name"]]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.log = folder / "prometheus.log"
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address={self.address}", "--log.level=warn"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=end_with_parent)

    def get(self, path: str, **words) -> dict:
        with OPENER.open(f"http://{self.address}{path}?{urllib.parse.urlencode(words)}", timeout=10) as response:
            return json.loads(response.read())["data"]

    def wait_ready(self) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end and self.process.poll() is None:
            try:
                OPENER.open(f"http://{self.address}/-/ready", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"prometheus is not ready after 30 s:\n{self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)

    def values(self, query: str) -> list:
        """(labels, value) of an instant query."""
        return [(sample["metric"], float(sample["value"][1])) for sample in self.get("/api/v1/query", query=query)["result"]]

    def samples(self, selector: str) -> list:
        """(labels, [(time, value)]) of all raw samples."""
        return [(row["metric"], [(at, float(value)) for at, value in row["values"]])
                for row in self.get("/api/v1/query", query=f"{selector}[10m]")["result"]]


def send_for(address: str, seconds: float) -> Counter:
    """How the prompts of some clients, sent for that long, ended."""
    ended, end = [], time.monotonic() + seconds

    def send() -> None:
        with Client(address) as client:
            while time.monotonic() < end:
                ended.append(send_prompts(client))

    threads = [threading.Thread(target=send) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(ended, Counter())


class PrometheusTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.cluster = cls.enterClassContext(small_cluster(Path(BIN), Path(folder.name)))
        targets = defaultdict(list)
        for process in cls.cluster.processes:
            targets["headwater-" + process.name.split("-")[0]].append(process.metrics)
        cls.prometheus = Prometheus(Path(folder.name), targets)
        cls.addClassCleanup(cls.prometheus.stop)
        cls.prometheus.wait_ready()
        with Client(cls.cluster.coordinator) as client:
            cls.cluster.wait_registered(client, lambda *_: None)
        cls.ended = send_for(cls.cluster.coordinator, TRAFFIC_S)
        time.sleep(REST_S)
        cls.cluster.check_alive()

    def test_all_targets_are_up(self):
        up = self.prometheus.samples('up{job=~"headwater.*"}')
        self.assertEqual(len(up), WORKERS + 2)
        for labels, samples in up:
            self.assertGreater(len(samples), (TRAFFIC_S + REST_S) / SCRAPE_S / 2, labels)
        # A process may be scraped before it listens; from its first answer on it answers always.
        for labels, samples in up:
            values = [value for _, value in samples]
            self.assertNotIn(0, values[values.index(1):], labels)

    def test_scrapes_are_quick(self):
        taken = sorted(value for _, samples in self.prometheus.samples('scrape_duration_seconds{job=~"headwater.*"}')
                       for _, value in samples)
        p99 = taken[math.ceil(0.99 * len(taken)) - 1]
        print(f"{len(taken)} scrapes: p50 {1e3 * taken[len(taken) // 2]:.1f} ms, p99 {1e3 * p99:.1f} ms, "
              f"longest {1e3 * taken[-1]:.1f} ms", file=sys.stderr)
        self.assertLessEqual(p99, MOST_SCRAPE_S, f"p99 of scrape_duration_seconds, limit {MOST_SCRAPE_S} s")

    def test_pages_are_small_and_promtool_accepts_them(self):
        for process in self.cluster.processes:
            page = read_metrics(process.metrics)
            self.assertIsNotNone(page, process.name)
            self.assertLessEqual(len(page.encode()), MOST_PAGE_BYTES, f"bytes of {process.name}'s page")
            status, output = promtool.promtool("check", "metrics", stdin=page)
            self.assertEqual(status, 0, f"{process.name}: {output}")
        most = max(value for _, value in self.prometheus.values('scrape_samples_scraped{job=~"headwater.*"}'))
        print(f"largest page: {most:.0f} series", file=sys.stderr)
        self.assertLessEqual(most, MOST_SERIES, "series of one process")

    def test_counters_never_fall(self):
        counted = 0
        for labels, samples in self.prometheus.samples('{__name__=~"headwater_.+_(total|count|bucket|sum)"}'):
            values = [value for _, value in samples]
            self.assertEqual(values, sorted(values), labels)
            counted += values[-1] > values[0]
        self.assertGreater(counted, 100, "series that rose")

    def account(self) -> list:
        """(accepted, ended, in flight) at each scrape of the coordinator."""
        parts = {}
        for part, name in (("accepted", "headwater_request_prompt_tokens_count"), ("ended", "headwater_requests_total"),
                           ("flight", "headwater_requests_(waiting|running)")):
            parts[part] = Counter()
            for _, samples in self.prometheus.samples(f'{{__name__=~"{name}"}}'):
                for at, value in samples:
                    parts[part][at] += value
        return [(parts["accepted"][at], parts["ended"][at], parts["flight"][at]) for at in sorted(parts["accepted"])]

    def test_accepted_requests_have_ended_or_are_in_flight(self):
        account = self.account()
        self.assertGreater(len(account), 20)
        self.assertTrue(any(flight for _, _, flight in account), "no scrape met a request in flight")
        for accepted, ended, flight in account:
            # A page is not of one instant: each client may have gone on by one request while it was written.
            self.assertLessEqual(abs(accepted - ended - flight), CLIENTS,
                                 f"{accepted} accepted, {ended} ended, {flight} in flight")
        accepted, ended, flight = account[-1]
        self.assertEqual((accepted, flight), (ended, 0), "accepted and in flight at rest")

    def test_the_service_counts_what_the_clients_saw(self):
        counted = Counter()
        for labels, value in self.prometheus.values("headwater_requests_total"):
            counted[labels["code"], labels.get("reason", "")] += value
        self.assertEqual(counted, {key: count for key, count in self.ended.items() if key[0] in ("OK", "DEADLINE_EXCEEDED")})
        refused = Counter({labels["reason"]: value for labels, value in self.prometheus.values("headwater_rejections_total")})
        self.assertEqual(refused, {key[1]: count for key, count in self.ended.items()
                                   if key[0] in ("INVALID_ARGUMENT", "NOT_FOUND")})
        self.assertGreater(counted["OK", ""], 10)
        self.assertEqual(sum(counted.values()) + sum(refused.values()), sum(self.ended.values()))

    def test_the_cluster_is_empty_at_rest(self):
        for name in ("headwater_kv_unacked_bytes", "headwater_planned_bytes", "headwater_sessions",
                     "headwater_tokens_running", "headwater_tokens_waiting", "headwater_worker_last_step_age_seconds"):
            values = self.prometheus.values(name)
            self.assertTrue(values, name)
            self.assertEqual([value for _, value in values], [0] * len(values), name)

    def test_rules_are_evaluated(self):
        loaded = [rule for group in self.prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        self.assertEqual(len(loaded), len(promtool.rules()))
        for rule in loaded:
            self.assertEqual((rule["health"], rule.get("lastError", "")), ("ok", ""), rule["name"])

    def test_boards_show_values(self):
        empty = set()
        for board in boards().values():
            for panel in json.loads(board)["panels"]:
                for target in panel.get("targets", []):
                    query = target["expr"].replace("$__rate_interval", "1m")
                    query = query.replace("$job", "headwater.*").replace("$instance", ".*").replace("$policy", ".*")
                    self.assertNotIn("$", query)
                    if not any(math.isfinite(value) for _, value in self.prometheus.values(query)):
                        empty.add(panel["title"])
        self.assertEqual(empty, PANELS_ON_GPUS | PANELS_OF_TLS, "panels with a query that has no value, and those of GPUs and TLS")

    def test_queries_of_the_runbook_are_evaluated(self):
        for query in promtool.runbook_queries():
            with self.subTest(query):
                self.prometheus.values(query)

    def test_recording_rules_return_values(self):
        for rule in promtool.rules():
            if "record" in rule and rule["record"] not in ON_GPUS:
                values = [value for _, value in self.prometheus.values(rule["record"])]
                self.assertTrue(values, f"{rule['record']} has no sample")
                self.assertTrue(any(math.isfinite(value) for value in values), f"{rule['record']}: {values}")
        (_, ratio), = self.prometheus.values("headwater:request_errors:ratio5m")
        self.assertAlmostEqual(ratio, 0.2, delta=0.1, msg="one of five accepted requests fails")


if __name__ == "__main__":
    unittest.main()
