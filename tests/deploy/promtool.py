"""promtool and its inputs, for the tests of deploy/."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "alerts" / "headwater.rules.yml"
RUNBOOK = ROOT / "docs" / "runbook.md"
RULE_TESTS = sorted((ROOT / "deploy" / "alerts").glob("*.test.yml"))

sys.path.insert(0, str(ROOT / "tools"))

try:
    import yaml
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)


def need(*programs: str) -> None:
    """Ends this test as skipped where a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            print(f"SKIPPED: {program} is not installed (apt-get install prometheus)")
            sys.exit(77)


def promtool(*words, stdin: str = "") -> tuple:
    """(status, output) of promtool."""
    ended = subprocess.run(["promtool", *map(str, words)], input=stdin, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout + ended.stderr


def rules() -> list:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def check_queries(queries: list) -> tuple:
    """(status, output) of promtool for a rules file that records these expressions."""
    records = [{"record": f"check:query:{index}", "expr": query} for index, query in enumerate(queries)]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump({"groups": [{"name": "check", "rules": records}]}, file)
        file.flush()
        return promtool("check", "rules", file.name)


def runbook_queries() -> list:
    """What the runbook says to ask Prometheus."""
    parts = re.findall(r"\*\*Look first\*\*(.*?)\*\*Do\*\*", RUNBOOK.read_text(), re.DOTALL)
    quoted = [" ".join(query.split()) for part in parts for query in re.findall(r"`([^`]+)`", part)]
    return [query for query in quoted if re.search(r"headwater[_:]|up\{", query)]
