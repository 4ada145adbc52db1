#!/usr/bin/env python3
"""Writes docs/metrics.md: every metric that the processes export, from the HELP and TYPE lines of a small running cluster.

    make_metrics_table.py --bin build/bin [--output docs/metrics.md]
"""

import argparse
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Metrics

What the processes serve at `/metrics` (flag `--metrics`), as their own HELP and TYPE lines have it; this file is written by
`tools/make_metrics_table.py`. A histogram has series `_bucket`, `_sum` and `_count`; its `le` is not listed. Label values come
from closed sets, never from what a client sends. A metric with a label whose values depend on what happens (`code`, `reason`,
`policy`, `strategy`) has no series before the first event.

`headwater_request_prompt_tokens_count` counts accepted requests; each of them is in `headwater_requests_total`,
`headwater_requests_waiting` or `headwater_requests_running`. Requests that wait for workers or a decode node to register are
waiting, too, and accepted only then.

| metric | type | labels | unit | process | meaning |
|---|---|---|---|---|---|
"""
# Families that workers on GPUs export and those on CPUs do not.
ON_GPUS = (
    "# HELP headwater_attention_recall_ratio Share of dense attention's mass on the keys that were read, mean over sampled "
    "queries, by policy.\n"
    "# TYPE headwater_attention_recall_ratio histogram\n"
    'headwater_attention_recall_ratio_count{policy="headwater"} 0\n'
    "# HELP headwater_attention_fallbacks_total Prompts, layers or groups of heads that read more or less than their policy "
    "asked for.\n"
    "# TYPE headwater_attention_fallbacks_total counter\n"
    'headwater_attention_fallbacks_total{reason="dense_recall"} 0\n')
# Families of programs with --tls_cert.
WITH_CERTIFICATES = (
    "# HELP headwater_tls_certificate_expiry_seconds Unix time at which the certificate in use ends, with --tls_cert.\n"
    "# TYPE headwater_tls_certificate_expiry_seconds gauge\n"
    "# HELP headwater_tls_reload_failures_total Looks at --tls_cert, --tls_key and --tls_ca that found what cannot be used; "
    "what was there before stays in use.\n"
    "# TYPE headwater_tls_reload_failures_total counter\n")
UNITS = (("seconds", r"_seconds$"),
         ("bytes", r"_bytes(_total|_saved_total)?$"), ("0 to 1", r"_ratio$"),
         ("tokens", r"_tokens(_total)?$|^headwater_tokens_"), ("blocks", r"_blocks_total$"), ("tiles", r"_tiles_total$"),
         ("prompts", r"_prompts(_total|_without_checkpoints_total)?$"), ("requests", r"_requests_|_rejections_"))


@dataclass
class Family:
    name: str
    type: str
    meaning: str
    labels: set = field(default_factory=set)
    processes: set = field(default_factory=set)

    def unit(self) -> str:
        return next((unit for unit, pattern in UNITS if re.search(pattern, self.name)), "number")


def read_page(text: str) -> list:
    """The families of a page."""
    families, meanings = [], {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, name, meaning = line.split(" ", 3)
            meanings[name] = meaning
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            families.append(Family(name, kind, meanings[name]))
        elif line.strip():
            families[-1].labels |= set(re.findall(r'(\w+)="', line)) - {"le", "quantile"}
    return families


def merge(pages: list) -> list:
    """The families of several processes' pages, (process, text); one entry for each name and meaning."""
    merged = {}
    for process, text in pages:
        for family in read_page(text):
            entry = merged.setdefault((family.name, family.meaning), family)
            entry.labels |= family.labels
            entry.processes.add(process)
    return [merged[key] for key in sorted(merged)]


def render(families: list) -> str:
    rows = []
    for family in families:
        labels = ", ".join(f"`{label}`" for label in sorted(family.labels))
        processes = ", ".join(sorted(family.processes))
        rows.append(f"| `{family.name}` | {family.type} | {labels} | {family.unit()} | {processes} | {family.meaning} |\n")
    return HEAD + "".join(rows)


def read_table(text: str) -> list:
    """The families that a table has."""
    families = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].startswith("`"):
            families.append(Family(cells[0].strip("`"), cells[1], cells[5], set(re.findall(r"`(\w+)`", cells[2])),
                                   set(cells[4].split(", "))))
    return families


def pages_of(cluster) -> list:
    """(process, text of its page) of every process; workers count as one process."""
    from demo_cluster import read_metrics

    pages = []
    for process in cluster.processes:
        text = read_metrics(process.metrics)
        if text is None:
            raise RuntimeError(f"{process.name} does not answer on {process.metrics}")
        pages.append((process.name.split("-")[0], text))
    return pages


def run(binaries: Path) -> str:
    """The table of a cluster that is started for it."""
    from headwater import Client

    from watch_cluster import send_prompts, small_cluster

    with tempfile.TemporaryDirectory() as state, small_cluster(binaries, Path(state)) as cluster:
        with Client(cluster.coordinator) as client:
            cluster.wait_registered(client, lambda *_: None)
            send_prompts(client)
        time.sleep(2)  # decode nodes write their gauges once a second
        pages = pages_of(cluster)
    pages += [(process, WITH_CERTIFICATES) for process in ("coordinator", "decode", "worker")]
    return render(merge(pages + [("worker", ON_GPUS)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="directory of the programs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "metrics.md")
    arguments = parser.parse_args()
    text = run(arguments.bin)
    arguments.output.write_text(text)
    print(f"{len(read_table(text))} metrics in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
