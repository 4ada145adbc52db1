"""What the tests of this folder share: the build under test, and whether files name the machine that made them."""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("HEADWATER_BUILD", "")).resolve()
PROGRAMS = ["headwater", "headwater-coordinator", "headwater-worker", "headwater-decode"]


def need(*commands: str) -> None:
    """Ends the test as skipped, aloud, where there is no build or a command is not installed."""
    if not os.access(BUILD / "bin" / PROGRAMS[-1], os.X_OK):
        print(f"SKIPPED: HEADWATER_BUILD={BUILD} has no bin/{PROGRAMS[-1]}")
        sys.exit(77)
    for command in commands:
        if shutil.which(command) is None:
            print(f"SKIPPED: {command} is not installed (tools/packages-test.txt names the packages)")
            sys.exit(77)


def version() -> str:
    text = (ROOT / "base/version.h").read_text()
    return re.search(r'kVersion\[\] = "([^"]+)"', text)[1]


def machine_paths(folder: Path) -> list:
    """(file, path) of everything beneath `folder` that holds the path of the sources, of the build or of a home."""
    paths = "|".join(re.escape(path) for path in sorted(map(str, (ROOT, BUILD, Path.home())), key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w./-])(?:{paths})/".encode())
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and (match := pattern.search(path.read_bytes())):
            found.append((str(path.relative_to(folder)), match[0].decode()))
    return found
