#!/usr/bin/env python3
"""Kills, or stops, one worker of a group in the middle of a prompt, again and again, and checks that the prompt survives it.

    group_faults.py --bin DIR --model DIR --tokens 131072 --devices cuda:0 cuda:1 --times 20 --output rows.jsonl
    group_faults.py --bin build/release/bin --model DIR --tokens 3000 --devices cpu cpu --times 3 --kill stop \\
        --worker_flags="--threads=1 --checkpoint_layers=4 --measure_rates=false"

It starts a coordinator, a decode node with --sink=verify and one worker a device, and prefills random tokens twice without a
disturbance. Then, each time: the same prompt; a random worker is disturbed once a random layer is done (two times the same
layer, so that there are digests to compare); the others must give the epoch up within --abort_limit_s (with --kill=stop: that
after --collective_timeout; the coordinator misses heartbeats after 3.5 s), and the prompt must end in one more epoch on them,
from a checkpoint, with the same first token. All KV digests of prompts that went on from the same layer with as many ranks
must be equal; of those that began anew, also to that of an undisturbed prompt on as many. Nothing of the disturbed worker may
be left, and its GPU's memory must be what it was before. Exit status 1 where a check fails: it is named, and so is the folder
of the logs.
"""

import argparse
import datetime
import json
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo_cluster import ClusterError
from group_faults_cluster import DeviceMemory, FaultCluster, device_name, read_abort

ROOT = Path(__file__).resolve().parent.parent
# Layers between the end of a checkpoint's exchange and its report by every rank, with the KV below it acknowledged.
REPORT_LAYERS = 3
DEVICE_SLACK_MIB = 64
DEVICE_LIMIT_S = 15


class Usage(Exception):
    """The arguments cannot be used; the message says which and why."""


class Missed(Exception):
    """The prompt was quicker than the disturbance."""


def parse_arguments(words: list) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="folder of the headwater programs")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--tokens", type=int, required=True, help="length of the prompt")
    parser.add_argument("--devices", nargs="+", default=["cpu", "cpu"], help="of the workers: cpu, or cuda:N (cpu cpu)")
    parser.add_argument("--times", type=int, default=20, help="disturbed prompts (20)")
    parser.add_argument("--policy", default="dense", help="attention policy (dense)")
    parser.add_argument("--kill", choices=("kill", "stop"), default="kill", help="SIGKILL, or SIGSTOP (kill)")
    parser.add_argument("--checkpoint_layers", type=int, default=8, help="of the workers (8)")
    parser.add_argument("--collective_timeout", type=float, default=30, help="of the workers, in seconds (30)")
    parser.add_argument("--worker_flags", default="", help="more flags of the workers, in one word")
    parser.add_argument("--submit_flags", default="", help="more flags of `headwater submit`, in one word")
    parser.add_argument("--seed", type=int, default=1, help="of tokens, workers and moments (1)")
    parser.add_argument("--abort_limit_s", type=float, default=5, help="from a kill until the epoch is given up (5)")
    parser.add_argument("--limit_s", type=float, default=300, help="of each prompt (300)")
    parser.add_argument("--start_limit_s", type=float, default=180, help="until processes are registered (180)")
    parser.add_argument("--logs", type=Path, help="folder of the logs, kept; else a new one, kept where a check fails")
    parser.add_argument("--output", type=Path, help="file that the row is added to; it is printed in any case")
    parser.add_argument("--commit", default="", help="for the row, where the checkout has no git history")
    arguments = parser.parse_args(words)
    arguments.worker_words = worker_words(arguments)
    check(arguments)
    return arguments


def worker_words(arguments: argparse.Namespace) -> list:
    """The workers' flags; of the two that this script must know, --worker_flags counts."""
    words = shlex.split(arguments.worker_flags)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--checkpoint_layers":
            if not value.isdigit():
                raise Usage(f"--worker_flags: {word}: want --checkpoint_layers=N")
            arguments.checkpoint_layers = int(value)
        if name == "--collective_timeout":
            found = re.fullmatch(r"([0-9.]+)(ms|s|m)", value)
            if not found:
                raise Usage(f"--worker_flags: {word}: want one number of ms, s or m, such as 30s")
            arguments.collective_timeout = float(found[1]) * {"ms": 1e-3, "s": 1, "m": 60}[found[2]]
    own = ("--checkpoint_layers", "--collective_timeout")
    words = [word for word in words if not word.startswith(tuple(f"{name}=" for name in own))]
    return words + [f"--checkpoint_layers={arguments.checkpoint_layers}",
                    f"--collective_timeout={arguments.collective_timeout:g}s"]


