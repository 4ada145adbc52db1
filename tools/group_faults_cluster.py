"""The processes of tools/group_faults.py: a service whose workers are killed or stopped and started anew.

Everything is learned from outside: from the `headwater` command, the coordinator's log, the kernel and nvidia-smi.
"""

import datetime
import json
import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Callable, Optional

from demo_cluster import Cluster, ClusterError, Process, end_with_parent, free_ports

DECODE_NODE = "decode-0"
CALL_LIMIT_S = 15
REAP_LIMIT_S = 10


class Prompt:
    """One `headwater submit` under way; leaving the context ends it."""

    def __init__(self, command: list, log: Path):
        with open(log, "ab") as errors:
            self._popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                           start_new_session=True, preexec_fn=end_with_parent)
        self._events = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Prompt":
        return self

    def __exit__(self, *_) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()

    def _read(self) -> None:
        for line in self._popen.stdout:
            self._events.put(json.loads(line))
        self._popen.stdout.close()
        self._events.put(None)

    def wait_for(self, wanted: Callable, end: float, what: str) -> dict:
        """The first event from here on that is wanted, or the result, whichever comes first. ClusterError where the prompt
        fails, or nothing of both has come by `end` (monotonic)."""
        while True:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise ClusterError(f"waited for {what} until the prompt's limit (--limit_s)") from None
            if event is None:
                raise ClusterError(f"`headwater submit` ended without a result while waited for {what}")
            if event["event"] == "result" and not event["ok"]:
                error = event["error"]
                raise ClusterError(f"the prompt failed: {error['code']} {error['reason']} {error['message']}")
            if event["event"] == "result" or wanted(event):
                return event


