#!/usr/bin/env python3
"""Writes the Grafana boards deploy/dashboards/*.json. Their panels are the tables below.

    make_dashboards.py [--output DIR]
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "deploy" / "dashboards"
ERRORS = "ABORTED|DATA_LOSS|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|UNAVAILABLE|UNKNOWN"
WIDTH, HEIGHT, STAT_HEIGHT = 24, 8, 4
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass
class Panel:
    title: str
    unit: str
    metric: str  # what the description names
    without: str  # what is not counted
    queries: list  # (expression, legend)
    kind: str = "timeseries"
    width: int = 8


def of(metric: str, *matchers: str) -> str:
    """A selector with the board's variables."""
    return metric + "{" + ",".join(['job=~"$job"', 'instance=~"$instance"', *matchers]) + "}"


def rate(metric: str, *matchers: str) -> str:
    return f"rate({of(metric, *matchers)}[$__rate_interval])"


def total(by: str, metric: str, *matchers: str) -> str:
    return f"sum by ({by}) ({rate(metric, *matchers)})" if by else f"sum({rate(metric, *matchers)})"


def quantile(share: float, by: str, metric: str, *matchers: str) -> str:
    return f"histogram_quantile({share}, {total(', '.join(filter(None, [by, 'le'])), metric + '_bucket', *matchers)})"


def mean(by: str, metric: str, *matchers: str) -> str:
    return f"{total(by, metric + '_sum', *matchers)} / {total(by, metric + '_count', *matchers)}"


def quantiles(metric: str, *matchers: str) -> list:
    return [(quantile(share, "", metric, *matchers), name) for share, name in ((.5, "p50"), (.9, "p90"), (.99, "p99"))]


ENDED, READY = "headwater_requests_total", "headwater_time_to_kv_ready_seconds"
TOKENS, PROMPTS = "headwater_prompt_tokens_total", "headwater_request_prompt_tokens"
DENSITY, RECALL = "headwater_attention_density_ratio", "headwater_attention_recall_ratio"
FALLBACKS, LAYER = "headwater_attention_fallbacks_total", "headwater_worker_layer_seconds"
EGRESS, ACK, BLOCKS = "headwater_kv_egress_bytes_total", "headwater_kv_egress_ack_seconds", "headwater_kv_egress_blocks_total"
COLLECTIVE = "headwater_collective_seconds"
COMPUTED, BY_WORKERS, BY_POLICY = 'source="computed"', 'source=""', 'policy=~"$policy"'
UNMEASURED = "prompts whose recall was not measured, and keys that means stand for"

