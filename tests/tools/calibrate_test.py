"""headwater.calibrate without a GPU: the search on made-up losses, and the file."""

import json
import math
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater.calibrate import search as calibrate_search  # noqa: E402
from headwater.calibrate.file import Calibration, load, save  # noqa: E402
from headwater.calibrate.search import (DENSE, FIRST, START, THRESHOLDS, WEIGHINGS, WINDOWS, Measured,  # noqa: E402
                                        OutOfTime, neighbours)
from headwater.calibrate.search import search as search_by  # noqa: E402


DENSITY = {2.0: 0.01, 0.2: 0.05, 0.1: 0.1, 0.05: 0.2, 0.02: 0.4, 0.005: 0.6}


def search(units, rank, judge, budgets, **more):
    return search_by(units, lambda base, settings: rank(settings), judge, budgets, **more)


def density(setting):
    return 1.0 if setting == DENSE else DENSITY[setting[0]] + setting[1] / 1000


def rank(setting):
    return len(THRESHOLDS) if setting == DENSE else THRESHOLDS.index(setting[0])


def model(needs, loss=1.0):
    """needs: (threshold, window) that each unit cannot do without; a step less of either loses `loss`."""
    def measure(settings):
        lacking = sum(max(0, rank(need) - rank(one)) + max(0, WINDOWS.index(need[1]) - WINDOWS.index(one[1]))
                      for need, one in zip(needs, settings))
        return Measured({"text": loss * lacking}, sum(map(density, settings)) / len(settings))
    return measure


