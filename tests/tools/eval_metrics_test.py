"""headwater.eval.metrics and headwater.eval.report against hand values. Skipped where NumPy is not installed."""

import json
import math
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

try:
    import numpy  # noqa: F401
except ImportError:
    print("skipped: numpy is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater.eval import metrics, report  # noqa: E402

META = {"model": "m", "device": "CPU", "dtype": "f32", "seed": 3, "date": "2026-01-01", "commit": "abc",
        "questions": "All shared."}


def result(policy, name, nll, correct=None, tokens=1024, set_name="ppl:t", group=None, attention_ms=1.0):
    return SimpleNamespace(policy=policy, tokens=tokens, set=set_name, name=name, group=group or name, nll=nll,
                           correct=correct, density=0.5, attention_ms=attention_ms, prefill_ms=10.0)


def records(results, recalls=()):
    return SimpleNamespace(results=list(results), recalls=list(recalls), notes=["a note"],
                           as_dict=lambda: {"results": [vars(one) for one in results]})


class PercentileTest(unittest.TestCase):
    def test_it_interpolates(self):
        self.assertEqual(metrics.percentile([4, 1, 3, 2], 50), 2.5)
        self.assertEqual(metrics.percentile([0, 100], 1), 1)
        self.assertEqual(metrics.percentile([7], 99), 7)
        self.assertEqual([metrics.percentile([1, 2, 3], share) for share in (0, 100)], [1, 3])
        self.assertTrue(math.isnan(metrics.percentile([], 1)))


class BootstrapTest(unittest.TestCase):
    def test_equal_differences_have_no_width(self):
        self.assertEqual(metrics.bootstrap([0.25] * 5, seed=1), metrics.Interval(0.25, 0.25, 0.25))

    def test_two_values_give_their_own_range(self):
        # Means of two draws are 0, 1/2 or 1, with weights 1/4, 1/2, 1/4: both tails of 2.5 % lie in the outer ones.
        self.assertEqual(metrics.bootstrap([0, 1], seed=1), metrics.Interval(0.5, 0, 1))

    def test_the_interval_is_that_of_the_normal_distribution_for_many(self):
        values = numpy.random.default_rng(5).normal(2, 1, 400)
        found = metrics.bootstrap(values, seed=1)
        error = values.std() / 20
        self.assertAlmostEqual(found.value, values.mean(), places=12)
        self.assertAlmostEqual(found.low, values.mean() - 1.96 * error, delta=0.2 * error)
        self.assertAlmostEqual(found.high, values.mean() + 1.96 * error, delta=0.2 * error)

    def test_the_seed_decides(self):
        values = [0.1, 0.5, 0.2, 0.9, 0.4]
        self.assertEqual(metrics.bootstrap(values, seed=1), metrics.bootstrap(values, seed=1))
        self.assertNotEqual(metrics.bootstrap(values, seed=1), metrics.bootstrap(values, seed=2))

    def test_a_group_is_drawn_whole(self):
        found = metrics.bootstrap([0, 1, 0, 1], seed=1, groups=["a", "a", "b", "b"])
        self.assertEqual(found, metrics.Interval(0.5, 0.5, 0.5))

    def test_transform_and_what_is_refused(self):
        self.assertAlmostEqual(metrics.bootstrap([math.log(2)] * 2, seed=1, transform=metrics.relative_perplexity).high, 1)
        for wrong in (dict(differences=[]), dict(differences=[[1.0]]), dict(differences=[1], confidence=1),
                      dict(differences=[1], groups=["a", "b"])):
            with self.subTest(wrong), self.assertRaises(ValueError):
                metrics.bootstrap(seed=1, **wrong)


class ReportTest(unittest.TestCase):
    def test_perplexity_is_compared_on_the_windows_that_both_did(self):
        rows = report.make_rows(records([result("dense", "a", 1.0), result("dense", "b", 2.0), result("p", "a", 1.5)]),
                                model="m", seed=1)
        self.assertEqual([row["params"]["policy"] for row in rows], ["dense", "p"])
        dense, other = (row["metrics"] for row in rows)
        self.assertAlmostEqual(dense["value"], math.exp(1.5))
        self.assertEqual(dense["delta"], 0)
        self.assertAlmostEqual(other["dense_value"], math.e)
        self.assertAlmostEqual(other["delta"], math.exp(0.5) - 1)
        self.assertEqual((other["samples"], other["paired"]), (1, 1))

    def test_shares_costs_and_recall(self):
        some = [result(policy, f"i#{n}", 0.1, correct, set_name="kv", group="i", attention_ms=ms)
                for policy, hits, ms in (("dense", (True, True), 4.0), ("p", (True, False), 2.0))
                for n, correct in enumerate(hits)]
        recall = SimpleNamespace(policy="p", tokens=1024, set="kv", recall=[[1.0, 0.5], [1.0, 1.0]], error=[0.25, 0.75])
        other = report.make_rows(records(some, [recall]), model="m", seed=1)[1]["metrics"]
        self.assertEqual((other["value"], other["dense_value"], other["delta"]), (0.5, 1, -0.5))
        self.assertEqual((other["ci_low"], other["ci_high"]), (-0.5, -0.5))  # one context: one group
        self.assertEqual((other["density"], other["attention_ms"], other["prefill_ms"]), (0.5, 2.0, 10.0))
        self.assertEqual((other["recall_mean"], other["recall_worst_layer"], other["rel_error"]), (0.875, 0.75, 0.5))
        self.assertAlmostEqual(other["recall_p1"], 0.515)

    def test_without_dense_there_is_no_difference(self):
        self.assertNotIn("delta", report.make_rows(records([result("p", "a", 1.5)]), model="m", seed=1)[0]["metrics"])

    def test_files_of_a_run_with_a_figure_that_is_not_finite(self):
        with tempfile.TemporaryDirectory() as folder:
            written = report.write(Path(folder) / "new", records([result("p", "a", math.nan)]), META, final=False)
            texts = {path.name: path.read_text() for path in written}
        self.assertEqual(sorted(texts), ["report.md", "results.json", "rows.jsonl"])
        self.assertIsNone(json.loads(texts["results.json"])["rows"][0]["metrics"]["nll"])
        row = json.loads(texts["rows.jsonl"])
        self.assertEqual((row["bench"], row["commit"], row["peers"]), ("policies", "abc", {}))
        self.assertIn("- a note\n", texts["report.md"])
        self.assertIn("## 1024 tokens, ppl:t\n\n| policy | value |", texts["report.md"])

    def test_a_run_that_measured_nothing_has_files_too(self):
        with tempfile.TemporaryDirectory() as folder:
            written = report.write(Path(folder), records([]), META, final=True)
            self.assertEqual((Path(folder) / "rows.jsonl").read_text(), "")
            self.assertGreaterEqual(len(written), 3)


if __name__ == "__main__":
    unittest.main()