SERVICE = {
    "Traffic": [
        Panel("Requests", "reqps", ENDED, "requests that run, and those refused before they were accepted",
              [(total("", ENDED), "all")], "stat", 6),
        Panel("Errors", "percentunit", ENDED, "cancelled requests, mistakes of the client, and refused requests",
              [(f"(sum({rate(ENDED, f'code=~`{ERRORS}`')}) or vector(0)) / {total('', ENDED)}", "errors")], "stat", 6),
        Panel("Prompt tokens a second", "short", TOKENS, "prompts that run or failed",
              [(total("", TOKENS, COMPUTED), "tokens")], "stat", 6),
        Panel("Time to KV ready, p99", "s", READY, "requests that failed, and the client's own way to the service",
              [(quantile(.99, "", READY, 'stage="total"'), "p99")], "stat", 6),
        Panel("Requests ended", "reqps", ENDED, "requests refused before they were accepted",
              [(total("code, reason", ENDED), "{{code}} {{reason}}")]),
        Panel("Requests refused", "reqps", "headwater_rejections_total", "requests that were accepted, whatever became of them",
              [(total("reason", "headwater_rejections_total"), "{{reason}}")]),
        Panel("Prompt lengths", "short", PROMPTS, "prompts that were refused", quantiles(PROMPTS)),
        Panel("Time to KV ready", "s", READY, "requests that failed", quantiles(READY, 'stage="total"'), width=12),
        Panel("Time to KV ready by stage, p99", "s", READY,
              "requests that failed; the stages' p99 are not of the same requests",
              [(quantile(.99, "stage", READY, 'stage!="total"'), "{{stage}}")], width=12)],
    "Queue": [
        Panel("Seconds of work that wait", "s", "headwater_tokens_waiting",
              "prompts that run; the rate is that of completed prompts, one token a second where none was completed",
              [(f"sum({of('headwater_tokens_waiting')}) / clamp_min({total('', TOKENS, COMPUTED)}, 1)", "queue")]),
        Panel("Requests", "short", "headwater_requests_waiting", "requests that have ended",
              [(f"sum({of('headwater_requests_waiting')})", "waiting"),
               (f"sum({of('headwater_requests_running')})", "running")]),
        Panel("Prompt tokens", "short", "headwater_tokens_waiting", "how much of a running prompt is done",
              [(f"sum({of('headwater_tokens_waiting')})", "waiting"), (f"sum({of('headwater_tokens_running')})", "running")]),
        Panel("Time in the queue", "s", READY, "requests that still wait, or failed", quantiles(READY, 'stage="queue"'),
              width=24)],
    "Prefill compute": [
        Panel("Tokens a second of each worker", "short", TOKENS, "ranks that have not completed",
              [(total("instance", TOKENS, BY_WORKERS), "{{instance}}")]),
        Panel("Attention density, mean", "percentunit", DENSITY, "how long the prompts were: each counts once",
              [(mean("policy", DENSITY, 'policy!=""'), "{{policy}}")]),
        Panel("Attention recall, p10", "percentunit", RECALL, UNMEASURED,
              [(quantile(.1, "policy", RECALL), "{{policy}}")])],
    "KV egress": [
        Panel("KV sent", "GBs", EGRESS, "blocks that are not acknowledged yet, and frames around them",
              [(f"{total('instance', EGRESS)} / 1e9", "{{instance}}")]),
        Panel("Acknowledged after, p99", "s", ACK, "blocks that were never acknowledged",
              [(quantile(.99, "instance", ACK), "{{instance}}")]),
        Panel("Unacknowledged", "bytes", "headwater_kv_unacked_bytes", "KV that is computed and not sent yet",
              [(of("headwater_kv_unacked_bytes"), "{{instance}}")]),
        Panel("Sent again", "short", BLOCKS, "blocks sent once", [
            (total("", BLOCKS, 'result!="acked"'), "blocks a second"),
            (total("", "headwater_kv_stream_resumes_total"), "streams resumed a second")], width=12),
        Panel("Blocks received, by result", "short", "headwater_kv_ingress_blocks_total", "blocks that never arrived",
              [(total("result", "headwater_kv_ingress_blocks_total"), "{{result}}")], width=12)],
    "Leases and sessions": [
        Panel("Sessions", "short", "headwater_sessions", "caches that were released", [
            (of("headwater_sessions"), "{{instance}}"), (of("headwater_decode_generations"), "generations {{instance}}")]),
        Panel("KV memory used", "percentunit", "headwater_kv_pool_usage_ratio", "memory of the process beside its KV",
              [(of("headwater_kv_pool_usage_ratio"), "{{instance}}")]),
        Panel("Leases ended, an hour", "short", "headwater_lease_expired_total", "caches that clients released",
              [(f"increase({of('headwater_lease_expired_total')}[1h])", "{{instance}}")]),
        Panel("KV memory by state", "bytes", "headwater_kv_pool_bytes", "what the file system takes besides",
              [(f"sum by (state) ({of('headwater_kv_pool_bytes')})", "{{state}}")], width=12),
        Panel("Tokens generated a second", "short", "headwater_decode_tokens_total", "tokens of other decode engines",
              [(total("instance", "headwater_decode_tokens_total"), "{{instance}}")], width=12)],
    "Workers and collectives": [
        Panel("Registered", "short", "headwater_workers", "processes that run and are not registered", [
            (f"sum({of('headwater_workers')})", "workers"), (f"sum({of('headwater_decode_nodes')})", "decode nodes")]),
        Panel("Age of the last step", "s", "headwater_worker_last_step_age_seconds", "workers that are not connected to the "
              "coordinator: theirs stands still", [(of("headwater_worker_last_step_age_seconds"), "{{instance}}")]),
        Panel("Epochs, an hour", "short", "headwater_retries_total", "prompts that failed in their last epoch", [
            (f"sum(increase({of('headwater_retries_total')}[1h]))", "given up"),
            (f"sum(increase({of('headwater_resumed_epochs_total')}[1h]))", "went on from a checkpoint"),
            (f"sum(increase({of('headwater_lost_checkpoints_total')}[1h]))", "lost a checkpoint")]),
        Panel("Collective waits, p99", "s", COLLECTIVE, "waits that were broken off",
              [(quantile(.99, "op", COLLECTIVE), "{{op}}")], width=12),
        Panel("Groups given up, an hour", "short", "headwater_collective_aborts_total", "prompts of one worker",
              [(f"increase({of('headwater_collective_aborts_total')}[1h])", "{{instance}}")], width=12)],
    "Process": [
        Panel("Up", "short", "up", "processes that are no target", [(of("up"), "{{job}} {{instance}}")]),
        Panel("Scrapes take", "s", "scrape_duration_seconds", "scrapes that Prometheus gave up at its timeout",
              [(of("scrape_duration_seconds"), "{{instance}}")]),
        Panel("Series a page", "short", "scrape_samples_scraped", "series that Prometheus adds itself",
              [(of("scrape_samples_scraped"), "{{instance}}")]),
        Panel("CPU", "short", "process_cpu_seconds_total", "time of GPUs", [(f"rate({of('process_cpu_seconds_total')}[$__rate_interval])", "{{instance}}")]),
        Panel("Resident memory", "bytes", "process_resident_memory_bytes", "device memory, files in a tmpfs that are not mapped",
              [(of("process_resident_memory_bytes"), "{{instance}}")]),
        Panel("File descriptors of the most", "percentunit", "process_open_fds", "limits of the whole machine",
              [(f"{of('process_open_fds')} / {of('process_max_fds')}", "{{instance}}")]),
        Panel("Certificates end in", "s", "headwater_tls_certificate_expiry_seconds", "processes in plaintext",
              [(f"{of('headwater_tls_certificate_expiry_seconds')} - time()", "{{instance}}")]),
        Panel("Versions", "short", "headwater_build_info", "processes that do not answer",
              [(f"count by (version, component) ({of('headwater_build_info')})", "{{component}} {{version}}")], "stat", 16)],
}

