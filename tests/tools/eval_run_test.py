"""headwater.eval end to end on a tiny random Llama, and on longctx-36m where HW_MODELS has it. Skipped where torch or
transformers is not installed."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
try:
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

sys.path.insert(0, str(ROOT / "python"))
import tiny_model  # noqa: E402
from headwater.eval import cli, policies  # noqa: E402
from headwater.eval.items import Item, Question  # noqa: E402
from headwater.eval.model import EvalModel, ModelError, Sample, find_model  # noqa: E402
from headwater.eval.runner import Progress, Records, Runner, Settings, Window, sample_rows  # noqa: E402
from tiny_model import save_model, tiny  # noqa: E402

torch.set_num_threads(1)
TOKENS = torch.randint(0, 257, (700,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def plain_nll(model, ids) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]),
                                             reduction="none")


class ModelTest(unittest.TestCase):
    def test_dense_equals_the_plain_model_of_every_kind(self):
        for kind, changes in (("Llama", {}), ("Qwen2", {"head_dim": None}), ("Qwen3", {})):
            with self.subTest(kind):
                model = tiny(kind, **{key: value for key, value in changes.items() if value is not None})
                wanted = plain_nll(model, TOKENS)
                ours = EvalModel(model)
                one = ours.prefill(TOKENS, policies.make("dense"))
                torch.testing.assert_close(ours.score_last(one, TOKENS, 600), wanted[-600:], atol=1e-5, rtol=1e-5)
                self.assertEqual((one.density(), len(one.stats)), (1, 3))
                self.assertGreater(one.prefill_ms, one.attention_ms())

    def test_policies_that_list_everything_equal_dense(self):
        ours = EvalModel(tiny())
        wanted = ours.score_last(ours.prefill(TOKENS, policies.make("dense")), TOKENS, 600)
        for spec in ("a_shape:sink_tokens=0,window_tokens=700", "probe:min_tokens=0,threshold=1e-30"):
            with self.subTest(spec):
                found = ours.score_last(ours.prefill(TOKENS, policies.make(spec)), TOKENS, 600)
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        narrow = policies.make("a_shape:sink_tokens=1,window_tokens=9")
        other = ours.score_last(ours.prefill(TOKENS, narrow), TOKENS, 600)
        self.assertGreater((other - wanted).abs().max(), 0.01)

    def test_answers_are_scored_after_a_shared_cache(self):
        model = tiny()
        wanted = plain_nll(model, TOKENS)
        ours = EvalModel(model)
        one = ours.prefill(TOKENS[:650], policies.make("dense"), keep_cache=True)
        for _ in range(2):  # the cache is left as it was
            nll, right = ours.score_answer(one, TOKENS[650:680], TOKENS[680:700])
            self.assertAlmostEqual(nll, float(wanted[679:699].mean()), places=4)
            self.assertFalse(right)
        nll, _ = ours.score_answer(one, [], TOKENS[650:651])
        self.assertAlmostEqual(nll, float(wanted[649]), places=4)
        with torch.no_grad():
            best = int(model.get_output_embeddings()(one.hidden[-1]).argmax())
        self.assertTrue(ours.score_answer(one, [], [best])[1])

    def test_recall_of_every_layer(self):
        ours = EvalModel(tiny())
        for spec, least in (("dense", 1), ("a_shape:sink_tokens=4,window_tokens=64", 0)):
            sample = Sample(sample_rows(700, 16, 1, "x"))
            ours.prefill(TOKENS, policies.make(spec), sample=sample)
            self.assertEqual([layer.shape for layer in sample.recall], [(4, 16)] * 3)
            recall = torch.stack(sample.recall)
            self.assertTrue(bool(((recall >= least) & (recall <= 1.0001)).all()))
            self.assertEqual(all(error < 1e-4 for error in sample.error), spec == "dense")

    def test_a_window_of_the_model_is_refused(self):
        model = tiny("Mistral", sliding_window=64)
        with self.assertRaisesRegex(ModelError, "window"):
            EvalModel(model).prefill(TOKENS, policies.make("dense"))


class RunnerTest(unittest.TestCase):
    def setUp(self):
        self.saves, self.said = [], []
        self.prompts = {64: [Window("ppl:t", "w", TOKENS[:64], 16),
                             Item("kv", "i", TOKENS[:50], [Question([1], [2]), Question([3], [4, 5])])]}

    def run_all(self, chosen=("dense",), prompts=None, **settings) -> Records:
        runner = Runner(EvalModel(tiny()), Settings(recall_rows=4, **settings), self.said.append, self.saves.append)
        self.runner = runner
        runner.run({spec: policies.make(spec) if isinstance(spec, str) else spec for spec in chosen}, prompts or self.prompts)
        return runner.records

    def test_results_and_recalls(self):
        found = self.run_all(("dense", "a_shape:window_tokens=8,sink_tokens=1"))
        names = (("w", "w"), ("i#0", "i"), ("i#1", "i"))
        self.assertEqual([(one.policy[:5], one.name, one.group) for one in found.results],
                         [(policy, *one) for policy in ("dense", "a_sha") for one in names])
        self.assertEqual([(one.policy[:5], one.set, len(one.recall)) for one in found.recalls],
                         [("dense", "ppl:t", 3), ("dense", "kv", 3), ("a_sha", "ppl:t", 3), ("a_sha", "kv", 3)])
        self.assertEqual(len(self.saves), 2)
        self.assertIn("left", self.said[-1])

    def test_whole_prompts_score_as_a_shared_context_does_under_dense(self):
        # `probe` is dense on short prompts, and prefills every question with its context.
        found = self.run_all(("dense", "probe")).results
        shared, whole = ([one for one in found if one.policy == name] for name in ("dense", "probe"))
        self.assertEqual(len(shared), len(whole))
        for one, other in zip(shared, whole):
            self.assertAlmostEqual(one.nll, other.nll, places=4)

    def test_the_limit_is_held_and_said(self):
        found = self.run_all(limit_s=-1)
        self.assertEqual(found.results, [])
        self.assertIn("2 of 2 prompts left out", found.notes[0])

    def test_ctrl_c_leaves_what_is_done(self):
        class Broken:
            name = "broken"

            def attend(self, layer, q, k, v):
                raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            self.run_all(("dense", Broken()))
        self.assertEqual(len(self.saves[-1].results), 3)
        self.assertIn("broken off", self.saves[-1].notes[-1])

    def test_a_policy_that_fails_is_named_and_the_others_run(self):
        class Broken:
            name = "broken"

            def attend(self, layer, q, k, v):
                raise RuntimeError("no such kernel")

        found = self.run_all((Broken(), "dense"))
        self.assertTrue(self.runner.failed)
        self.assertEqual({one.policy for one in found.results}, {"dense"})
        self.assertIn("RuntimeError: no such kernel", found.notes[0])

    def test_rows_and_progress(self):
        rows = sample_rows(1000, 8, 1, "x")
        self.assertEqual(rows.tolist(), sample_rows(1000, 8, 1, "x").tolist())
        self.assertNotEqual(rows.tolist(), sample_rows(1000, 8, 2, "x").tolist())
        self.assertEqual(sample_rows(3, 8, 1, "x").tolist(), [0, 1, 2])
        now = iter((0, 10, 20))
        progress = Progress(4, self.said.append, lambda: next(now))
        progress.step(1, "a")
        progress.skip(2)
        progress.step(1, "b")
        self.assertEqual(self.said, ["a: 10 s, about 30 s left", "b: 20 s, about 0 s left"])


def command(*words) -> tuple:
    return tiny_model.command(cli.main, *words)


class CommandTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_a_run_twice_gives_the_same_figures(self):
        save_model(self.folder)
        (self.folder / "story.txt").write_text("Once there was a river. " * 100)
        (self.folder / "mine.jsonl").write_text(json.dumps({"input": "A is 5. A is", "outputs": ["5"]}) + "\n")
        figures = []
        for output in ("a", "b"):
            status, out, err = command(
                self.folder, "--output", self.folder / output, "--tokens", 512, 2048, "--text", self.folder / "story.txt",
                "--prompts", self.folder / "mine.jsonl", "--own", "passkey", "--own_prompts", 1, "--windows", 2,
                "--targets", 64, "--policy", "a_shape:sink_tokens=1,window_tokens=32", "--device", "cpu")
            self.assertEqual(status, 0, err)
            results = json.loads((self.folder / output / "results.json").read_text())
            self.assertEqual(out, (self.folder / output / "report.md").read_text())
            figures.append([(row["params"], {key: value for key, value in row["metrics"].items() if not key.endswith("_ms")})
                            for row in results["rows"]])
        self.assertEqual(*figures)
        self.assertEqual(sorted({(params["tokens"], params["set"]) for params, _ in figures[0]}),
                         [(512, "mine"), (512, "own_passkey"), (512, "ppl:story"), (2048, "own_passkey"), (2048, "ppl:story")])
        values = {(params["policy"], params["tokens"], params["set"]): metrics for params, metrics in figures[0]}
        sparse = values[("a_shape:sink_tokens=1,window_tokens=32", 2048, "ppl:story")]
        self.assertLess(sparse["density"], 0.05)
        self.assertLess(sparse["recall_mean"], 1)
        self.assertLessEqual(sparse["ci_low"], sparse["delta"])

    def test_without_windows_texts_only_hide_things(self):
        save_model(self.folder)
        (self.folder / "story.txt").write_text("Once there was a river. " * 100)
        status, _, err = command(self.folder, "--output", self.folder / "out", "--tokens", 512, "--text", self.folder / "story.txt",
                                 "--own", "passkey", "--own_prompts", 1, "--windows", 0, "--policy", "a_shape", "--device", "cpu")
        self.assertEqual(status, 0, err)
        rows = json.loads((self.folder / "out" / "results.json").read_text())["rows"]
        self.assertEqual({row["params"]["set"] for row in rows}, {"own_passkey"})

    def test_what_is_wrong_is_said_with_status_2(self):
        save_model(self.folder)
        for words, says in ((("/no/such", "--own"), "no directory with a config.json"),
                            ((self.folder, "--own"), "nothing to measure"),
                            ((self.folder, "--policy", "x"), "policy 'x' is not one of"),
                            ((self.folder, "--text", "/no/such"), "text /no/such: no such file"),
                            ((self.folder, "--windows", "-1"), "--windows=-1; at least 0")):
            with self.subTest(says):
                status, _, err = command(*words, "--output", self.folder / "out", "--tokens", 512, "--device", "cpu")
                self.assertEqual(status, 2)
                self.assertIn(says, err)
        status, _, err = command(self.folder, "--output", self.folder / "out", "--tokens", 4096, "--device", "cpu")
        self.assertEqual(status, 2)
        self.assertIn("--tokens=4096; ", err)

    def test_what_is_not_installed_is_said_with_status_2(self):
        code = ("import importlib.util, sys; find = importlib.util.find_spec\n"
                "importlib.util.find_spec = lambda name: None if name == 'transformers' else find(name)\n"
                "from headwater.eval.__main__ import main; sys.exit(main())")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(ROOT / "python")})
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("transformers not installed (pip install transformers)", done.stderr)


class LongContextModelTest(unittest.TestCase):
    def test_longctx_36m_finds_a_pass_key(self):
        try:
            path = find_model("longctx-36m")
        except ModelError as error:
            print(f"skipped: {error}")
            self.skipTest(str(error))
        with tempfile.TemporaryDirectory() as folder:
            status, _, err = command(path, "--output", folder, "--tokens", 1024, "--own", "passkey", "--own_prompts", 2,
                                     "--policy", "dense", "--device", "cpu")
            self.assertEqual(status, 0, err)
            row, = json.loads((Path(folder) / "results.json").read_text())["rows"]
        self.assertEqual(row["metrics"]["value"], 1)
        self.assertLess(row["metrics"]["nll"], 0.1)


if __name__ == "__main__":
    unittest.main()