class FaultCluster(Cluster):
    """A coordinator, a decode node that checks blocks and drops them, and one worker a device. Leaving it ends them all."""

    def __init__(self, binaries: Path, model: Path, state: Path, devices: list, worker_flags: list, start_limit_s: float):
        super().__init__(binaries, model, state, len(devices))
        self._devices = devices
        self._worker_flags = worker_flags
        self._start_limit_s = start_limit_s
        self._incarnations = [0] * len(devices)
        self._workers = {}
        self._groups = []  # every process group that was started
        if not os.access(binaries / "headwater", os.X_OK):
            raise ClusterError(f"{binaries / 'headwater'} is not there")

    @property
    def logs(self) -> Path:
        return self._state / "logs"

    def __enter__(self) -> "FaultCluster":
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            self.coordinator = self._launch("coordinator", "headwater-coordinator", "--log_format=json").address
            self._launch("decode", "headwater-decode", f"--coordinator={self.coordinator}", f"--decode_node={DECODE_NODE}",
                         f"--model={self._model}", "--sink=verify", "--pool=verify")
            for index in range(len(self._devices)):
                self.start_worker(index)
            self.wait_complete()
        except BaseException:
            self.stop()
            raise
        return self

    def _launch(self, name: str, binary: str, *flags: str) -> Process:
        process = self._start(name, binary, iter(free_ports(2)), *flags)
        self._groups.append(process.popen.pid)
        return process

    def start_worker(self, index: int) -> None:
        self._incarnations[index] += 1
        device = self._devices[index]
        share = [f"--max_gpus={len(self._devices)}"] if device.startswith("cuda") else []
        self._workers[index] = self._launch(
            f"worker-{index}.{self._incarnations[index]}", "headwater-worker", f"--worker_id=w{index}",
            f"--coordinator={self.coordinator}", f"--model={self._model}", f"--device={device}", *share,
            *self._worker_flags)

    def _call(self, *words: str) -> dict:
        """The last line of a subcommand's --json; {} where it fails."""
        try:
            ended = subprocess.run([str(self._binaries / "headwater"), *words, f"--coordinator={self.coordinator}",
                                    "--connect_timeout=2s", "--json"], stdin=subprocess.DEVNULL, capture_output=True,
                                   timeout=CALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            return {}
        return json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else {}

    def wait_complete(self) -> None:
        """Waits until the coordinator lists every worker and the decode node."""
        end = time.monotonic() + self._start_limit_s
        wanted = {f"w{index}" for index in range(len(self._devices))}
        while True:
            self.check_alive()
            workers = {worker["worker_id"] for worker in self._call("workers").get("workers", [])}
            nodes = sum(node["connected"] for node in self._call("nodes").get("decode_nodes", []))
            if workers == wanted and nodes == 1:
                return
            if time.monotonic() > end:
                raise ClusterError(f"workers {sorted(workers)} of {sorted(wanted)} and {nodes} of 1 decode nodes registered "
                                   f"within {self._start_limit_s:g} s (--start_limit_s)")
            time.sleep(0.2)

    def submit(self, tokens: Path, request_id: str, world_size: int, *flags: str) -> Prompt:
        return Prompt([str(self._binaries / "headwater"), "submit", f"--tokens={tokens}", f"--request_id={request_id}",
                       f"--world_size={world_size}", f"--decode_node={DECODE_NODE}", f"--coordinator={self.coordinator}",
                       "--json", *flags], self.logs / "submit.log")

    def _forget(self, index: int) -> None:
        """From now on its end is no failure."""
        if self._workers[index] in self.processes:
            self.processes.remove(self._workers[index])

    def disturb(self, index: int, how: str) -> float:
        """Kills the worker, or stops it where it stands; returns when, in seconds since 1970."""
        self._forget(index)
        moment = time.time()
        os.kill(self._workers[index].popen.pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return moment

    def bury(self, index: int) -> bool:
        """Ends the disturbed worker for good; False where something of it is left."""
        popen = self._workers[index].popen
        self._forget(index)
        popen.kill()
        try:
            popen.wait(timeout=REAP_LIMIT_S)
        except subprocess.TimeoutExpired:
            return False
        return not group_lives(popen.pid)

    def stop(self) -> int:
        # Those that were disturbed are no longer in `processes`; a stopped one would not hear a SIGTERM.
        for process in self._workers.values():
            if process not in self.processes and process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
        return super().stop()

    def leftovers(self) -> list:
        """Process groups that should have ended and have not."""
        return [group for group in self._groups if group_lives(group)]

    def epoch_log(self, request_id: str) -> list:
        """What the coordinator's log says of a request, with `at` in seconds since 1970."""
        found = []
        for line in (self.logs / "coordinator.log").read_text(encoding="utf-8", errors="replace").splitlines():
            if f'"request_id":"{request_id}"' not in line:
                continue
            entry = json.loads(line)
            moment = datetime.datetime.strptime(entry["ts"], "%Y-%m-%dT%H:%M:%S.%fZ")
            entry["at"] = moment.replace(tzinfo=datetime.timezone.utc).timestamp()
            found.append(entry)
        return found


def read_abort(log: list, killed_at: float, victim: str) -> dict:
    """Seconds from the disturbance until the last of the others had given its rank up, with that one's error (CANCELLED: the
    coordinator told it to; else it found out by itself), and until the next epoch was started; None: not in the log. Where none of the others
    failed, they had just ended their parts (ENDED): the next epoch is not started before they all have."""
    given_up = [entry for entry in log if entry["msg"] == "rank failed" and entry["epoch"] == 1 and entry["worker"] != victim]
    last = max(given_up, key=lambda entry: entry["at"], default=None)
    restarts = [entry["at"] for entry in log if entry["msg"] == "epoch started" and entry["epoch"] == 2]
    restart_s = restarts[0] - killed_at if restarts else None
    if last is None:
        return {"abort_s": restart_s, "abort_code": "ENDED" if restarts else "", "restart_s": restart_s}
    return {"abort_s": last["at"] - killed_at, "abort_code": last["error"].partition(":")[0], "restart_s": restart_s}


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # the latter: its number is somebody else's by now
        return False
    return True


def query_gpus(field: str) -> Optional[list]:
    """nvidia-smi's values of a field, by GPU; None where it is not there or does not answer."""
    try:
        ended = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
                               stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line.strip() for line in ended.stdout.splitlines()] if ended.returncode == 0 else None


def device_name(devices: list) -> str:
    if devices[0].startswith("cuda"):
        names = query_gpus("name")
        gpu = int(devices[0].partition(":")[2])
        return names[gpu] if names and gpu < len(names) else devices[0]
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {len(os.sched_getaffinity(0))} CPUs"
    return "cpu"


class DeviceMemory:
    """Memory in use on the devices beyond what was in use when this was made."""

    def __init__(self, devices: list):
        self._gpus = [int(device.partition(":")[2] or 0) if device.startswith("cuda") else None for device in devices]
        self._before = self._used()

    def _used(self) -> Optional[list]:
        if all(gpu is None for gpu in self._gpus):
            return None
        values = query_gpus("memory.used")
        if values is None or any(gpu is not None and (gpu >= len(values) or not values[gpu].isdigit())
                                 for gpu in self._gpus):
            return None
        return [None if gpu is None else int(values[gpu]) for gpu in self._gpus]

    def wait_free(self, indices: list, slack_mib: int, limit_s: float) -> Optional[int]:
        """Waits until the devices have no more than slack in use beyond what they had; returns the most MiB over that, also
        where the limit has passed. None: not known."""
        end = time.monotonic() + limit_s
        while True:
            now = self._used()
            if now is None or self._before is None:
                return None
            over = [now[i] - self._before[i] for i in indices if now[i] is not None]
            most = max(over, default=0)
            if most <= slack_mib or time.monotonic() > end:
                return max(0, most)
            time.sleep(0.2)