WORKERS = {
    "Layers": [
        Panel("Time of a layer, mean", "s", LAYER, "the first token's last steps, which belong to no layer",
              [(mean("stage", LAYER), "{{stage}}")]),
        Panel("Share of the time, by stage", "percentunit", LAYER, "time in which a worker was idle",
              [(f"{total('stage', LAYER + '_sum')} / on () group_left {total('', LAYER + '_sum')}", "{{stage}}")]),
        Panel("Time of a layer, p99", "s", LAYER, "layers that were broken off",
              [(quantile(.99, "stage", LAYER), "{{stage}}")]),
        Panel("Tokens a second", "short", TOKENS, "ranks that have not completed",
              [(total("instance", TOKENS, BY_WORKERS), "{{instance}}")]),
        Panel("Assignments ended", "reqps", "headwater_worker_prefills_total", "assignments under way",
              [(total("code", "headwater_worker_prefills_total"), "{{code}}")]),
        Panel("Prompts a packed pass", "short", "headwater_worker_pass_prompts", "prompts that shared no pass",
              quantiles("headwater_worker_pass_prompts"))],
    "Density": [
        Panel("Density, mean", "percentunit", DENSITY, "how long the prompts were: each counts once",
              [(mean("policy", DENSITY, BY_POLICY), "{{policy}}")]),
        Panel("Density, median", "percentunit", DENSITY, "how long the prompts were: each counts once",
              [(quantile(.5, "policy", DENSITY, BY_POLICY), "{{policy}}")]),
        Panel("Density, p90", "percentunit", DENSITY, "how long the prompts were: each counts once",
              [(quantile(.9, "policy", DENSITY, BY_POLICY), "{{policy}}")]),
        Panel("Prompts, by policy", "reqps", DENSITY, "prompts that failed; a prompt counts once for each of its ranks",
              [(total("policy", DENSITY + "_count", BY_POLICY), "{{policy}}")], width=12),
        Panel("Tiles without room for their list", "short", "headwater_worker_search_overflow_tiles_total",
              "tiles that are dense for another reason",
              [(total("instance", "headwater_worker_search_overflow_tiles_total"), "{{instance}} a second")], width=12)],
    "Recall": [
        Panel("Recall, mean", "percentunit", RECALL, UNMEASURED,
              [(mean("policy", RECALL, BY_POLICY), "{{policy}}")]),
        Panel("Recall, p10", "percentunit", RECALL, UNMEASURED,
              [(quantile(.1, "policy", RECALL, BY_POLICY), "{{policy}}")]),
        Panel("Share of prompts with recall of 0.9 or less", "percentunit", RECALL, "prompts whose recall was not measured",
              [(f"{total('policy', RECALL + '_bucket', BY_POLICY, 'le=~`0.9`')} / "
                f"{total('policy', RECALL + '_count', BY_POLICY)}", "{{policy}}")]),
        Panel("Fallbacks", "short", FALLBACKS,
              "how large a part of the prompt each concerns: a prompt, a layer or a group of heads",
              [(total("reason", FALLBACKS), "{{reason}} a second")], width=24)],
    "Exchange and checkpoints": [
        Panel("K and V received from other ranks", "Bps", "headwater_exchange_bytes_total", "KV sent to decode nodes",
              [(total("strategy", "headwater_exchange_bytes_total"), "{{strategy}}")]),
        Panel("Spared by not gathering all", "Bps", "headwater_exchange_bytes_saved_total", "what strategy allgather receives",
              [(total("", "headwater_exchange_bytes_saved_total"), "saved")]),
        Panel("Collective waits, mean", "s", COLLECTIVE, "waits that were broken off", [(mean("op", COLLECTIVE), "{{op}}")]),
        Panel("Checkpoints in memory", "bytes", "headwater_worker_checkpoint_bytes", "checkpoints on a GPU",
              [(of("headwater_worker_checkpoint_bytes"), "{{instance}}")]),
        Panel("Prompts without checkpoints, an hour", "short", "headwater_worker_prompts_without_checkpoints_total",
              "prompts of one worker, which need none",
              [(f"increase({of('headwater_worker_prompts_without_checkpoints_total')}[1h])", "{{instance}}")]),
        Panel("Epoch", "short", "headwater_worker_epoch", "epochs of other workers' prompts",
              [(of("headwater_worker_epoch"), "{{instance}}")])],
    "Memory and egress": [
        Panel("Memory planned, of the budget", "percentunit", "headwater_planned_bytes",
              "the weights, which are part of the budget",
              [(f"{of('headwater_planned_bytes')} / {of('headwater_memory_budget_bytes')}", "{{instance}}")]),
        Panel("Waits for a decode node, share of the time", "percentunit", LAYER, "the tail after the last layer",
              [(total("instance", LAYER + "_sum", 'stage="egress_stall"'), "{{instance}}")]),
        Panel("Blocks sent, by result", "short", BLOCKS, "blocks that are not acknowledged yet",
              [(total("result", BLOCKS), "{{result}}")])],
}


