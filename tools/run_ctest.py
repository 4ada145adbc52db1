#!/usr/bin/env python3
"""Runs ctest with the given arguments and says aloud what was skipped, just before ctest's own closing lines.

A GoogleTest binary counts as one passed test for ctest even where it skipped every case, for want of a GPU say; a green
run must not hide that. The skipped cases are read from the log that ctest keeps.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLOSING = re.compile(r"^\d+% tests passed")
TEST_NAME = re.compile(r"^\d+/\d+ Test: (.+)$")
SKIPPED_CASES = re.compile(r"^\[  SKIPPED \] (\d+) tests?, listed below:")


def skipped_cases(log: str) -> dict:
    """Number of GoogleTest cases that each test program skipped."""
    counts, name = {}, ""
    for line in log.splitlines():
        if match := TEST_NAME.match(line):
            name = match.group(1)
        elif match := SKIPPED_CASES.match(line):
            counts[name] = counts.get(name, 0) + int(match.group(1))
    return counts


def preset_of(arguments: list) -> str:
    return arguments[arguments.index("--preset") + 1] if "--preset" in arguments else "dev"


def summary(arguments: list, whole_tests_skipped: int) -> str:
    log = ROOT / "build" / preset_of(arguments) / "Testing" / "Temporary" / "LastTest.log"
    counts = skipped_cases(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else {}
    gpu = sum(count for name, count in counts.items() if "gpu" in name)
    rest = "".join(f"\n  {name}: {count} cases skipped" for name, count in sorted(counts.items()))
    return (f"Skipped: {whole_tests_skipped} whole tests, {sum(counts.values())} cases inside the others "
            f"({gpu} of them in GPU tests){rest}")


def main() -> int:
    arguments = sys.argv[1:]
    process = subprocess.Popen(["ctest", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               text=True, errors="replace", bufsize=1)
    closing, whole_tests_skipped = [], 0
    for line in process.stdout:
        if closing or CLOSING.match(line):
            closing.append(line)
            continue
        whole_tests_skipped += "***Skipped" in line
        sys.stdout.write(line)
        sys.stdout.flush()
    code = process.wait()
    print(summary(arguments, whole_tests_skipped) + "\n")
    sys.stdout.write("".join(closing))
    return code


if __name__ == "__main__":
    sys.exit(main())
