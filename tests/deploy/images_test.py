"""Tests of deploy/images without a container engine: the files are linted, and hold what the manifests take for granted.
tools/replay_image.sh replays their steps (make test-full)."""

import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy/images").glob("*.Dockerfile"))


def find_hadolint():
    own = Path(sys.executable).parent / "hadolint"
    return str(own) if own.exists() else shutil.which("hadolint")


def instructions(text: str) -> list:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def check(text: str, users: set, programs: set) -> Iterator[str]:
    """Violations of one container file."""
    steps = instructions(text)
    for name, rest in steps:
        base = rest.split()[0]
        if name == "FROM" and base != "scratch" and not re.fullmatch(r"debian:bookworm-\d{8}-slim", base):
            yield f"FROM {base} has no date"
        if name == "ADD":
            yield f"ADD {rest}: COPY says what comes"
    found = [rest for name, rest in steps if name == "USER"]
    if not found or steps[-1][0] != "USER" or found[-1] not in users:
        yield f"the image ends as user {found[-1] if found else 'root'}, the manifests have {sorted(users)}"
    if sum(name == "FROM" for name, _ in steps) < 2:
        yield "one stage: the image holds the compiler"
    collected = (ROOT / "deploy/images/collect.sh").read_text()
    listed = set(re.search(r"^programs=\((.*)\)$", collected, re.MULTILINE).group(1).split())
    if not programs <= listed:
        yield f"collect.sh takes {sorted(listed)}, the manifests start {sorted(programs)}"
    builds = [rest for name, rest in steps if name == "RUN" and "cmake --build" in rest]
    target = builds[0].partition("--target")[2].split() if builds else []
    if "replay: compile" not in text or set(target) != listed:
        yield f"the step marked 'replay: compile' builds {target}, collect.sh takes {sorted(listed)}"


def manifests() -> tuple:
    """(USER:GROUP of the pods, programs that they start)"""
    users, programs = set(), set()
    for path in (ROOT / "deploy/kubernetes").rglob("*.yaml"):
        text = path.read_text()
        users |= {":".join(pair) for pair in re.findall(r"runAsUser: (\d+)\s+runAsGroup: (\d+)", text)}
        programs |= set(re.findall(r"command: \[([\w-]+)\]", text))
    return users, programs


class Images(unittest.TestCase):
    def test_files(self):
        users, programs = manifests()
        self.assertEqual(users, {"65532:65532"})
        self.assertEqual(programs, {"headwater-coordinator", "headwater-worker"})
        self.assertEqual([path.name for path in FILES], ["cpu.Dockerfile", "cuda.Dockerfile"])
        for path in FILES:
            with self.subTest(path.name):
                self.assertEqual(list(check(path.read_text(), users, programs)), [])

    def test_broken_files(self):
        users, programs = manifests()
        good = FILES[0].read_text()
        for old, new, wanted in (("debian:bookworm-20251117-slim", "debian:latest", "FROM debian:latest has no date"),
                                 ("COPY . .", "ADD . .", "ADD . .: COPY"),
                                 ("USER 65532:65532", "USER 1000", "ends as user 1000"),
                                 ("USER 65532:65532\n", "", "ends as user root"),
                                 ("FROM scratch\n", "", "one stage"),
                                 (" headwater-decode headwater\n", " headwater\n", "'replay: compile' builds"),
                                 ("# replay: compile\n", "", "'replay: compile' builds")):
            with self.subTest(wanted):
                self.assertIn(old, good)
                problems = list(check(good.replace(old, new), users, programs))
                self.assertTrue(any(wanted in problem for problem in problems), f"no '{wanted}' among {problems}")
        self.assertIn("the manifests start ['headwater-gate']", "".join(check(good, users, {"headwater-gate"})))
        self.assertIn("the manifests have ['1:1']", "".join(check(good, {"1:1"}, programs)))

    @unittest.skipUnless(find_hadolint(), "there is no hadolint (tools/requirements.txt, tools/venv.sh)")
    def test_lint(self):
        # DL3059: RUN after RUN makes a layer more, here of a stage that is not shipped.
        run = subprocess.run([find_hadolint(), "--no-color", "--ignore=DL3059", *map(str, FILES)], capture_output=True,
                             text=True, timeout=60)
        self.assertEqual((run.returncode, run.stdout + run.stderr), (0, ""))

    @unittest.skipUnless(find_hadolint(), "there is no hadolint (tools/requirements.txt, tools/venv.sh)")
    def test_lint_finds(self):
        run = subprocess.run([find_hadolint(), "--no-color", "-"], input="FROM debian\nRUN cd /x && make\n",
                             capture_output=True, text=True, timeout=60)
        self.assertEqual(run.returncode, 1)
        self.assertIn("DL3006", run.stdout)


if __name__ == "__main__":
    unittest.main()