def check(arguments: argparse.Namespace) -> None:
    if len(arguments.devices) < 2:
        raise Usage(f"--devices: {len(arguments.devices)} given, a group has at least 2")
    for device in arguments.devices:
        if not re.fullmatch(r"cpu|cuda:[0-9]+", device):
            raise Usage(f"--devices: {device!r} is neither cpu nor cuda:N")
    if len({device[:3] for device in arguments.devices}) > 1:
        raise Usage("--devices: a group is of CPUs or of GPUs, not of both")
    for name in ("tokens", "times"):
        if getattr(arguments, name) < 1:
            raise Usage(f"--{name}={getattr(arguments, name)}: want at least 1")
    if not (arguments.model / "config.json").is_file():
        raise Usage(f"--model: {arguments.model} has no config.json")
    arguments.model = arguments.model.resolve()
    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    arguments.layers, arguments.vocab = config["num_hidden_layers"], config["vocab_size"]
    if arguments.layers < 3:
        raise Usage(f"--model: {arguments.layers} layers, at least 3 are needed to disturb a prompt between them")


def report_layers(arguments: argparse.Namespace) -> int:
    """Layers from the one that a checkpoint is of to its report: on GPUs it leaves a slice a layer (CheckpointSlices())."""
    on_gpus = arguments.devices[0].startswith("cuda")
    return REPORT_LAYERS + (max(1, min(8, arguments.checkpoint_layers - 2)) if on_gpus else 1)


def moments(layers: int, checkpoint_layers: int, reported_after: int = REPORT_LAYERS + 1) -> tuple:
    """First and last number of layers done to disturb at. From the first on a checkpoint has been reported, unless layers are
    too few; at the last there is work left."""
    last = layers - 1 - layers // 8
    first = checkpoint_layers + reported_after
    return (first if 0 < checkpoint_layers and first <= last else 1), last


def judge(run: dict, undisturbed: dict, arguments: argparse.Namespace) -> list:
    """What is wrong with a disturbed prompt, as sentences."""
    problems = []

    def want(good: bool, text: str) -> None:
        if not good:
            problems.append(f"run {run['run']}: {text}")

    if run["error"]:
        return [f"run {run['run']}: {run['error']}"]
    limit = arguments.abort_limit_s + (arguments.collective_timeout if arguments.kill == "stop" else 0)
    want(run["retries"] == 1, f"{run['retries']} epochs given up, want 1")
    want(run["world_size"] == len(arguments.devices) - 1,
         f"ended on {run['world_size']} workers, want {len(arguments.devices) - 1}")
    want(run["first_token"] == undisturbed["first_token"],
         f"first token {run['first_token']}, undisturbed {undisturbed['first_token']}")
    want(run["abort_s"] is not None, "the coordinator's log names no rank that was given up")
    want(run["abort_s"] is None or run["abort_s"] <= limit,
         f"given up after {run['abort_s'] or 0:.2f} s, the limit is {limit:g} s")
    if 0 < arguments.checkpoint_layers <= run["disturbed_at_layer"] - report_layers(arguments):
        want(run["resume_layer"] >= arguments.checkpoint_layers,
             f"began anew at layer {run['resume_layer']}; it was disturbed at layer {run['disturbed_at_layer']}, "
             f"the first checkpoint is of layer {arguments.checkpoint_layers}")
    want(run["buried"], "processes of the disturbed worker are left")
    over = run["device_mib_over"]
    want(over is None or over <= DEVICE_SLACK_MIB,
         f"{over} MiB of the disturbed worker's GPU are still in use, the limit is {DEVICE_SLACK_MIB}")
    return problems


def compare_digests(runs: list, references: dict) -> tuple:
    """Completed runs by where they went on, "layer/ranks" -> count, and sentences about digests that differ. references: of
    undisturbed prompts, by ranks."""
    first, counts, problems = {(0, ranks): digest for ranks, digest in references.items()}, {}, []
    for run in runs:
        if run["error"]:
            continue
        key = (run["resume_layer"], run["world_size"])
        name = f"{key[0]}/{key[1]}"
        counts[name] = counts.get(name, 0) + 1
        if first.setdefault(key, run["digest"]) != run["digest"]:
            problems.append(f"run {run['run']}: digest {run['digest']} from layer {key[0]} on with {key[1]} ranks, "
                            f"others have {first[key]}")
    return counts, problems