def variable(name: str, query: str) -> dict:
    return {"name": name, "label": name, "type": "query", "datasource": DATASOURCE, "query": {"query": query, "refId": name},
            "definition": query, "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}


def make_panel(panel: Panel, number: int, x: int, y: int, height: int) -> dict:
    thresholds = {"mode": "absolute", "steps": [{"color": "green", "value": None}]}
    if panel.title == "Errors":
        thresholds["steps"] += [{"color": "orange", "value": 0.01}, {"color": "red", "value": 0.05}]
    silent = [{"type": "special", "options": {"match": "nan", "result": {"text": "No traffic", "index": 0}}}]
    options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value"}
    if panel.kind == "timeseries":
        options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}, "tooltip": {"mode": "multi"}}
    return {"id": number, "type": panel.kind, "title": panel.title, "datasource": DATASOURCE,
            "description": f"`{panel.metric}`. Not counted: {panel.without}.",
            "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
            "fieldConfig": {"overrides": [], "defaults": {"unit": panel.unit, "noValue": "No traffic", "mappings": silent,
                                                          "thresholds": thresholds}},
            "options": options,
            "targets": [{"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expression.replace("`", '"'),
                         "legendFormat": legend} for index, (expression, legend) in enumerate(panel.queries)]}


def make_board(uid: str, title: str, rows: dict, more: list) -> dict:
    panels, y = [], 0
    for row, content in rows.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        x, y, height = 0, y + 1, 0
        for panel in content:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            height = STAT_HEIGHT if panel.kind == "stat" else HEIGHT
            panels.append(make_panel(panel, len(panels) + 1, x, y, height))
            x += panel.width
        y += height
    variables = [{"name": "datasource", "label": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1},
                 variable("job", "label_values(headwater_build_info, job)"),
                 variable("instance", 'label_values(headwater_build_info{job=~"$job"}, instance)'), *more]
    return {"uid": uid, "title": title, "tags": ["headwater"], "schemaVersion": 38, "version": 1, "editable": True,
            "graphTooltip": 1, "refresh": "30s", "time": {"from": "now-1h", "to": "now"}, "timezone": "",
            "templating": {"list": variables},
            "links": [{"type": "dashboards", "title": "Headwater", "tags": ["headwater"], "asDropdown": False,
                       "includeVars": True, "keepTime": True}],
            "annotations": {"list": []}, "panels": panels}


def boards() -> dict:
    """File name -> text of each board."""
    policy = variable("policy", f'label_values({DENSITY}_count{{job=~"$job",policy!=""}}, policy)')
    made = {"service.json": make_board("headwater-service", "Headwater: service", SERVICE, []),
            "workers.json": make_board("headwater-workers", "Headwater: workers and attention", WORKERS, [policy])}
    return {name: json.dumps(board, indent=1) + "\n" for name, board in made.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in boards().items():
        (folder / name).write_text(text)
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
