#!/usr/bin/env python3
"""Builds the fuzz targets (preset fuzz) and runs each for a while; a finding fails, and says how to run it again.

    run.py [--seconds 20] [--jobs 2] [--targets a,b] [--work DIR] [--build DIR]

The seeds are made anew each time; DIR (default build/fuzz/work) keeps what the runs found worth keeping.
"""

import argparse
import concurrent.futures
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
INPUTS = ROOT / "tests" / "fuzz" / "inputs"
MEMORY_MB = 2048
# One input that takes longer than this is a finding, too.
INPUT_SECONDS = 10
GRACE_S = 120


class Result(NamedTuple):
    target: str
    executions: int
    rate: int
    covered: int
    failure: str


def build(directory: Path) -> None:
    if shutil.which("clang++-14") is None:
        sys.exit("clang++-14 is not installed (Debian packages clang-14, libclang-rt-14-dev; make deps)")
    configure = ["cmake", "--preset", "fuzz", "-B", str(directory)]
    subprocess.run(configure, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(directory), "--target", "fuzz_targets"], cwd=ROOT, check=True)


def run(binary: Path, work: Path, seconds: int) -> Result:
    target = binary.name.removeprefix("fuzz_")
    corpus, found = work / "corpus" / target, work / "findings" / target
    for directory in (corpus, found):
        directory.mkdir(parents=True, exist_ok=True)
    command = [str(binary), f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}",
               "-max_len=16384", "-print_final_stats=1", f"-artifact_prefix={found}/", str(corpus),
               str(work / "seeds" / target)]
    dictionary = ROOT / "tests" / "fuzz" / "dictionaries" / f"{target}.dict"
    if dictionary.is_file():
        command.insert(1, f"-dict={dictionary}")
    if (INPUTS / target).is_dir():
        command.append(str(INPUTS / target))
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=seconds + GRACE_S)
    except subprocess.TimeoutExpired as stuck:
        return Result(target, 0, 0, 0, f"it did not end by itself\n{(stuck.stderr or b'')[-2000:]!r}")
    executions = int((re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr) or ["0"])[-1])
    rate = int((re.findall(r"stat::average_exec_per_sec:\s+(\d+)", done.stderr) or ["0"])[-1])
    covered = int((re.findall(r"cov: (\d+)", done.stderr) or ["0"])[-1])
    failure = "" if done.returncode == 0 and executions > 0 else done.stderr[-6000:]
    return Result(target, executions, rate, covered, failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", default="")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--no-build", action="store_true")
    options = parser.parse_args()
    if not options.no_build:
        build(options.build)
    work = options.work or options.build / "work"
    shutil.rmtree(work / "seeds", ignore_errors=True)
    subprocess.run([str(options.build / "tests" / "fuzz_replay_test"), "--write", str(work / "seeds")], check=True)
    binaries = sorted((options.build / "fuzz").glob("fuzz_*"))
    if options.targets:
        binaries = [binary for binary in binaries if binary.name.removeprefix("fuzz_") in options.targets.split(",")]
    if not binaries:
        sys.exit("no such target")
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda binary: run(binary, work, options.seconds), binaries))
    for result in results:
        print(f"{result.target:14} {result.executions:10} executions, {result.rate:6} a second, "
              f"{result.covered:6} edges: {'FOUND SOMETHING' if result.failure else 'nothing found'}")
    for result in results:
        if result.failure:
            print(f"\n{result.target}: the input is in {work}/findings/{result.target}\n{result.failure}")
    print(f"{sum(result.executions for result in results)} executions of {len(results)} targets")
    return 1 if any(result.failure for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
