"""python -m headwater.patterns on a tiny random Llama. Skipped where torch or transformers is not installed; the command is
tested where matplotlib is."""

import importlib.util
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

try:
    import numpy as np
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
import tiny_model  # noqa: E402
from headwater.eval import maps, policies  # noqa: E402
from headwater.eval.attention import Stats, dense_stats, exact_rows, recall_and_error  # noqa: E402
from headwater.eval.model import EvalModel  # noqa: E402
from headwater.patterns import cli  # noqa: E402
from headwater.patterns.measure import measure  # noqa: E402

torch.set_num_threads(1)
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
STORY = "".join(f"In year {n} the river rose {n * n % 97} feet and fell again. " for n in range(30))


def command(*words) -> tuple:
    return tiny_model.command(cli.main, *words)


def random_inputs(tokens: int) -> tuple:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tokens, heads, 8, generator=draw) for heads in (4, 2, 2))


class MeasureTest(unittest.TestCase):
    def test_dense(self):
        q, k, _ = random_inputs(300)
        one = measure(0, q, k, dense_stats(), range(4))
        self.assertTrue((one.selected == np.tri(3, dtype=bool)).all())
        self.assertEqual((one.densities, float(one.recalls.min())), ([1.0] * 4, 1.0))
        self.assertTrue(np.array_equal(one.maps, maps.block_averages(q, k).numpy()))

    def test_a_mask_against_evals_recall(self):
        q, k, v = random_inputs(300)
        keep = torch.rand(4, 300, 300, generator=torch.Generator().manual_seed(1)) < 0.3
        keep[2, :, 128:256] = False
        stats = Stats("test", lambda: 0.25, lambda rows: keep[:, rows])
        rows = torch.arange(300)
        wanted, _ = recall_and_error(q, k, v, exact_rows(q, k, v, rows), stats, rows)
        causal = torch.ones(300, 300, dtype=torch.bool).tril()
        for slice_bytes in (1, 1 << 28):
            with mock.patch("headwater.patterns.measure.SCORES_BYTES", slice_bytes):
                one = measure(5, q, k, stats, [0, 2])
            np.testing.assert_allclose(one.recalls, wanted[[0, 2]].numpy(), atol=1e-5)
            density = [float((keep[head] & causal).sum() / causal.sum()) for head in (0, 2)]
            np.testing.assert_allclose(one.densities, density)
            self.assertEqual(one.selected.astype(int).tolist(),
                             [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 0, 0], [1, 0, 1]]])
            said = one.as_json()
            self.assertEqual((said["layer"], said["ran"], said["density"]), (5, "test", 0.25))
            self.assertEqual([head["head"] for head in said["heads"]], [0, 2])


class FlagsTest(unittest.TestCase):
    def test_lists_of_numbers(self):
        for text, wanted in (("all", [0, 1, 2, 3, 4]), ("3", [3]), ("4,0", [0, 4]), ("1-3,2", [1, 2, 3])):
            self.assertEqual(cli.chosen("--layers", text, 5), wanted)
        for text, says in (("5", "'5' is not in 0 to 4"), ("3-1", "'3-1' is not in"), ("x", "'x' is not a number"),
                           ("", "'' is not a number"), ("1-", "'1-' is not"), ("-1", "'-1' is not")):
            with self.subTest(text), self.assertRaisesRegex(ValueError, f"--layers={text}: {says}"):
                cli.chosen("--layers", text, 5)

    def test_token_ids(self):
        self.assertEqual(cli.token_ids("1, 2\n3,4"), [1, 2, 3, 4])
        with self.assertRaisesRegex(ValueError, "word 2, '-2', is not a token id"):
            cli.token_ids("1 -2")


