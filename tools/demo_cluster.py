"""Starts a coordinator, workers and a decode node on loopback, and ends them again."""

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from make_certificates import tls_flags

REGISTRATION_TIMEOUT_S = 120
SHUTDOWN_TIMEOUT_S = 15
LOG_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ClusterError(Exception):
    """A process could not be started or did not register; the message has the end of its log."""


def free_ports(count: int) -> list:
    """Loopback ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


def end_with_parent() -> None:
    # The kernel ends the child even where this process is killed without a chance to clean up.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Process:
    name: str
    popen: subprocess.Popen
    log: Path
    address: str
    metrics: str

    def log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"


class Cluster:
    """A context manager: leaving it ends every process."""

    def __init__(self, binaries: Path, model: Path, state: Path, workers: int, compute: str = "auto", device: str = "cpu",
                 tls: Optional[Path] = None, coordinator_flags: tuple = (), worker_flags: tuple = ()):
        """tls: directory of make_certificates(); None: plaintext."""
        self._coordinator_flags = coordinator_flags
        self._worker_flags = worker_flags
        self._tls = tls
        self._binaries = binaries
        self._model = model
        self._state = state
        self._compute = compute
        self._device = device
        self._num_workers = workers
        self.processes = []
        self.coordinator = ""
        for binary in ("headwater-coordinator", "headwater-worker", "headwater-decode"):
            if not os.access(binaries / binary, os.X_OK):
                raise ClusterError(f"{binaries / binary} is not there; make demo builds it")

    def __enter__(self) -> "Cluster":
        logs = self._state / "logs"
        kv = self._state / "kv"
        logs.mkdir(parents=True, exist_ok=True)
        kv.mkdir(parents=True, exist_ok=True)
        ports = iter(free_ports(2 * (self._num_workers + 2)))
        threads = max(1, usable_cpus() // self._num_workers)
        try:
            self.coordinator = self._start("coordinator", "headwater-coordinator", ports,
                                           *self._coordinator_flags).address
            for index in range(self._num_workers):
                self._start(f"worker-{index}", "headwater-worker", ports, f"--worker_id=w{index}",
                            f"--coordinator={self.coordinator}", f"--model={self._model}",
                            f"--threads={threads}", f"--compute={self._compute}",
                            "--device=" + (f"cuda:{index}" if self._device == "cuda" else "cpu"), *self._worker_flags)
            self._start("decode", "headwater-decode", ports, f"--coordinator={self.coordinator}",
                        "--decode_node=decode-0", f"--model={self._model}", f"--kv_dir={kv}",
                        f"--compute={self._compute}")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self, name: str, binary: str, ports, *flags: str) -> Process:
        address, metrics = f"127.0.0.1:{next(ports)}", f"127.0.0.1:{next(ports)}"
        log = self._state / "logs" / f"{name}.log"
        tls = tls_flags(self._tls, binary.removeprefix("headwater-")) if self._tls else []
        command = [str(self._binaries / binary), f"--listen={address}", f"--metrics={metrics}", *tls, *flags]
        with open(log, "wb") as output:
            output.write((" ".join(command) + "\n").encode())
            output.flush()
            # A session of its own: Ctrl-C reaches this script alone, which then ends the processes in order.
            popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                     start_new_session=True, preexec_fn=end_with_parent)
        process = Process(name, popen, log, address, metrics)
        self.processes.append(process)
        return process

    def check_alive(self) -> None:
        for process in self.processes:
            code = process.popen.poll()
            if code is not None:
                raise ClusterError(f"{process.name} ended with status {code}; the end of {process.log}:\n{process.log_tail()}")

    def wait_registered(self, client, report) -> None:
        """Waits until all workers and the decode node are registered; calls report(workers, decode nodes) on a change."""
        from headwater import HeadwaterError

        end = time.monotonic() + REGISTRATION_TIMEOUT_S
        seen = None
        while True:
            self.check_alive()
            try:
                counts = (len(client.workers(timeout_s=2)),
                          sum(node.connected for node in client.decode_nodes(timeout_s=2)))
            except HeadwaterError:
                counts = (0, 0)
            if counts != seen:
                seen = counts
                report(*counts)
            if counts == (self._num_workers, 1):
                return
            if time.monotonic() > end:
                logs = "\n".join(f"{process.log}:\n{process.log_tail()}" for process in self.processes)
                raise ClusterError(f"{counts[0]} of {self._num_workers} workers and {counts[1]} of 1 decode nodes registered "
                                   f"within {REGISTRATION_TIMEOUT_S} s; the ends of the logs:\n{logs}")
            time.sleep(0.1)

    def stop(self) -> int:
        """Ends all processes, the ones that depend on others first; returns how many had to be killed."""
        order = sorted(self.processes, key=lambda process: process.name == "coordinator")
        for process in order:
            if process.popen.poll() is None:
                process.popen.terminate()
        end = time.monotonic() + SHUTDOWN_TIMEOUT_S
        killed = 0
        for process in order:
            try:
                process.popen.wait(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
                killed += 1
        self.processes.clear()
        return killed


def read_metrics(address: str) -> Optional[str]:
    """The text of an endpoint, None where it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=5) as response:
            return response.read(1 << 22).decode("utf-8", errors="replace")
    except OSError:
        return None