class Faults:
    def __init__(self, cluster: FaultCluster, tokens: Path, memory: DeviceMemory, arguments: argparse.Namespace):
        self._cluster, self._tokens, self._memory, self._arguments = cluster, tokens, memory, arguments
        self._random = random.Random(f"faults {arguments.seed}")
        self._layer = 0
        self._flags = [f"--policy={arguments.policy}", *shlex.split(arguments.submit_flags)]

    def _end(self) -> float:
        return time.monotonic() + self._arguments.limit_s

    def undisturbed(self, name: str, world_size: int, *flags: str) -> dict:
        with self._cluster.submit(self._tokens, name, world_size, *self._flags, *flags) as prompt:
            result = prompt.wait_for(lambda event: False, self._end(), "the result")
        if result["plan"]["world_size"] != world_size or result["retries"]:
            raise ClusterError(f"{name}: {result['plan']['world_size']} workers and {result['retries']} epochs given up, "
                               f"want {world_size} and none")
        return result

    def disturbed(self, number: int) -> dict:
        """One disturbed prompt, after which the worker is there again."""
        arguments = self._arguments
        # The same for two in a row, so that there are digests to compare.
        if number % 2 == 1:
            self._layer = self._random.randint(*moments(arguments.layers, arguments.checkpoint_layers, report_layers(arguments)))
        layer = self._layer
        victim = self._random.randrange(len(arguments.devices))
        run = {"run": number, "worker": f"w{victim}", "disturbed_at_layer": layer, "error": "", "missed": False,
               "device_mib_over": None}
        try:
            self._disturb(run, victim)
        except Missed as error:
            run["missed"], run["error"] = True, str(error)
        except ClusterError as error:
            run["error"] = str(error)
        # Also where the prompt failed: the next one needs all workers.
        run["buried"] = self._cluster.bury(victim)
        if arguments.devices.count(arguments.devices[victim]) == 1:
            run["device_mib_over"] = self._memory.wait_free([victim], DEVICE_SLACK_MIB, DEVICE_LIMIT_S)
        self._cluster.start_worker(victim)
        self._cluster.wait_complete()
        return run

    def _disturb(self, run: dict, victim: int) -> None:
        request_id = f"fault-{run['run']}"
        with self._cluster.submit(self._tokens, request_id, len(self._arguments.devices), *self._flags) as prompt:
            end = self._end()
            event = prompt.wait_for(
                lambda e: e["event"] == "progress" and e["layers_done"] >= run["disturbed_at_layer"], end,
                f"layer {run['disturbed_at_layer']}")
            killed_at = self._cluster.disturb(victim, self._arguments.kill)
            if event["event"] == "result":
                raise Missed("the prompt had ended before it was disturbed")
            run["disturbed_at_layer"] = event["layers_done"]
            result = prompt.wait_for(lambda e: False, end, "the result after the disturbance")
            run["recovered_s"] = time.time() - killed_at
        if result["retries"] == 0:
            raise Missed("all ranks had done their part before one was disturbed")
        run.update(read_abort(self._cluster.epoch_log(request_id), killed_at, run["worker"]))
        run.update(retries=result["retries"], resume_layer=result["resume_layer"], digest=result["kv_digest"],
                   first_token=result["first_token"], world_size=result["plan"]["world_size"], ttft_s=result["ttft"])


def run_all(arguments: argparse.Namespace, logs: Path) -> tuple:
    """(the undisturbed result, disturbed runs, problems, runs by where they went on)"""
    tokens = logs / "tokens.txt"
    source = random.Random(f"tokens {arguments.seed}")
    tokens.write_text(" ".join(str(source.randrange(arguments.vocab)) for _ in range(arguments.tokens)) + "\n")
    memory = DeviceMemory(arguments.devices)
    cluster = FaultCluster(arguments.bin, arguments.model, logs, arguments.devices, arguments.worker_words,
                           arguments.start_limit_s)
    problems, runs, references = [], [], {}
    with cluster:
        faults = Faults(cluster, tokens, memory, arguments)
        first = faults.undisturbed("undisturbed-1", len(arguments.devices))
        result = faults.undisturbed("undisturbed-2", len(arguments.devices))
        print(f"undisturbed: {first['ttft']:.2f} s and {result['ttft']:.2f} s, first token {result['first_token']}, "
              f"digest {result['kv_digest']}", flush=True)
        for name in ("kv_digest", "first_token"):
            if first[name] != result[name]:
                problems.append(f"undisturbed prompts differ in {name}: {first[name]} and {result[name]}")
        missed = 0
        while len(runs) < arguments.times and missed <= arguments.times:
            run = faults.disturbed(len(runs) + missed + 1)
            found = [] if run["missed"] else judge(run, result, arguments)
            print(describe(run) + "".join(f"\n    {text}" for text in found if not run["error"]), flush=True)
            problems += found
            if run["missed"]:
                missed += 1
            else:
                runs.append(run)
        if len(runs) < arguments.times:
            problems.append(f"{missed} prompts ended before they were disturbed, the limit is {arguments.times}; take a longer "
                            "one (--tokens)")
        anew = {run["world_size"] for run in runs if not run["error"] and run["resume_layer"] == 0}
        for ranks in sorted(anew):
            reference = faults.undisturbed(f"undisturbed-on-{ranks}", ranks,
                                           f"--block_tokens={result['layout']['block_tokens']}")
            references[ranks] = reference["kv_digest"]
    groups, differ = compare_digests(runs, references)
    problems += differ
    if left := cluster.leftovers():
        problems.append(f"process groups {left} are left at the end")
    over = memory.wait_free(list(range(len(arguments.devices))), DEVICE_SLACK_MIB, DEVICE_LIMIT_S)
    if over is not None and over > DEVICE_SLACK_MIB:
        problems.append(f"{over} MiB of a GPU are still in use at the end, the limit is {DEVICE_SLACK_MIB}")
    return result, runs, problems, groups


