"""headwater.calibrate without a GPU: the descent on made-up losses, and the file."""

import json
import math
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater.calibrate.file import Calibration, load, save  # noqa: E402
from headwater.calibrate.search import CANDIDATES, DENSE, Measured, descend, front  # noqa: E402


def model(needs, costs=None, loss=1.0):
    """A loss of `loss` for each rung that a unit lacks of what it needs."""
    def measure(rungs):
        lacking = sum(max(0, need - rung) for need, rung in zip(needs, rungs))
        return Measured({"text": loss * lacking}, sum(cost * rung for cost, rung in zip(costs or [1] * len(needs), rungs)))
    return measure


TOP = 7  # dense


def run(units, measure, budgets, top=TOP, **options):
    return descend(units, measure, budgets, rungs=[measure([rung] * units) for rung in range(top)], **options)


class DescentTest(unittest.TestCase):
    def test_units_come_down_to_what_they_need(self):
        needs = [0, 3, 1, 0, 5]
        out = run(5, model(needs), {"text": 0.5})
        self.assertEqual(out.rungs, needs)
        self.assertTrue(out.whole)
        self.assertEqual(out.history[0], (0.0, 25.0))  # all on rung 5

    def test_a_budget_is_spent_where_it_saves_most(self):
        # Room for one rung too few: the dear unit gets it.
        out = run(2, model([1, 1], [1, 10]), {"text": 1.0})
        self.assertEqual(out.rungs, [1, 0])

    def test_sets_have_budgets_of_their_own(self):
        def measure(rungs):
            return Measured({"text": 0.0, "words": 0.01 if rungs[1] < 2 else 0.0}, float(sum(rungs)))
        out = run(2, measure, {"text": 0.001, "words": 0.001})
        self.assertEqual(out.rungs, [0, 2])

    def test_what_breaks_together_goes_down_apart(self):
        def measure(rungs):  # one of the two may be low
            return Measured({"text": 1.0 if rungs[0] + rungs[1] < 3 else 0.0}, float(sum(rungs)))
        out = run(2, measure, {"text": 0.5}, top=3, share=1.0)
        self.assertEqual(sum(out.rungs), 3)
        self.assertEqual(out.measured.excess({"text": 0.5}), 0)

    def test_units_that_could_not_be_chosen_are_not_tried_anew(self):
        costs, calls = [2.0 ** unit for unit in range(8)], []

        def measure(rungs):  # what a rung saves is another for each unit, and the same all the way down
            calls.append(list(rungs))
            saved = sum(cost * rung for cost, rung in zip(costs, rungs))
            return Measured({"text": 0.0 if len(calls) > 7 else 1.0}, saved)
        out = run(8, measure, {"text": 1e9}, top=7, share=0.125)
        self.assertEqual(out.rungs, [0] * 8)
        # Seven rungs for all together, a try of each unit's first step, then one a step: not eight.
        self.assertLessEqual(len(calls), 7 + 8 + 8 * 7)

    def test_dense_where_nothing_holds(self):
        top = TOP
        out = run(3, lambda rungs: Measured({"text": 0.0 if min(rungs) == top else 1.0}, 1.0), {"text": 0.001})
        self.assertEqual(out.rungs, [top] * 3)
        self.assertEqual(out.measured.density, 1.0)

    def test_ends_at_most_passes_and_holds(self):
        calls = []

        def measure(rungs):
            calls.append(list(rungs))
            return model([0] * 6)(rungs) if len(calls) > 4 else Measured({"text": 1.0}, 1.0)
        out = run(6, measure, {"text": 0.001}, most_passes=20)
        self.assertFalse(out.whole)
        self.assertEqual(out.passes, len(calls) - TOP)
        self.assertLessEqual(out.passes, 20)

    def test_a_loss_that_is_no_number_does_not_hold(self):
        self.assertEqual(Measured({"text": math.nan, "words": 0.0}, 0.1).excess({"text": 1.0, "words": 1.0}), math.inf)
        out = run(1, lambda rungs: Measured({"text": math.nan if rungs[0] < 3 else 0.0}, float(rungs[0])), {"text": 1.0})
        self.assertEqual(out.rungs, [3])


class FrontTest(unittest.TestCase):
    def test_keeps_what_no_other_beats(self):
        measured = [Measured({"a": loss, "b": 0.0}, density) for loss, density in
                    ((0.9, 0.1), (0.95, 0.2), (0.5, 0.3), (0.5, 0.4), (-0.1, 0.6), (-0.5, 0.5), (math.nan, 0.05))]
        self.assertEqual(front(measured, {"a": 1.0, "b": 1.0}), [0, 2, 5])

    def test_the_worst_set_counts(self):
        measured = [Measured({"a": 0.0, "b": 0.4}, 0.1), Measured({"a": 0.2, "b": 0.0}, 0.2)]
        self.assertEqual(front(measured, {"a": 0.1, "b": 1.0}), [0])
        self.assertEqual(front(measured, {"a": 1.0, "b": 1.0}), [0, 1])

    def test_candidates_are_settings_and_the_last_rung_is_dense(self):
        self.assertEqual(DENSE[0], 0)
        self.assertTrue(all(threshold > 0 and window >= 1 for threshold, window in CANDIDATES))
        self.assertEqual(len(set(CANDIDATES)), len(CANDIDATES))


class FileTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = Path(self.folder.name) / "sub" / "calibration.json"
        self.made = Calibration("m-0", 2, 2, [[0.1, 2.0], [0, 1]], [[4, 16], [64, 128]], {"tokens": 8192})

    def test_saves_and_loads(self):
        save(self.path, self.made)
        self.assertEqual(load(self.path), self.made)
        self.assertEqual(load(self.path).flat_windows(), [4, 16, 64, 128])

    def test_refuses(self):
        save(self.path, self.made)
        good = json.loads(self.path.read_text())
        for change, words in (({"format": 2}, "format 2"), ({"layers": 3}, "3 lists of 2"), ({"extra": 1}, "extra"),
                              ({"windows": [[4, 16], [64, 0]]}, "windows of layer 1, KV head 1 is 0"),
                              ({"thresholds": [[0.1, -1], [0, 1]]}, "thresholds of layer 0, KV head 1 is -1"),
                              ({"thresholds": [[0.1, "x"], [0, 1]]}, "is x"), ({"kv_heads": True}, "kv_heads is True"),
                              ({"model": 3}, "model is not a text")):
            with self.subTest(words):
                self.path.write_text(json.dumps({**good, **change}))
                with self.assertRaisesRegex(ValueError, words):
                    load(self.path)
        self.path.write_text("{")
        with self.assertRaisesRegex(ValueError, "not JSON"):
            load(self.path)
        with self.assertRaises(OSError):
            load(self.path.with_name("none"))


if __name__ == "__main__":
    unittest.main()