class SearchTest(unittest.TestCase):
    def test_units_come_down_to_what_they_need(self):
        needs = [(2.0, 4), (0.1, 16), (2.0, 128), (0.05, 4), (0.005, 64), (2.0, 4)]
        out = search(6, model(needs), model(needs), {"text": 0.5})
        self.assertEqual(out.settings, needs)
        self.assertTrue(out.whole)
        self.assertEqual(out.measured.loss, {"text": 0.0})
        self.assertEqual(out.history[-1], (0.0, out.measured.density))

    def test_a_budget_is_spent_where_it_saves_most(self):
        # Room for one step too few: 0.4 to 0.2 saves more than 0.1 to 0.05.
        out = search(2, model([(0.02, 4), (0.1, 4)]), model([(0.02, 4), (0.1, 4)]), {"text": 1.0})
        self.assertEqual(out.settings, [(0.05, 4), (0.1, 4)])

    def test_sets_have_budgets_of_their_own(self):
        def measure(settings):
            found = model([(2.0, 4)] * 2)(settings)
            return Measured({"text": 0.0, "words": 0.01 if rank(settings[1]) < 3 else 0.0}, found.density)
        out = search(2, measure, measure, {"text": 0.001, "words": 0.001})
        self.assertEqual(out.settings, [(2.0, 4), (0.05, 4)])

    def test_what_breaks_the_budget_together_only(self):
        def measure(settings):  # one of the two may be low: no change alone shows it
            found = model([(2.0, 4)] * 2)(settings)
            return Measured({"text": 1.0 if rank(settings[0]) + rank(settings[1]) < 4 else 0.0}, found.density)
        out = search(2, measure, measure, {"text": 0.5})
        self.assertLessEqual(out.measured.spent({"text": 0.5}), 1)
        self.assertLess(out.measured.density, 0.4)

    def test_weighs_the_set_that_is_short(self):
        # By both sets together the third unit would follow the first, whose set then has no room; the second costs the other set.
        saves, loses = (0.5, 0.35, 0.4), ({"a": 0.9, "b": 0.0}, {"a": 0.0, "b": 0.9}, {"a": 0.9, "b": 0.0})

        def measure(settings):
            low = [setting == (2.0, 4) for setting in settings]
            if any(setting not in (START, DENSE, (2.0, 4)) for setting in settings):
                return Measured({"a": math.nan, "b": math.nan}, 0.5)
            return Measured({name: sum(lost[name] for lost, is_low in zip(loses, low) if is_low) for name in "ab"},
                            1 - sum(saved for saved, is_low in zip(saves, low) if is_low) / 3)
        out = search(3, measure, measure, {"a": 1.0, "b": 1.0})
        self.assertEqual([setting == (2.0, 4) for setting in out.settings], [True, True, False])
        with mock.patch.object(calibrate_search, "WEIGHINGS", 1):
            out = search(3, measure, measure, {"a": 1.0, "b": 1.0})
        self.assertEqual([setting == (2.0, 4) for setting in out.settings], [True, False, False])

    def test_partly_dense_where_little_holds(self):
        # Half of the units must be dense, and all that single changes tell points the other way.
        def measure(settings):
            dense = sum(setting == DENSE for setting in settings)
            return Measured({"text": 0.0 if dense >= 2 else 5.0 - dense}, sum(map(density, settings)) / 4)
        out = search(4, measure, measure, {"text": 1.0})
        self.assertEqual(sum(setting == DENSE for setting in out.settings), 2)

    def test_dense_where_nothing_holds(self):
        def measure(settings):
            return Measured({"text": 0.0 if all(one == DENSE for one in settings) else 1.0}, 0.5)
        out = search(3, measure, measure, {"text": 0.001})
        self.assertEqual(out.settings, [DENSE] * 3)
        self.assertEqual(out.measured.density, 1.0)

    def test_dense_for_a_unit_that_needs_it(self):
        def measure(settings):
            return Measured({"text": 0.0 if settings[0] == DENSE else 1.0 - 0.1 * rank(settings[0]) - settings[0][1] / 1000},
                            sum(map(density, settings)) / 2)
        out = search(2, measure, measure, {"text": 0.1})
        self.assertEqual(out.settings, [DENSE, (2.0, 4)])

    def test_ends_at_most_passes_and_holds(self):
        calls = []

        def measure(settings):
            calls.append(list(settings))
            return model([(2.0, 4)] * 6)(settings)
        changes = 6 * (len(FIRST) - 1)
        first = 1 + 1 + changes + WEIGHINGS * (changes + 6).bit_length()
        out = search(6, measure, measure, {"text": 0.001}, most_passes=first)
        self.assertFalse(out.whole)
        self.assertEqual(out.passes, len(calls))
        self.assertLessEqual(out.passes, first)
        self.assertEqual(out.settings, [(2.0, 4)] * 6)
        calls.clear()
        self.assertEqual(search(6, measure, measure, {"text": 0.001}, most_passes=first - 1).settings, [START] * 6)
        self.assertEqual(len(calls), 1)

    def test_goes_on_from_what_is_given(self):
        needs, calls = [(0.1, 16), (0.05, 4)], []

        def measure(settings):
            calls.append(list(settings))
            return model(needs)(settings)
        start = [(0.05, 16), (0.05, 4)]
        out = search(2, measure, measure, {"text": 0.5}, start=start)
        self.assertEqual(calls[0], start)
        self.assertEqual(out.settings, needs)
        for call in calls[2:2 + len(neighbours(start[0])) + len(neighbours(start[1]))]:
            self.assertEqual(sum(one != other for one, other in zip(call, start)), 1)

    def test_out_of_time_chooses_among_what_was_ranked(self):
        needs, ranked = [(2.0, 4), (2.0, 4), (2.0, 4)], []

        def rank_some(settings):
            if len(ranked) == 1 + 2 * (len(FIRST) - 1):
                raise OutOfTime
            ranked.append(settings)
            return model(needs)(settings)
        out = search(3, rank_some, model(needs), {"text": 1.0})
        self.assertEqual((out.settings, out.whole), ([(2.0, 4), (2.0, 4), START], False))

    def test_dense_where_there_is_no_time_at_all(self):
        def late(settings):
            raise OutOfTime
        out = search(2, late, model([(0.005, 128)] * 2), {"text": 1.0})
        self.assertEqual((out.settings, out.whole), ([DENSE] * 2, False))

    def test_every_better_answer_is_kept(self):
        kept = []
        needs = [(2.0, 4), (0.1, 16), (2.0, 128)]
        out = search(3, model(needs), model(needs), {"text": 0.5}, keep=kept.append)
        self.assertEqual(kept[-1].settings, out.settings)
        densities = [one.measured.density for one in kept]
        self.assertEqual(densities, sorted(densities, reverse=True))
        self.assertGreater(len(kept), 1)
        self.assertFalse(any(one.whole for one in kept))

    def test_a_loss_that_is_no_number_does_not_hold(self):
        self.assertEqual(Measured({"text": math.nan, "words": 0.0}, 0.1).spent({"text": 1.0, "words": 1.0}), math.inf)

        def measure(settings):
            return Measured({"text": math.nan if rank(settings[0]) < 3 else 0.0}, density(settings[0]))
        self.assertEqual(search(1, measure, measure, {"text": 1.0}).settings, [(0.05, 4)])

    def test_neighbours_are_a_step_away(self):
        self.assertEqual(neighbours(DENSE), [(0.005, 128)])
        self.assertEqual(set(neighbours((2.0, 4))), {(0.2, 4), (2.0, 16)})
        self.assertEqual(set(neighbours((0.1, 16))), {(0.2, 16), (0.05, 16), (0.1, 4), (0.1, 64)})
        self.assertEqual(set(neighbours((0.005, 128))), {(0.02, 128), (0.005, 64), DENSE})
        self.assertIn(START, FIRST)
        self.assertTrue(set(FIRST) <= {DENSE} | {(threshold, window) for threshold in THRESHOLDS for window in WINDOWS})


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
