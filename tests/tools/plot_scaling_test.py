"""Tests of tools/plot_scaling.py, and of the table in docs/scaling.md that it makes."""

import json
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import plot_scaling  # noqa: E402


def row(gpus: int, ttft_s: float, **params) -> dict:
    return {"bench": "prefill", "device": "Some GPU", "peers": {},
            "params": {"model": "m", "policy": "dense", "density_mode": "natural", "tokens": 1000, "gpus": gpus, "linear": "bf16",
                       "sink": "none", **params},
            "metrics": {"ttft_s": ttft_s, "density": 1.0, "peak_device_bytes": 2**30}}


class PlotScalingTest(unittest.TestCase):
    def read(self, *rows, device="") -> dict:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            path.write_text("".join(json.dumps(each) + "\n" for each in rows))
            return plot_scaling.read_rows([path], device)

    def efficiencies(self, *rows) -> list:
        return [plot_scaling.efficiency(each, ways) for ways in self.read(*rows).values() for each in ways.values()]

    def test_efficiency_is_against_one_gpu(self):
        self.assertEqual(self.efficiencies(row(1, 8.0), row(2, 5.0), row(4, 2.0)), [1.0, 0.8, 1.0])
        self.assertEqual(self.efficiencies(row(2, 5.0)), [None])

    def test_of_equal_runs_the_last_counts_and_emulated_ones_differ(self):
        self.assertEqual(self.efficiencies(row(1, 9.0), row(1, 8.0), row(2, 5.0), row(2, 4.0, emulated=True)), [1.0, 0.8, 1.0])

    def test_the_same_sink_is_preferred(self):
        rows = (row(1, 8.0), row(1, 10.0, sink="verify"), row(2, 5.0, sink="verify"))
        self.assertEqual(self.efficiencies(*rows)[-1], 1.0)
        self.assertEqual(self.efficiencies(rows[0], rows[2])[-1], 0.8)

    def test_only_problems_that_several_gpus_had_are_shown(self):
        shown = self.read(row(1, 8.0), row(2, 5.0), row(1, 3.0, tokens=500), row(2, 1.0, case="packed", tokens=500),
                          {**row(2, 1.0, tokens=500), "skipped": "too large"}, {**row(2, 1.0), "device": "Other"}, device="Some")
        self.assertEqual([problem[4] for problem in shown], [1000])
        table = plot_scaling.table(shown)
        self.assertIn("| 1,000, dense | bf16 | 2 | - | none | 5 | 80.0 % |", table)
        self.assertEqual(len({line.count("|") for line in table.splitlines()}), 1)

    def test_forced_densities_are_told_apart(self):
        forced = {"policy": "probe", "density_mode": "forced"}
        rows = [row(gpus, 8.0 / gpus, **forced) for gpus in (1, 2)]
        rows[0]["metrics"]["density"] = rows[1]["metrics"]["density"] = 0.0102
        other = {**row(2, 1.0, **forced), "metrics": {**rows[0]["metrics"], "density": 0.1}}
        self.assertEqual(self.efficiencies(*rows, other), [1.0, 1.0, None])

    def test_what_is_no_prefill_row_is_refused_with_its_line(self):
        with self.assertRaisesRegex(ValueError, "rows:1: not a prefill row"):
            self.read({"bench": "prefill", "device": "GPU", "params": {"tokens": 1}, "metrics": {}})

    def test_the_guide_has_the_table_of_the_rows(self):
        table = plot_scaling.table(plot_scaling.read_rows(plot_scaling.RESULTS, "H200"))
        self.assertIn(table, (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"),
                      "docs/scaling.md: put the output of tools/plot_scaling.py --device H200 in place of its table")


if __name__ == "__main__":
    unittest.main()
