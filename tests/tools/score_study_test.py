"""tools/score_study.py on random heads. Skipped where torch or transformers is not installed."""

import argparse
import sys
import unittest
from pathlib import Path

try:
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]
import score_study  # noqa: E402
from policy_masks import Layer  # noqa: E402

torch.set_num_threads(1)
TOKENS, GROUP, DIM = 1024, 4, 16


def head(seed=1, group=GROUP, tokens=TOKENS):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, DIM, generator=draw) for heads in (2 * group, 2, 2))
    return score_study.Head(Layer(0, 2 * q, 2 * k, v), 1, group, "cpu")


def settings(**changes):
    return argparse.Namespace(**{"sink_blocks": 1, "window_blocks": 1, "recall": 0.95, "rows": 40, "densities": [0.5, 1.0], **changes})


class HeadTest(unittest.TestCase):
    def test_exact_scores_are_the_masses_of_the_tiles_rows(self):
        one = head()
        scores = one.scores()
        self.assertTrue(torch.allclose(scores["exact"].sum(1), torch.ones(one.tiles), atol=1e-5))
        rows = torch.arange(one.positions) + 9 * one.positions
        masses = one.logits(rows).softmax(-1).view(len(rows), GROUP, -1, 128).sum(-1).mean((0, 1))
        self.assertTrue(torch.allclose(scores["exact"][9], masses, atol=1e-6))

    def test_scores_are_of_blocks_that_the_whole_tile_sees(self):
        one = head()
        for name, score in one.scores().items():
            seen = one.visible if name.startswith("exact") else one.complete
            self.assertEqual(float(score[~seen].abs().sum()), 0, name)
            self.assertTrue((score >= 0).all(), name)

    def test_what_lists_everything_has_no_error_and_what_lists_less_has_one(self):
        one, rows = head(), torch.arange(300, 1000, 50)
        self.assertLess(one.error(one.visible, rows), 1e-5)
        self.assertGreater(one.error(one.visible & ~one.complete, rows), 1e-2)

    def test_order_begins_with_what_is_always_listed(self):
        one = head()
        always = one.visible & (one.block < 1)
        order = one.order(one.scores()["exact"], always)
        count = int(always.sum())
        self.assertTrue(always.flatten()[order[:count]].all())
        self.assertTrue(one.visible.flatten()[order[:int(one.visible.sum())]].all())

    def test_refuses_what_does_not_divide(self):
        with self.assertRaisesRegex(ValueError, "3 query heads a KV head"):
            head(group=3)
        with self.assertRaisesRegex(ValueError, "1000 tokens"):
            head(tokens=1000)


class StudyTest(unittest.TestCase):
    def test_figures(self):
        found = {}
        score_study.study(head(), settings(), found)
        needed, recall, error, whole, none = found["exact"][0]
        self.assertTrue(0 < needed < 1 and 0 < recall < 1)
        self.assertGreater(error, none)
        self.assertAlmostEqual(whole, 1, places=4)
        self.assertLess(none, 1e-5)
        for name, ((others, held, *_),) in found.items():
            self.assertGreaterEqual(others, needed, f"{name}: none needs less than exact scores")
            self.assertLessEqual(held, recall + 1e-6, name)


if __name__ == "__main__":
    unittest.main()
