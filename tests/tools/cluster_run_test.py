"""python -m headwater.cluster and headwater.eval.maps on a tiny random Llama. Skipped where torch or transformers is not
installed; pictures are tested where matplotlib is."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
try:
    import numpy as np
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

sys.path.insert(0, str(ROOT / "python"))
import tiny_model  # noqa: E402
from headwater import cluster  # noqa: E402
from headwater.cluster import cli  # noqa: E402
from headwater.eval import maps, policies  # noqa: E402
from headwater.eval.model import EvalModel  # noqa: E402

torch.set_num_threads(1)
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
STORY = "".join(f"In year {n} the river rose {n * n % 97} feet and fell again. " for n in range(60))
OTHER = "".join(f"def f{n}(x):\n    return x + {n * 7 % 31}\n" for n in range(60))


def command(*words) -> tuple:
    return tiny_model.command(cli.main, *words)


class MapsTest(unittest.TestCase):
    def brute(self, q, k, block):
        tokens, group = len(k), q.shape[1] // k.shape[1]
        blocks = -(-tokens // block)
        wanted = torch.zeros(q.shape[1], blocks, blocks, dtype=torch.float64)
        for head in range(q.shape[1]):
            for row in range(tokens):
                scores = k[:row + 1, head // group].double() @ q[row, head].double() / math.sqrt(q.shape[2])
                rows = min(block, tokens - row // block * block)
                for key, mass in enumerate(torch.softmax(scores, dim=0)):
                    wanted[head, row // block, key // block] += mass / rows
        return wanted.float()

    def test_averages_of_all_sizes_of_slices(self):
        draw = torch.Generator().manual_seed(0)
        for tokens in (64, 70, 5):
            q, k = (torch.randn(tokens, heads, 8, generator=draw) for heads in (4, 2))
            wanted = self.brute(q, k, 16)
            for slice_bytes in (1, 3 * 4 * 16 * tokens, 1 << 20):
                found = maps.block_averages(q, k, block=16, slice_bytes=slice_bytes)
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
            found = maps.block_averages(q, k, block=16, heads=[3, 1])
            torch.testing.assert_close(found, wanted[[3, 1]], atol=1e-5, rtol=0)

    def test_every_row_is_visited_once(self):
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(70, heads, 8, generator=draw) for heads in (4, 2))
        seen = np.zeros((2, 70))

        def visit(place, first, end, mass):
            self.assertEqual(mass.shape, (end - first, end))
            seen[place, first:end] += mass.sum(dim=1).numpy()

        maps.block_averages(q, k, block=16, heads=[0, 2], visit=visit, slice_bytes=1)
        np.testing.assert_allclose(seen, 1, atol=1e-5)


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
        for name, text in (("story", STORY), ("other", OTHER), ("short", "once")):
            (self.folder / f"{name}.txt").write_text(text)
        self.story, self.other, self.output = (self.folder / name for name in ("story.txt", "other.txt", "clusters.json"))
        self.common = ("--output", self.output, "--tokens", 600, "--device", "cpu")

    def test_a_run_twice_gives_the_same_file(self):
        status, out, err = command(self.model, "--texts", self.story, self.other, *self.common, "--gamma", 0.5,
                                   "--max_distance", 0.8, "--max_density", 1)
        self.assertEqual(status, 0, err)
        self.assertIn("story, layer 3 of 3", err)
        first = self.output.read_bytes()
        self.output.unlink()
        self.assertEqual(command(self.model, "--texts", self.story, self.other, *self.common, "--gamma", 0.5,
                                 "--max_distance", 0.8, "--max_density", 1)[:2], (0, out))
        self.assertEqual(self.output.read_bytes(), first)
        found = cluster.load(self.output)
        self.assertEqual((found.layers, found.heads, found.gamma), (3, 4, 0.5))
        self.assertEqual(sorted(found.cluster_of()), [(layer, head) for layer in range(3) for head in range(4)])
        self.assertRegex(found.model, rf"^{self.model.name}-[0-9a-f]{{16}}$")
        self.assertEqual(found.calibration["texts"], ["story", "other"])
        self.assertEqual(found.calibration["held_out"], "story, second window")
        self.assertTrue(found.shared)
        for name in found.shared:
            test = found.calibration["tests"][str(name)]
            self.assertGreaterEqual(test["recall_min"], 0.48)
            self.assertLess(test["distance_p90"], 0.8)

    def test_heads_that_are_the_same_share(self):
        """Layers are copies that attention's output does not reach: each head is the same in all three."""
        model = tiny_model.tiny()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.load_state_dict(model.model.layers[0].state_dict())
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        args = cli.parser().parse_args(["m", "--texts", "t", "--output", "o", "--tokens", "600", "--max_density", "1"])
        ids = torch.randint(0, 257, (2, 600), generator=torch.Generator().manual_seed(1)).tolist()
        measured = cli.calibrate(EvalModel(model), {"t": ids[0]}, ids[1], lambda text: None)
        found = cli.build(args, "m", ["t"], "h", *measured)[0]
        owner = found.cluster_of()
        for head in range(4):
            self.assertEqual(owner[(0, head)], owner[(2, head)])
            self.assertIn(owner[(0, head)], found.shared)

    def test_a_held_out_text(self):
        status, _, err = command(self.model, "--texts", self.story, "--held_out", self.other, *self.common)
        self.assertEqual(status, 0, err)
        self.assertEqual(cluster.load(self.output).calibration["held_out"], "other")

    @unittest.skipUnless(HAS_MATPLOTLIB, "matplotlib is not installed")
    def test_report(self):
        status, _, err = command(self.model, "--texts", self.story, *self.common, "--report", self.folder / "report",
                                 "--max_distance", 0.8, "--gamma", 0.5)
        self.assertEqual(status, 0, err)
        pictures = sorted(path.name for path in (self.folder / "report").iterdir())
        self.assertEqual(pictures, ["clusters_1.png", "distances.png"])
        for name in pictures:
            self.assertEqual((self.folder / "report" / name).read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_what_is_wrong_is_said_with_status_2(self):
        (self.folder / "empty").mkdir()
        (self.folder / "copy").mkdir()
        (self.folder / "copy" / "story.txt").write_text(STORY)
        for words, says in (
                (("/no/such", "--texts", self.story), "no directory with a config.json"),
                ((self.folder / "empty", "--texts", self.story), "no directory with a config.json"),
                ((self.model, "--texts", "/no/such.txt"), "text /no/such.txt: no such file"),
                ((self.model, "--texts", self.folder / "short.txt"), "short.txt has 4 tokens; 600 are wanted"),
                ((self.model, "--texts", self.story, "--held_out", self.folder / "short.txt"), "has 4 tokens"),
                ((self.model, "--texts", self.story, "--held_out", self.story), "is one of --texts"),
                ((self.model, "--texts", self.story, self.folder / "copy" / "story.txt"), "two texts named 'story'"),
                ((self.model, "--texts", self.story, "--tokens", "2000"), "4000 tokens, of which the second half"),
                ((self.model, "--texts", self.story, "--tokens", "511"), "--tokens=511; at least 512"),
                ((self.model, "--texts", self.story, "--gamma", "1"), "--gamma=1.0"),
                ((self.model, "--texts", self.story, "--tolerance", "-1"), "--tolerance=-1.0"),
                ((self.model, "--texts", self.story, "--dims", "0"), "--dims=0")):
            with self.subTest(says):
                status, out, err = command(words[0], *self.common, *words[1:])
                self.assertEqual((status, out), (2, ""), err)
                self.assertIn(says, err)
                self.assertEqual(err.count("\n"), 1)
        self.assertFalse(self.output.exists())

    def test_a_prompt_over_the_models_limit(self):
        self.story.write_text(STORY * 3)
        status, _, err = command(self.model, "--texts", self.story, *self.common, "--tokens", 2049)
        self.assertEqual(status, 2)
        self.assertIn("is for 2048 at most", err)

    def test_a_report_without_matplotlib(self):
        with mock.patch("importlib.util.find_spec", return_value=None):
            status, _, err = command(self.model, "--texts", self.story, *self.common, "--report", self.folder / "report")
        self.assertEqual(status, 2)
        self.assertIn("--report: matplotlib is not installed", err)

    def test_ctrl_c_leaves_no_file(self):
        words = [sys.executable, "-u", "-m", "headwater.cluster", self.model, "--texts", self.story, *self.common]
        # The first line of progress comes when the first layer is done; nothing is written before the last.
        with subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True, env={
                **os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}) as process:
            line = process.stderr.readline()
            while line and "layer 1 of 3" not in line:
                line = process.stderr.readline()
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        # A quick run may be through before the signal is there.
        self.assertIn(process.returncode, (0, 130), rest)
        if process.returncode == 130:
            self.assertIn("headwater.cluster: broken off", rest)
            self.assertFalse(self.output.exists())

    def test_ctrl_c_within_a_layer(self):
        with mock.patch.object(cli, "block_averages", side_effect=KeyboardInterrupt):
            status, _, err = command(self.model, "--texts", self.story, *self.common)
        self.assertEqual((status, err), (130, "headwater.cluster: broken off\n"))
        self.assertFalse(self.output.exists())

    def test_the_tap_changes_nothing(self):
        model = EvalModel(tiny_model.tiny())
        ids = list(range(100))
        layers = []
        plain = model.prefill(ids, policies.make("dense")).hidden
        tapped = model.prefill(ids, maps.Tap(policies.make("dense"), lambda layer, q, k, stats: layers.append(layer))).hidden
        self.assertTrue(torch.equal(plain, tapped))
        self.assertEqual(layers, [0, 1, 2])


if __name__ == "__main__":
    unittest.main()