@unittest.skipUnless(HAS_MATPLOTLIB, "matplotlib is not installed")
class CommandTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.model = Path(folder.name)
        tiny_model.save_model(cls.model)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.story, self.ids, self.output = (self.folder / name for name in ("story.txt", "ids.txt", "out"))
        self.story.write_text(STORY)
        self.ids.write_text(" ".join(str(i % 256) for i in range(300)))
        self.common = ("--output", self.output, "--device", "cpu")

    def test_every_policy_of_the_registry(self):
        for name in policies.names():
            with self.subTest(name):
                status, out, err = command(self.model, "--token_file", self.ids, "--policy", name, "--layers", "1",
                                           *self.common)
                if status == 1:  # a policy for GPUs alone says so
                    self.assertIn(f"headwater.patterns: {name}: ", err)
                    continue
                self.assertEqual(status, 0, err)
                self.assertIn("| 1 | ", out)

    def test_pictures_and_numbers(self):
        spec = "a_shape:sink_tokens=1,window_tokens=64"
        status, out, err = command(self.model, "--prompt", self.story, "--tokens", 700, "--policy", spec, "--layers", "0,2",
                                   "--heads", "1-3", *self.common)
        self.assertEqual(status, 0, err)
        pictures = ["layer_00.png", "layer_02.png", "summary.png"]
        self.assertEqual({path.name for path in self.output.iterdir()}, {*pictures, "patterns.json"})
        for name in pictures:
            self.assertEqual((self.output / name).read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        found = json.loads((self.output / "patterns.json").read_text())
        self.assertEqual((found["policy"], found["tokens"], found["dtype"]), (spec, 700, "f32"))
        self.assertEqual([layer["layer"] for layer in found["layers"]], [0, 2])
        wanted = policies.make(spec).density(700)
        for layer in found["layers"]:
            self.assertEqual([head["head"] for head in layer["heads"]], [1, 2, 3])
            self.assertAlmostEqual(layer["density"], wanted, places=5)
            for head in layer["heads"]:
                self.assertAlmostEqual(head["density"], wanted, places=5)
                self.assertTrue(0 < head["recall_p1"] <= head["recall"] < 1)

    def test_what_is_wrong_is_said_with_status_2(self):
        for name, text in (("short.txt", "once"), ("words.txt", "1 2 three"), ("large.txt", "257 " * 300)):
            (self.folder / name).write_text(text)
        for words, says in (
                (("/no/such", "--prompt", self.story), "no directory with a config.json"),
                ((self.model, "--prompt", "/no/such.txt"), "text /no/such.txt: no such file"),
                ((self.model, "--token_file", "/no/such.txt"), "/no/such.txt: No such file"),
                ((self.model, "--token_file", self.folder / "words.txt"), "words.txt: word 3, 'three', is not a token id"),
                ((self.model, "--token_file", self.folder / "large.txt"), "token id 257; the vocabulary"),
                ((self.model, "--prompt", self.folder / "short.txt"), "short.txt has 4 tokens; at least 256"),
                ((self.model, "--prompt", self.story, "--tokens", "255"), "--tokens=255; 256 to the"),
                ((self.model, "--prompt", self.story, "--tokens", "9999"), "--tokens=9999; 256 to the"),
                ((self.model, "--prompt", self.story, "--layers", "3"), "--layers=3: '3' is not in 0 to 2"),
                ((self.model, "--prompt", self.story, "--heads", "x"), "--heads=x: 'x' is not a number"),
                ((self.model, "--prompt", self.story, "--policy", "x"), "policy 'x' is not one of"),
                ((self.model, "--prompt", self.story, "--policy", "probe:x=1"), "no parameter 'x=1'")):
            with self.subTest(says):
                status, out, err = command(words[0], "--policy", "dense", *self.common, *words[1:])
                self.assertEqual((status, out), (2, ""), err)
                self.assertIn(says, err)
                self.assertEqual(err.count("\n"), 1)
        self.assertFalse(self.output.exists())

    def test_without_matplotlib(self):
        with mock.patch("importlib.util.find_spec", return_value=None):
            status, _, err = command(self.model, "--prompt", self.story, "--policy", "dense", *self.common)
        self.assertEqual((status, err), (2, "headwater.patterns: matplotlib is not installed (pip install matplotlib)\n"))

    def test_a_policy_that_fails_is_named(self):
        class Broken:
            def attend(self, layer, q, k, v):
                raise NotImplementedError("no such kernel")

        with mock.patch.object(policies, "make", return_value=Broken()):
            status, _, err = command(self.model, "--prompt", self.story, "--policy", "broken", *self.common)
        self.assertEqual((status, err), (1, "headwater.patterns: broken: NotImplementedError: no such kernel\n"))

    def test_ctrl_c_keeps_the_pictures_of_finished_layers(self):
        def interrupted(layer, *rest):
            if layer == 1:
                raise KeyboardInterrupt
            return measure(layer, *rest)

        with mock.patch.object(cli, "measure", interrupted):
            status, _, err = command(self.model, "--token_file", self.ids, "--policy", "dense", *self.common)
        self.assertEqual(status, 130)
        self.assertIn("headwater.patterns: broken off", err)
        self.assertEqual([path.name for path in self.output.iterdir()], ["layer_00.png"])

    def test_the_policys_own_run_is_measured(self):
        """Layer 1 sees what the policy left of layer 0."""
        policy = policies.make("a_shape:sink_tokens=1,window_tokens=64")
        model = EvalModel.load(self.model, "cpu", torch.float32)
        keys = []
        ids = [i % 256 for i in range(300)]
        for one in (policy, policies.make("dense")):
            model.prefill(ids, maps.Tap(one, lambda layer, q, k, stats: keys.append(k.clone()) if layer == 1 else None))
        self.assertGreater((keys[0] - keys[1]).abs().max(), 0.01)


if __name__ == "__main__":
    unittest.main()