def seconds(value) -> str:
    return "-" if value is None else f"{value:.2f}"


def describe(run: dict) -> str:
    if run["error"]:
        return f"run {run['run']:>3}  {run['worker']} at layer {run['disturbed_at_layer']}: {run['error']}"
    return (f"run {run['run']:>3}  {run['worker']} at layer {run['disturbed_at_layer']:>3}  given up after "
            f"{seconds(run['abort_s'])} s ({run['abort_code']})  next epoch after {seconds(run['restart_s'])} s  "
            f"from layer {run['resume_layer']:>3} on {run['world_size']}  result after {run['recovered_s']:.2f} s  digest {run['digest']}")


def make_row(arguments: argparse.Namespace, result: dict, runs: list, problems: list, groups: dict) -> dict:
    completed = [run for run in runs if not run["error"]]
    aborts = [run["abort_s"] for run in completed if run["abort_s"] is not None]
    codes = [run["abort_code"] for run in completed if run["abort_code"]]
    over = [run["device_mib_over"] for run in runs if run["device_mib_over"] is not None]
    metrics = {"times": arguments.times, "completed": len(completed),
               "resumed": sum(run["resume_layer"] > 0 for run in completed),
               "abort_s_max": max(aborts, default=None), "abort_s_median": statistics.median(aborts) if aborts else None,
               "abort_codes": {code: codes.count(code) for code in sorted(set(codes))},
               "recovered_s_max": max((run["recovered_s"] for run in completed), default=None),
               "ttft_s": result["ttft"], "ttft_s_disturbed_max": max((run["ttft_s"] for run in completed), default=None),
               "digests_equal": not any("digest" in text for text in problems),
               "digests_compared": sum(n for name, n in groups.items() if n > 1 or name.startswith("0/")),
               "runs_by_layer_and_ranks": groups,
               "device_mib_over_max": max(over, default=None), "problems": len(problems)}
    return {"bench": "group_faults", "device": device_name(arguments.devices), "commit": arguments.commit or git_commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "params": {"model": arguments.model.name, "tokens": arguments.tokens, "workers": len(arguments.devices),
                       "policy": arguments.policy, "kill": arguments.kill, "checkpoint_layers": arguments.checkpoint_layers,
                       "collective_timeout_s": arguments.collective_timeout, "seed": arguments.seed},
            "metrics": {name: round(value, 3) if isinstance(value, float) else value for name, value in metrics.items()}}


def git_commit() -> str:
    ended = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return ended.stdout.strip() if ended.returncode == 0 else ""


def main(words: list) -> int:
    try:
        arguments = parse_arguments(words)
    except Usage as error:
        print(f"group_faults.py: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="group_faults."))
    logs.mkdir(parents=True, exist_ok=True)
    keep = True
    try:
        result, runs, problems, groups = run_all(arguments, logs)
        row = json.dumps(make_row(arguments, result, runs, problems, groups))
        print(row)
        if arguments.output:
            with open(arguments.output, "a", encoding="utf-8") as output:
                output.write(row + "\n")
        for text in problems:
            print(f"group_faults.py: {text}", file=sys.stderr)
        keep = bool(problems or arguments.logs)
        return 1 if problems else 0
    except ClusterError as error:
        print(f"group_faults.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("group_faults.py: interrupted", file=sys.stderr)
        return 130
    finally:
        if keep:
            print(f"logs: {logs}", file=sys.stderr)
        else:
            shutil.rmtree(logs, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
