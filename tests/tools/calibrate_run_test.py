"""python -m headwater.calibrate on a tiny random Llama, with windows in place of the GPU's policy. Skipped where torch or
transformers is not installed."""

import base64
import json
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
try:
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

sys.path.insert(0, str(ROOT / "python"))
import tiny_model  # noqa: E402
from headwater import calibrate  # noqa: E402
from headwater.calibrate import cli, meter  # noqa: E402
from headwater.calibrate.search import DENSE, START  # noqa: E402
from headwater.eval.attention import Stats  # noqa: E402
from headwater.eval.items import Item, Question  # noqa: E402
from headwater.eval.model import EvalModel  # noqa: E402
from headwater.eval.runner import Window  # noqa: E402

torch.set_num_threads(1)
STORY = "".join(f"In year {n} the river rose {n * n % 97} feet and fell again. " for n in range(90))


class Windows:
    """A KV head attends to its last `window` * 4 keys and the first one; threshold 0: to all. Those of the last `exact` that are
    no text's attend to all, too."""

    name = "headwater"

    def __init__(self, thresholds, windows, model, device, exact):
        self._thresholds, self._windows, self._heads = thresholds, windows, model["kv_heads"]
        self._exact = exact if exact != meter.EXACT_LAST else 0

    def attend(self, layer, q, k, v):
        group, seen, total = q.shape[1] // k.shape[1], 0, 0
        out = torch.empty_like(q)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(k))[None]
        for head in range(q.shape[1]):
            unit = layer * self._heads + head // group
            mask = distance >= 0
            total += int(mask.sum())
            if self._thresholds[unit] > 0:
                mask &= ((distance < 4 * self._windows[unit]) | (torch.arange(len(k)) == 0) |
                         (torch.arange(len(q)) >= len(q) - self._exact)[:, None])
            seen += int(mask.sum())
            scores = (q[:, head] @ k[:, head // group].T / q.shape[2] ** 0.5).masked_fill(~mask, float("-inf"))
            out[:, head] = torch.softmax(scores, dim=-1) @ v[:, head // group]
        return out, Stats(self.name, lambda: seen / total)


class CalibrateTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.model = cls.folder / "model"
        cls.model.mkdir()
        tiny_model.save_model(cls.model)
        (cls.folder / "story.txt").write_text(STORY)
        for patch in (mock.patch.object(meter, "Trial", Windows), mock.patch.object(torch, "bfloat16", torch.float32),
                      mock.patch.object(torch.cuda, "is_available", lambda: True)):
            patch.start()
            cls.addClassCleanup(patch.stop)

    def run_main(self, *words):
        return tiny_model.command(cli.main, self.model, "--device", "cpu", "--questions", 4, "--texts",
                                  self.folder / "story.txt", *words)

    def test_what_is_written_holds_the_budget_when_it_is_measured_again(self):
        path, budget = self.folder / "calibration.json", 0.02
        status, out, err = self.run_main("--output", path, "--tokens", 1024, "--windows", 2, "--targets", 400, "--own",
                                         "--budget", budget)
        self.assertEqual(status, 0, err)
        self.assertIn("passes; density", out)
        made = calibrate.load(path)
        self.assertEqual((made.layers, made.kv_heads), (3, 2))
        found = made.calibration["sets"]["ppl:story:1024"]
        self.assertLess(made.calibration["density"], 1)
        self.assertLessEqual(found["loss"], budget)
        args = cli.parser().parse_args([str(self.model), "--texts", str(self.folder / "story.txt"), "--output", "x", "--tokens",
                                        "1024", "--windows", "2", "--targets", "400", "--own"])
        model = EvalModel.load(self.model, "cpu", torch.float32)
        again = meter.Meter(model, cli.gather(args, cli.load_tokenizer(self.model)), 1)
        settings = list(zip(made.flat_thresholds(), made.flat_windows()))
        measured = again(settings)
        self.assertAlmostEqual(measured.loss["ppl:story:1024"], found["loss"], places=4)
        self.assertAlmostEqual(measured.density, made.calibration["density"], places=4)
        self.assertEqual(again.settings_of(path), settings)

    def test_every_length_has_sets_of_its_own(self):
        path = self.folder / "lengths.json"
        status, _, err = self.run_main("--output", path, "--tokens", 1024, 1536, "--windows", 1, "--targets", 100, "--own", "words",
                                       "--questions", 1, "--budget", 0.5, "--unit", "layer")
        self.assertEqual(status, 0, err)
        self.assertEqual(set(calibrate.load(path).calibration["sets"]),
                         {"ppl:story:1024", "ppl:story:1536", "own_words:1024", "own_words:1536"})

    def test_without_time_nothing_is_ranked(self):
        path = self.folder / "none.json"
        status, _, err = self.run_main("--output", path, "--tokens", 1024, "--windows", 1, "--targets", 100, "--own", "words",
                                       "--questions", 1, "--answer_budget", 1e-6, "--limit_s", 0.000001)
        self.assertEqual(status, 0, err)
        self.assertIn("--limit_s=1e-06", err)
        self.assertIn("every head is dense", err)
        self.assertEqual(set(calibrate.load(path).flat_thresholds()), {0.0})

    def test_what_was_found_is_there_when_it_fails_later(self):
        path, count = self.folder / "found.json", 0
        rank = meter.Meter.rank

        def fails(self_, base, settings):
            nonlocal count
            count += 1
            if base != [START] * 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return rank(self_, base, settings)
        few = ("--tokens", 1024, "--windows", 1, "--targets", 100, "--own", "--budget", 0.5, "--unit", "layer")
        with mock.patch.object(meter.Meter, "rank", fails):
            status, _, err = self.run_main("--output", path, *few)
        self.assertEqual(status, 2)
        self.assertIn("out of memory", err)
        self.assertLess(calibrate.load(path).calibration["density"], 1)

    def test_goes_on_from_a_file_and_ends_in_time(self):
        first, second = self.folder / "first.json", self.folder / "second.json"
        few = ("--tokens", 1024, "--windows", 1, "--targets", 100, "--own")
        self.assertEqual(self.run_main("--output", first, "--budget", 0.5, "--unit", "layer", *few)[0], 0)
        status, _, err = self.run_main("--output", second, "--budget", 0.5, "--start", first, "--limit_s", 0.001, *few)
        self.assertEqual(status, 0, err)
        self.assertIn("--limit_s=0.001", err)
        self.assertFalse(calibrate.load(second).calibration["whole"])
        (self.folder / "other.json").write_text(json.dumps({**json.loads(first.read_text()), "thresholds": [[0.3, 0.3]] * 3}))
        status, _, err = self.run_main("--output", second, "--start", self.folder / "other.json", *few)
        self.assertEqual(status, 2)
        self.assertIn("threshold 0.3 with window", err)

    def test_refuses(self):
        long = self.folder / "long.jsonl"
        long.write_text(json.dumps({"prompt_ids_u16_b64": base64.b64encode(bytes(2 * 1100)).decode(), "answer_ids": [2]}))
        for words, text in ((("--tokens", 512), "--tokens=512"), (("--tokens", 1024, 1024), "--tokens=1024 1024"),
                            (("--tokens", 1024, "--limit_s", 0), "--limit_s=0"), (("--tokens", 1024, "--budget", 0), "--budget=0"),
                            (("--tokens", 1024, "--max_passes", 70), "--max_passes=70; a first round of 6 units takes up to"),
                            (("--tokens", 1024, "--questions", 5), "--questions=5 take up to 640 tokens"),
                            (("--tokens", 1024, "--prompts", long), "long:1 has 1101 tokens"),
                            (("--tokens", 4096), "a prompt of 4096 tokens"), (("--tokens", 8192), "story.txt has"),
                            (("--tokens", 1024, "--windows", 0, "--own"), "nothing to calibrate on")):
            status, _, err = self.run_main("--output", self.folder / "none.json", *words)
            self.assertEqual(status, 2)
            self.assertIn(text, err)


class MeterTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        trial = mock.patch.object(meter, "Trial", Windows)
        trial.start()
        self.addCleanup(trial.stop)
        tiny_model.save_model(Path(folder.name))
        self.model = EvalModel.load(Path(folder.name), "cpu", torch.float32)
        self.ids = [7 * n * n % 251 for n in range(700)]
        self.item = Item("words", "words:0", self.ids[:600], [Question([3, 4], [5, 6, 7]), Question([8], [9])])

    def test_dense_loses_nothing_and_a_window_does(self):
        measure = meter.Meter(self.model, [Window("ppl:a", "a", self.ids, 100), self.item], 1)
        prompt = meter.Prompt.of(self.item)
        self.assertEqual((prompt.ids, prompt.answers), ([*self.ids[:600], 3, 4, 5, 6, 7, 8, 9], [(602, 605), (606, 607)]))
        same = measure([DENSE] * 6)
        for loss in same.loss.values():
            self.assertAlmostEqual(loss, 0, places=5)
        other = measure([(2.0, 4)] * 6)
        self.assertGreater(other.loss["words"], 1e-3)
        self.assertGreater(abs(other.loss["ppl:a"]), 1e-3)
        self.assertLess(other.density, 0.5)  # the end of the item attends to all

    def test_roundings_of_the_kernels_are_no_loss(self):
        class Rounds(Windows):
            def attend(self, layer, q, k, v):
                out, stats = super().attend(layer, q, k, v)
                return out.bfloat16().float(), stats

        with mock.patch.object(meter, "Trial", Rounds):
            measure = meter.Meter(self.model, [Window("ppl:a", "a", self.ids, 100), self.item], 1)
            self.assertGreater(measure._prompts[1].floor, 0)
            self.assertEqual(set(measure([DENSE] * 6).loss.values()), {0.0})

    def test_ranks_as_a_whole_pass_does(self):
        windows = [Window("ppl:a", "a", self.ids[n:], 100) for n in range(2)]
        measure, one = (meter.Meter(self.model, [*some, self.item], 1) for some in (windows, windows[:1]))
        base, begun = [(2.0, 16)] * 6, []
        self.model.prefill_from = lambda layer, *more: begun.append(layer) or EvalModel.prefill_from(self.model, layer, *more)
        for step in (1, 2):  # inputs of every layer, of every second one
            with mock.patch.object(meter.Meter, "_layers_per_input", lambda _, step=step: step):
                for settings in (base, *([*base[:unit], (2.0, 32), *base[unit + 1:]] for unit in range(6)), [(2.0, 64)] * 6):
                    found, whole = measure.rank(base, settings), one(settings)
                    self.assertAlmostEqual(found.density, whole.density, places=9)
                    for name, loss in whole.loss.items():
                        self.assertAlmostEqual(found.loss[name], loss, places=5)
                self.assertEqual(sorted(measure._prompts[0].inputs), [1, 2][step - 1:])
            base = [(2.0, 4)] * 6
        self.assertEqual(begun, [1] * 4 + [2] * 4 + [2] * 4)  # two prompts, two heads a layer; the second time in twos
        self.assertEqual(len(self.model.model.base_model.layers), 3)

    def test_density_is_that_of_what_is_served(self):
        text = Window("ppl:a", "a", self.ids, 100)
        own, given = (Item(task, f"{task}:0", self.ids[:600], [Question([3, 4], [5, 6, 7])]) for task in ("own_words", "words"))
        density = {name: meter.Meter(self.model, some, 1)([(2.0, 4)] * 6).density
                   for name, some in (("text", [text]), ("own", [own]), ("given", [given]), ("both", [text, own]),
                                      ("all", [text, given, own]))}
        self.assertEqual(density["both"], density["text"])
        self.assertNotEqual(density["text"], density["own"])
        pairs = {"text": 700 ** 2, "given": 605 ** 2}  # the last one is the answer's
        self.assertAlmostEqual(density["all"], sum(pairs[name] * density[name] for name in pairs) / sum(pairs.values()))

    def test_questions_attend_to_all(self):
        seen = []

        class Notes(Windows):
            def __init__(self, *args):
                seen.append(args[-1])
                super().__init__(*args)

        with mock.patch.object(meter, "Trial", Notes):
            items = [Item("words", f"words:{n}", self.ids[:600], [Question([3, 4], [5, 6, 7]), Question([8], [9])]) for n in range(2)]
            whole = Item("ruler", "ruler:0", self.ids[:690], [Question([], [9])])  # its question is at the end of the context
            measure = meter.Meter(self.model, [Window("ppl:a", "a", self.ids, 100), *items, whole], 1)
            seen.clear()
            measure([(2.0, 4)] * 6)
            self.assertEqual(seen, [256, 261, 257])


class TrialTest(unittest.TestCase):
    def test_begins_with_every_prompt(self):
        calls = []

        class Policy:
            def __init__(self, name, parameters, **more):
                calls.append((name, parameters["dense_last_tokens"], more["device"], more["layers"]))

            def begin(self, tokens):
                calls.append(tokens)

            def attention(self, layer, q, k, v):
                calls.append(f"layer {layer}")
                return q, SimpleNamespace(density=lambda: 0.5)

        q = {tokens: torch.zeros(tokens, 1, 8) for tokens in (4, 6)}
        with mock.patch("headwater.ops.PatternPolicy", Policy):
            trial = meter.Trial([0.1], [4], {"layers": 2}, "cuda:1", 17)
            for tokens, first in ((4, 0), (6, 0), (6, 1), (4, 1)):
                for layer in range(first, 2):
                    trial.attend(layer, q[tokens], q[tokens], q[tokens])
        self.assertEqual(calls, [("headwater", 17, "cuda:1", 2), 4, "layer 0", "layer 1", 6, "layer 0", "layer 1", 6, "layer 1", 4,
                                 "layer 1"])


if __name__ == "__main__":
    unittest.main()
