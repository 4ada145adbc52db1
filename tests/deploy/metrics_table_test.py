"""docs/metrics.md is what running processes export, and has every metric that the sources make."""

import os
import re
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_metrics_table  # noqa: E402
from make_metrics_table import Family, merge, read_page, read_table, render  # noqa: E402

BIN = os.environ.get("HEADWATER_BIN", "")
try:
    import headwater  # noqa: F401
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)
if not os.access(Path(BIN) / "headwater-coordinator", os.X_OK):
    print(f"SKIPPED: HEADWATER_BIN={BIN} has no headwater-coordinator")
    sys.exit(77)

TABLE = ROOT / "docs" / "metrics.md"
PAGE = """# HELP a_total Things.
# TYPE a_total counter
a_total{code="OK"} 1
a_total{code="NO",why="x"} 1
# HELP b_seconds Time.
# TYPE b_seconds histogram
b_seconds_bucket{le="1"} 2
"""


def sources() -> str:
    """The C++ of the processes, with string literals that follow each other joined."""
    text = "".join(path.read_text() for folder in ("base", "base/rpc", "coordinator", "decode", "kvtransfer", "worker")
                   for path in sorted((ROOT / folder).glob("*.cc")))
    return re.sub(r'"\s*\n\s*"', "", text)


class MetricsTest(unittest.TestCase):
    def test_a_page_becomes_rows(self):
        families = merge([("one", PAGE), ("two", PAGE)])
        self.assertEqual(families[0], Family("a_total", "counter", "Things.", {"code", "why"}, {"one", "two"}))
        self.assertEqual([family.labels for family in read_page(PAGE)], [{"code", "why"}, set()])
        self.assertEqual(read_table(render(families)), families)
        self.assertIn("| `b_seconds` | histogram |  | seconds | one, two | Time. |\n", render(families))

    def test_the_table_is_current(self):
        text = make_metrics_table.run(Path(BIN))
        self.assertEqual(text.splitlines(), TABLE.read_text().splitlines(), "run tools/make_metrics_table.py")

    def test_the_table_has_every_metric_of_the_sources(self):
        text = sources()
        names = set(re.findall(r'(?:Counter|Gauge|Histogram|Seconds)\(\s*"(headwater_\w+)"', text))
        names |= set(re.findall(r'k\w+Name\[\] = "(headwater_\w+)"', text))
        self.assertGreater(len(names), 40)
        listed = {family.name for family in read_table(TABLE.read_text()) if family.name.startswith("headwater_")}
        self.assertEqual(sorted(listed), sorted(names), "listed, and in the sources")

    def test_metrics_of_gpus_and_certificates_are_those_of_the_sources(self):
        text = sources()
        for family in read_page(make_metrics_table.ON_GPUS + make_metrics_table.WITH_CERTIFICATES):
            self.assertIn(f'"{family.name}"', text)
            self.assertIn(family.meaning, text)


if __name__ == "__main__":
    unittest.main()
