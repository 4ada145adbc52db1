"""headwater.cluster without a model: the file, maps as points, the tree, its cut, what is shared. Skipped where NumPy is not
installed; linkage is compared with SciPy where that is."""

import json
import math
import sys
import tempfile
import unittest
from pathlib import Path

try:
    import numpy as np
except ImportError:
    print("skipped: numpy is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater import cluster  # noqa: E402
from headwater.cluster import choose, embed  # noqa: E402
from headwater.cluster.file import save  # noqa: E402

TEST = {"pivot": [0, 0], "heads": 1, "recall_min": 0.9, "recall_mean": 0.95, "density": 0.25, "distance_p90": 0.1, "why": ""}
CALIBRATION = {"texts": ["a"], "held_out": "b", "tokens": 4096, "block_tokens": 128, "dims": 64, "max_distance": 0.4,
               "tolerance": 0.02, "max_density": 0.5, "tests": {"0": TEST}}
FILE = {"format": 1, "model": "m-0", "layers": 2, "heads": 2, "gamma": 0.9,
        "clusters": {"0": [[0, 0], [1, 1]], "1": [[0, 1]], "2": [[1, 0]]}, "shared_clusters": ["0"],
        "calibration": CALIBRATION}


def random_maps(heads: int, blocks: int, seed: int = 0) -> np.ndarray:
    maps = np.random.default_rng(seed).random((heads, blocks, blocks)) ** 4 * np.tri(blocks)
    return maps / maps.sum(axis=-1, keepdims=True)


class FileTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "in" / "clusters.json"

    def refuse(self, text: str, says: str):
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(text)
        with self.assertRaises(ValueError) as caught:
            cluster.load(self.path)
        self.assertIn(f"clusters {self.path}: ", str(caught.exception))
        self.assertIn(says, str(caught.exception))

    def test_what_is_saved_is_read(self):
        wanted = cluster.Clusters("m-0", 2, 2, 0.9, {0: ((0, 0), (1, 1)), 1: ((0, 1),), 2: ((1, 0),)}, frozenset({0}),
                                  CALIBRATION)
        save(self.path, wanted)
        self.assertEqual(cluster.load(self.path), wanted)
        self.assertEqual(json.loads(self.path.read_text()), FILE)
        self.assertEqual(wanted.cluster_of(), {(0, 0): 0, (1, 1): 0, (0, 1): 1, (1, 0): 2})
        self.assertEqual([path.name for path in self.path.parent.iterdir()], ["clusters.json"])

    def test_heads_may_be_left_out(self):
        self.path.parent.mkdir()
        self.path.write_text(json.dumps({**FILE, "clusters": {"0": [[0, 0], [1, 1]]}}))
        self.assertEqual(len(cluster.load(self.path).cluster_of()), 2)

    def test_wrong_fields(self):
        for change, says in (
                ({"format": 2}, "format 2; 1 is wanted"), ({"extra": 1}, "unknown key 'extra'"),
                ({"layers": 0}, "layers is 0"), ({"layers": True}, "layers is true"), ({"heads": 2.0}, "heads is 2.0"),
                ({"gamma": 1}, "gamma is 1"), ({"gamma": "0.9"}, 'gamma is "0.9"'), ({"model": None}, "model is null"),
                ({"clusters": []}, "clusters is []"), ({"clusters": {"0": 5}}, "clusters[0] is 5"),
                ({"clusters": {"0": []}}, "clusters[0] is empty"), ({"clusters": {"x": [[0, 0]]}}, "cluster id 'x'"),
                ({"clusters": {"01": [[0, 0]]}}, "cluster id '01'"),
                ({"clusters": {"9" * 5000: [[0, 0]]}}, "cluster id '999"),
                ({"clusters": {"0": [[2, 0]]}}, "clusters[0] has [2, 0]; layers are 0 to 1 and heads 0 to 1"),
                ({"clusters": {"0": [[0, -1]]}}, "has [0, -1]"), ({"clusters": {"0": [[0]]}}, "[layer, head] is wanted"),
                ({"clusters": {"0": [[0, True]]}}, "[layer, head] is wanted"),
                ({"clusters": {"0": [[0, 0], [1, 1], [0, 0]]}}, "layer 0, head 0 is in clusters 0 and 0"),
                ({"clusters": {"0": [[0, 0], [1, 1]], "1": [[1, 1]]}}, "layer 1, head 1 is in clusters 0 and 1"),
                ({"shared_clusters": ["3"]}, "'3', which is not in clusters"),
                ({"shared_clusters": [0]}, "cluster id '0'; a string"),
                ({"shared_clusters": ["1"]}, "'1', which has one head"),
                ({"shared_clusters": ["0", "0"]}, "'0' twice"), ({"shared_clusters": "0"}, 'shared_clusters is "0"'),
                ({"calibration": {**CALIBRATION, "seed": 1}}, "unknown key 'seed'"),
                ({"calibration": {**CALIBRATION, "texts": []}}, "texts is []"),
                ({"calibration": {**CALIBRATION, "tolerance": 2}}, "tolerance is 2"),
                ({"calibration": {**CALIBRATION, "tests": {"7": TEST}}}, "tests[7] is of no cluster"),
                ({"calibration": {**CALIBRATION, "tests": {"0": {**TEST, "pivot": [0, 1]}}}}, "pivot is not in the cluster"),
                ({"calibration": {**CALIBRATION, "tests": {"0": {**TEST, "x": 1}}}}, "unknown key 'x'")):
            with self.subTest(says):
                self.refuse(json.dumps({**FILE, **change}), says)
        for key in FILE:
            self.refuse(json.dumps({name: value for name, value in FILE.items() if name != key}), f"lacks '{key}'")

    def test_what_is_no_such_file(self):
        for text, says in (("", "Expecting value"), ("{", "Expecting property name"), ("[]", "the file is not an object"),
                           ('{"a": 1, "a": 2}', "'a' is there twice"), ('{"gamma": NaN}', "NaN is no number"),
                           ("[" * 100000, "nested too deep")):
            with self.subTest(says):
                self.refuse(text, says)
        with self.assertRaisesRegex(ValueError, "absent.json: No such file"):
            cluster.load(self.path.parent / "absent.json")


class EmbedTest(unittest.TestCase):
    def test_area_resize_of_hand_values(self):
        np.testing.assert_allclose(embed.overlaps(4, 2), [[1, 1, 0, 0], [0, 0, 1, 1]])
        np.testing.assert_allclose(embed.overlaps(2, 3), [[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]], atol=1e-12)
        square = np.array([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.25, 0.25, 0.25, 0.25]]])
        np.testing.assert_allclose(embed.resize(square, 2), [[[1, 0], [0.25, 0.75]]])
        np.testing.assert_allclose(embed.resize(random_maps(3, 11), 7).sum(axis=-1), 1)

    def test_columns_by_distance(self):
        square = np.array([[[1, 0, 0], [2, 3, 0], [4, 5, 6]]])
        self.assertEqual(embed.by_distance(square).tolist(), [[[1, 0, 0], [3, 2, 0], [6, 5, 4]]])

    def test_lengths_compare(self):
        """A kind of head at 16 blocks is nearer to itself at 32 than to the other kinds."""
        def kinds(blocks: int) -> np.ndarray:
            row, column = np.arange(blocks)[:, None], np.arange(blocks)
            sink, window = (column < blocks // 8) | (row < 0), row - column < blocks // 8
            maps = np.stack([sink, window, np.ones((blocks, blocks))]) * np.tri(blocks)
            return maps / maps.sum(axis=-1, keepdims=True)

        small, large = (np.stack([embed.resize(one) for one in kinds(blocks)]) for blocks in (16, 32))
        between = np.abs(small[:, None] - large).sum(axis=-1).mean(axis=-1)
        self.assertLess(between.diagonal().max() * 3, between[~np.eye(3, dtype=bool)].min())

    def test_distances_of_points_are_those_of_the_logarithms(self):
        maps = random_maps(12, 9)
        logs = [np.log(embed.LEAST_MASS + embed.resize(one)).reshape(12, -1) for one in (maps, embed.by_distance(maps))]
        full = np.concatenate(logs, axis=1)
        wanted = np.linalg.norm(full[:, None] - full, axis=-1)
        points = embed.embed(maps)
        np.testing.assert_allclose(embed.distances(points), wanted, atol=1e-6)
        self.assertEqual(embed.embed(maps, 3).shape, (12, 3))
        self.assertEqual(embed.embed(maps[:1]).shape, (1, 1))


class TreeTest(unittest.TestCase):
    def test_linkage_of_hand_values(self):
        place = np.array([0.0, 1, 5, 7, 20])
        merges = embed.linkage(np.abs(place[:, None] - place))
        np.testing.assert_allclose(merges, [[0, 1, 1, 2], [2, 3, 2, 2], [5, 6, 5.5, 4], [4, 7, 16.75, 5]])
        self.assertEqual([sorted(some) for some in embed.leaves(merges)[5:]], [[0, 1], [2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
        self.assertEqual(embed.linkage(np.zeros((1, 1))).shape, (0, 4))
        self.assertEqual(embed.linkage(np.zeros((4, 4)))[:, 2].tolist(), [0, 0, 0])

    def test_linkage_is_scipys(self):
        try:
            from scipy.cluster import hierarchy
            from scipy.spatial.distance import squareform
        except ImportError:
            self.skipTest("scipy is not installed")
        for count in (2, 3, 10, 150):
            points = np.random.default_rng(count).standard_normal((count, 5))
            distance = embed.distances(points)
            wanted = hierarchy.linkage(squareform(distance, checks=False), "average")
            np.testing.assert_allclose(embed.linkage(distance), wanted, atol=1e-9)

    def test_cut(self):
        place = np.array([0.0, 20, 1, 5, 7])
        merges = embed.linkage(np.abs(place[:, None] - place))
        for most, wanted in ((3, [[0, 2], [1], [3, 4]]), (0.5, [[0], [1], [2], [3], [4]]), (99, [[0, 1, 2, 3, 4]])):
            found = choose.cut(merges, lambda members, most=most: np.ptp(place[members]) < most)
            self.assertEqual([members.tolist() for members in found], wanted)
        self.assertEqual([one.tolist() for one in choose.cut(np.zeros((0, 4)), lambda members: False)], [[0]])


class ChooseTest(unittest.TestCase):
    def test_js_distances(self):
        found = choose.js_distances(np.array([[1, 0], [0, 1], [0.5, 0.5], [1, 0]]))
        half = math.sqrt(0.5 * (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)))
        most = math.sqrt(math.log(2))
        wanted = [[0, most, half, 0], [most, 0, half, most], [half, half, 0, half], [0, most, half, 0]]
        np.testing.assert_allclose(found, wanted, atol=1e-12)
        self.assertEqual(choose.pairs_p90(found, np.array([0, 3])), 0)
        self.assertAlmostEqual(choose.pairs_p90(found, np.array([0, 1, 3])), most)

    def test_patterns(self):
        average = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.3, 0.1, 0.6]])
        for gamma, wanted in ((0.5, [[1, 0, 0], [1, 0, 0], [0, 0, 1]]), (0.55, [[1, 0, 0], [1, 1, 0], [0, 0, 1]]),
                              (0.88, [[1, 0, 0], [1, 1, 0], [1, 0, 1]]), (0.99, [[1, 0, 0], [1, 1, 0], [1, 1, 1]])):
            self.assertEqual(choose.patterns_of(average, gamma).astype(int).tolist(), wanted)
        maps = random_maps(5, 20)
        chosen = choose.patterns_of(maps, 0.8)
        self.assertGreaterEqual(np.where(chosen, maps, 0).sum(axis=-1).min(), 0.8)
        self.assertEqual(chosen.shape, maps.shape)

    def test_what_is_shared(self):
        """Two heads a layer. Pivot 0 looks at the diagonal; head 2 too, head 4 half, heads 1 and 3 everywhere."""
        diagonal, even = np.eye(8), np.tri(8) / np.arange(1, 9)[:, None]
        maps = np.stack([diagonal, even, diagonal, even, (diagonal + even) / 2])
        rows = np.full(8, 128)
        limits = dict(gamma=0.9, tolerance=0.02, max_density=0.5)

        def why(*members) -> str:
            return choose.why_not(choose.try_pivot(maps, members, 2, rows, 0.9), 2, **limits)

        self.assertEqual(why(0, 2), "")
        self.assertEqual(why(0, 1), "all heads are in one layer")
        self.assertIn("of layer 2, head 0", why(0, 2, 4))
        self.assertEqual(why(1, 3), "density 1.000")
        trial = choose.try_pivot(maps, [0, 1, 2, 4], 2, rows, 0.9)
        self.assertEqual((trial.later, trial.density), ([2, 4], 8 / 36))
        half = np.mean([(1 + 1 / n) / 2 for n in range(1, 9)])
        np.testing.assert_allclose(trial.recall, [1, half])
        rows[-1] = 0  # a last block without rows does not count
        half = np.mean([(1 + 1 / n) / 2 for n in range(1, 8)])
        self.assertAlmostEqual(choose.try_pivot(maps, [0, 4], 2, rows, 0.9).worst(), half)


if __name__ == "__main__":
    unittest.main()
