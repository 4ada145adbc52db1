#!/usr/bin/env python3
"""Writes docs/flags.md: every flag of every program and subcommand, from what their --help says.

    make_flags_table.py --bin build/bin [--output docs/flags.md]
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVERS = ("headwater-coordinator", "headwater-worker", "headwater-decode")
HEAD = """# Flags

What `--help` of each program says; this file is written by `tools/make_flags_table.py`. A flag is written `--name=value` or
`--name value`, one that is true or false also `--name` and `--noname`. The last of several counts.

The servers take each of their flags also from a file (`--config`) and from the environment, as `HEADWATER_FLAG_` with the name in upper
case ([operations.md](operations.md#configuration)). No flag takes a secret: keys are named by the files that they are in.
"""
FLAG = re.compile(r"  --(?P<name>\w+)(?P<value>=VALUE)?(?: \(default (?P<default>.*)\))?")


def help_of(binaries: Path, *command: str) -> str:
    done = subprocess.run([str(binaries / command[0]), *command[1:], "--help"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} --help ended with {done.returncode}: {done.stderr}")
    return done.stdout


def read_flags(text: str) -> list:
    """(name, default, meaning) of each flag that a help text lists."""
    flags = []
    lines = text.partition("\nflags:\n")[2].splitlines()
    for line, meaning in zip(lines[::2], lines[1::2]):
        match = FLAG.fullmatch(line)
        if match is None or not meaning.startswith(" " * 6):
            raise ValueError(f"not a flag and its meaning: {line!r}, {meaning!r}")
        name = f"--{match['name']}" + ("=" if match["value"] else "")
        flags.append((name, match["default"] or "", meaning.strip()))
    if not flags or len(lines) % 2:
        raise ValueError(f"a help text without flags, or with half a flag: {text!r}")
    return flags


def section(title: str, text: str) -> str:
    usage = text.splitlines()[0].removeprefix("usage: ")
    rows = []
    for name, default, meaning in read_flags(text):
        shown = f"`{default}`" if default else ""
        rows.append(f"| `{name}` | {shown} | {meaning} |".replace("<", "&lt;") + "\n")
    return f"\n## {title}\n\n`{usage}`\n\n| flag | default | meaning |\n|---|---|---|\n" + "".join(rows)


def commands_of(binaries: Path) -> list:
    """The servers, the subcommands of `headwater` that have flags, and the benchmark."""
    names = re.findall(r"^  (\w+) ", help_of(binaries, "headwater"), re.MULTILINE)
    plain = [("headwater", name) for name in names if name not in ("bench", "help", "version")]
    return [(server,) for server in SERVERS] + plain + [("headwater", "bench", "prefill")]


def run(binaries: Path) -> str:
    return HEAD + "".join(section(" ".join(command), help_of(binaries, *command)) for command in commands_of(binaries))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="directory of the programs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "flags.md")
    arguments = parser.parse_args()
    text = run(arguments.bin)
    arguments.output.write_text(text)
    rows = text.count("\n| `--")
    print(f"{rows} flags in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
