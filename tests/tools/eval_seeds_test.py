"""headwater.eval --report seeds: its parts by hand values, and every experiment on a tiny random Llama, with policies that
need torch alone in place of the published ones; two experiments with the real ones where the references' library is
(HEADWATER_REFERENCE). Skipped where torch or transformers is not installed."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

try:
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
import tiny_model  # noqa: E402
from headwater.eval import cli, policies  # noqa: E402
from headwater.eval.attention import Stats, dense_stats  # noqa: E402
from headwater.eval.seeds import audit, criteria, dense_heads, flash, flex_sweep, latency, report, skeleton  # noqa: E402
from headwater.eval.seeds.bench import Bench, Cell, CellError, Experiment, Setting  # noqa: E402

torch.set_num_threads(1)
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
SETTING = Setting("m", "CPU", "f32", "abc", 1, layers=2, q_heads=2, kv_heads=1, head_dim=16)


class AuditTest(unittest.TestCase):
    def test_top_blocks_hold_the_share_with_as_few_as_possible(self):
        averages = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.05, 0.25, 0.7]]])
        for share, wanted in ((0.9, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]), (0.5, [[1, 0, 0], [1, 0, 0], [0, 0, 1]]),
                              (0.96, [[1, 0, 0], [1, 1, 0], [1, 1, 1]])):
            self.assertEqual(audit.top_blocks(averages, share)[0].int().tolist(), wanted)

    def test_listed_blocks_are_those_of_the_last_rows(self):
        keep = torch.zeros(2, 300, 300, dtype=torch.bool)
        keep[0, 255, 130] = keep[1, 299, 5] = keep[1, 290, 200] = True
        keep[0, 127, 290] = True  # not causal
        found = audit.listed_blocks(Stats("x", lambda: 0, lambda rows: keep[:, rows]), 2, 300, torch.device("cpu"))
        self.assertEqual(found.nonzero().tolist(), [[0, 1, 1], [1, 2, 0]])
        dense = audit.listed_blocks(dense_stats(), 2, 300, torch.device("cpu"))
        self.assertEqual(dense.int().tolist(), [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]] * 2)

    def test_likeness(self):
        masks = torch.zeros(3, 2, 2, dtype=torch.bool)
        masks[0, 0, 0] = masks[0, 1, 0] = masks[1, 0, 0] = masks[1, 1, 1] = True
        self.assertEqual([[round(one, 4) for one in line] for line in audit.alike(masks, masks).tolist()],
                         [[1, 0.3333, 0], [0.3333, 1, 0], [0, 0, 1]])
        torch.testing.assert_close(audit.same_head(masks, masks[[1, 1, 2]]), torch.tensor([1 / 3, 1, 1]))
        self.assertFalse(bool(audit.without_forced(masks)[1].any()))
        self.assertTrue(bool(masks[1].any()))

    def test_pairs_of_layers_and_over_prompts(self):
        matrix = torch.arange(16.0).view(4, 4)
        found = audit.pairs(matrix, 2)
        self.assertEqual({name: values.tolist() for name, values in found.items()},
                         {"layer": [1, 11], "layers": [2, 3, 6, 7], "all": [1, 2, 3, 6, 7, 11]})
        one, other = (torch.full((2, 2), value) for value in (0.9, 0.7))
        kept = audit.kept_over_prompts([one, other], 2)
        self.assertEqual((kept["pairs_alike_in_some"], kept["pairs_alike_in_every"]), (1, 0))
        random = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
        self.assertAlmostEqual(audit.kept_over_prompts([random, 1 - random], 2)["likeness_correlation"], -1, places=5)

    def test_rows(self):
        kind = {"density": [0.5, 0.5], "heads": [[[1, 0.9], [0.9, 1]], [[1, 0.5], [0.5, 1]]], "prompts": [[0.85, 0.6]],
                "heads_unforced": [[[1, 0.1], [0.1, 1]]] * 2, "prompts_unforced": [[0.2, 0.4]]}
        cell = {"tokens": 256, "policy": "flex", "kinds": {"mass": kind}, "prompts": ["a", "b"], "heads": 2}
        found = {row["params"]["set"]: row["metrics"] for row in audit.rows({"x": cell}, SETTING)}
        self.assertAlmostEqual(found["iou:layer"]["value"], 0.7)
        self.assertEqual((found["iou:layer"]["alike"], found["iou:prompts"]["alike"]), (0.5, 0.5))
        self.assertAlmostEqual(found["iou:prompts"]["value_unforced"], 0.3)


class CriteriaTest(unittest.TestCase):
    def test_a_group_by_hand(self):
        """Two rows at 126 and 127 of 128 tokens: threshold 0.8 / 128 = 0.00625, of blocks 0.4."""
        scores = torch.zeros(2, 128)
        scores[:, 0], scores[:, 70], scores[1, 127] = 0.5, 0.3, 0.2
        scores[0, 1] = 0.2
        attended = torch.zeros(2, 128, dtype=torch.bool)
        attended[:, :64] = True
        found = criteria.group_of(scores, torch.tensor([126, 127]), attended, 128)
        left = {name: mask.sum(dim=1).tolist() for name, mask in found.items()}
        self.assertEqual(left, {"exact": [126, 127], "threshold": [124, 125], "block": [0, 0], "block x 64": [63, 64],
                                "policy": [63, 64]})
        self.assertEqual(float(scores[found["exact"]].sum().round(decimals=4)), 1.0)


class SkeletonTest(unittest.TestCase):
    def test_extrapolation_is_the_power_law(self):
        law = {n: 8 * n ** -0.5 for n in (1024, 8192, 32768, 131072)}
        self.assertAlmostEqual(skeleton.extrapolate(law, 1 << 20), 8 * (1 << 20) ** -0.5)
        self.assertEqual(skeleton.extrapolate({8192: 0.5, 16384: 0.9}, 1 << 20), 1)
        self.assertIsNone(skeleton.extrapolate({1024: 0.5, 8192: 0.1}, 1 << 20))

    def test_flop(self):
        self.assertEqual(skeleton.flop(SETTING, 1000), 2 * 2 * 2 * 16 * 1e6)

    def test_rows_beyond_what_was_measured_are_marked(self):
        def result(tokens, density):
            return {"policy": "skeleton:epsilon=0.8", "tokens": tokens, "set": "ppl:t", "name": "w", "group": "w", "nll": 1.0,
                    "density": density, "attention_ms": 1.0, "prefill_ms": 1.0}

        cells = {n: {"results": [result(n, rho)], "recalls": {}} for n, rho in ((8192, 0.4), (131072, 0.1))}
        cells["s"] = {"policy": "skeleton:epsilon=0.8", "tokens": 1 << 20, "structured_density": 0.01}
        found = skeleton.rows(cells, SETTING)
        cost = {(row["params"]["tokens"], row["params"]["basis"]): row["metrics"]
                for row in found if row["params"]["set"] == "attention_pflop"}
        self.assertEqual(sorted(cost), [(8192, "measured"), (131072, "measured"), (262144, "extrapolated"),
                                        (524288, "extrapolated"), (1 << 20, "extrapolated"), (1 << 20, "structured")])
        self.assertAlmostEqual(cost[524288, "extrapolated"]["density"], 0.05)
        self.assertAlmostEqual(cost[131072, "measured"]["value"], 0.1 * 128 * 131072 ** 2 / 1e15)
        said = "\n".join(skeleton.sparsities(found))
        self.assertIn("| skeleton:epsilon=0.8 | structured |  |  | 0.99 |", said)
        self.assertIn("| 0.89 | 0.97 | 0.995 |", said)


class RowsTest(unittest.TestCase):
    def test_latency(self):
        times = {"dense": {"prefill_ms": [100, 200], "attention_ms": [50, 50], "density": [1, 1]},
                 "flex": {"prefill_ms": [50, 100], "attention_ms": [10, 30], "density": [0.1, 0.3]}}
        dense, flex = latency.rows({"x": {"tokens": 100, "times": times}}, SETTING)
        self.assertEqual([dense["metrics"][name] for name in ("value", "value_low", "value_high")], [1.5, 1, 2])
        self.assertEqual([flex["metrics"][name] for name in ("delta", "ci_low", "ci_high")], [-0.5] * 3)
        self.assertAlmostEqual(flex["metrics"]["attention_ms_per_token"], 0.2)
        self.assertAlmostEqual(flex["metrics"]["density"], 0.2)

    def test_flash_sums_layers(self):
        def layer(ms):
            one = {"density": 0.1, "ran": "flash", "rel_error": 0, "recall_mean": ms / 10, "recall_p1": 0.5}
            return {"fa2": {"ms": 10 * ms}, "cudnn": {"ms": 6 * ms}, "flash": {"ms": ms, **one}}

        row, = flash.rows({"x": {"tokens": 4096, "inputs": "captured", "shape": [8, 2, 128],
                                 "layers": {"0": layer(1), "3": layer(3)}}}, SETTING)
        self.assertEqual((row["metrics"]["value"], row["metrics"]["dense_value"]), (4, 40))
        self.assertEqual((row["metrics"]["speedup_fa2"], row["metrics"]["speedup_cudnn"]), (10, 6))
        self.assertAlmostEqual(row["metrics"]["recall_mean"], 0.2)
        self.assertEqual(row["peers"], {"fa2": {"ms": 40}, "cudnn": {"ms": 24}})
        self.assertIn("10.00x", "\n".join(flash.text([row])))

    def test_heads_in_full_and_their_roles(self):
        result = {"policy": "share", "tokens": 256, "set": "ppl:t", "name": "w", "group": "w", "nll": 1.0, "density": 0.5,
                  "attention_ms": 1.0, "prefill_ms": 2.0}
        cells = {"a": {"results": [result], "recalls": {}},
                 "b": {"policy": "share", "tokens": 256, "head_densities": [[1.0, 0.2], [0.1, 0.3]],
                       "roles": [["pivot", "own"], ["shared", "shared"]]}}
        metrics = dense_heads.rows(cells, SETTING)[0]["metrics"]
        self.assertEqual((metrics["dense_heads"], metrics["pivot_heads"], metrics["shared_heads"]), (0.25, 0.25, 0.5))

    def test_names(self):
        self.assertEqual([report.tokens_name(n) for n in (512, 1280, 131072, 1 << 20)], ["512", "1.25K", "128K", "1M"])
        self.assertEqual(flex_sweep.values_of(flex_sweep.spec(0.85, 0)), (0.85, 0))
        self.assertEqual(report.table(("a", "b"), [[1, None], [0.123456, "x"]]),
                         ["| a | b |", "|---|---|", "| 1 |  |", "| 0.1235 | x |"])


class RunTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, self.said, self.ran = report.Folder(Path(folder.name)), [], []

    def bench(self, **flags) -> Bench:
        args = SimpleNamespace(seed=1)
        model = SimpleNamespace(device=torch.device("cpu"))
        return Bench(model, None, args, Setting("m", "CPU", "f32", "abc", 1, 1, 1, 1, 16, flags), self.said.append)

    def experiment(self, results: dict) -> Experiment:
        """A cell a name, whose value is its result, or an error that it raises."""
        def run(name):
            self.ran.append(name)
            if isinstance(results[name], BaseException):
                raise results[name]
            return results[name]

        def rows(cells, setting):
            return [{"params": {"model": setting.model, "policy": name}, "metrics": {"value": cell["x"]}}
                    for name, cell in cells.items()]

        return Experiment(9, "Test", lambda bench: [Cell(name, lambda name=name: run(name)) for name in results], rows,
                          lambda found: [str(len(found))], lambda found, cells: None)

    def test_failures_are_named_and_the_rest_runs_and_is_not_run_again(self):
        broken = self.experiment({"a": {"x": 1}, "b": NotImplementedError("share on a GPU"), "c": CellError("no text"),
                                  "d": {"x": 2, "partial": True}})
        self.assertFalse(report.run(broken, self.bench(), self.folder, math.inf))
        kept = self.folder.read(9)
        self.assertEqual(kept["notes"], ["failed: b: NotImplementedError: share on a GPU", "failed: c: no text"])
        self.assertEqual([row["params"] for row in kept["rows"]],
                         [{"model": "m", "policy": name, "experiment": "seeds:9"} for name in ("a", "d")])
        self.ran.clear()
        self.assertTrue(report.run(self.experiment({name: {"x": 3} for name in "abcd"}), self.bench(), self.folder, math.inf))
        self.assertEqual(self.ran, ["b", "c", "d"])
        self.assertEqual([row["metrics"]["value"] for row in self.folder.read(9)["rows"]], [1, 3, 3, 3])
        self.ran.clear()
        self.assertTrue(report.run(self.experiment({name: {"x": 4} for name in "abcd"}), self.bench(), self.folder, math.inf))
        self.assertEqual(self.ran, [])
        self.assertIn("all of it stands in", self.said[-1])

    def test_other_flags_begin_anew(self):
        one = self.experiment({"a": {"x": 1}})
        report.run(one, self.bench(tokens=[1]), self.folder, math.inf)
        report.run(one, self.bench(tokens=[2]), self.folder, math.inf)
        self.assertEqual(self.ran, ["a", "a"])
        self.assertTrue(any("begun anew" in line for line in self.said))

    def test_the_limit_is_held_and_said(self):
        self.assertTrue(report.run(self.experiment({"a": {"x": 1}, "b": {"x": 1}}), self.bench(), self.folder, -1))
        self.assertEqual((self.ran, self.folder.read(9)["notes"]), ([], ["left out, the -1 s are over: a; b"]))

    def test_ctrl_c_leaves_what_is_done(self):
        with self.assertRaises(KeyboardInterrupt):
            report.run(self.experiment({"a": {"x": 1}, "b": KeyboardInterrupt()}), self.bench(), self.folder, math.inf)
        kept = self.folder.read(9)
        self.assertEqual((list(kept["cells"]), kept["notes"]), (["a"], ["broken off; what was done until then stands here"]))

    def test_a_foreign_file_is_refused(self):
        for words in ("{}", "[1]", "x"):
            self.folder.file(9, "json").write_text(words)
            with self.assertRaisesRegex(ValueError, "seeds_9.json is not of this program"):
                self.folder.read(9)


class CommandTest(unittest.TestCase):
    FLAGS = ("--device", "cpu", "--tokens", 512, 768, "--timed_prompts", 2, "--windows", 2, "--targets", 64, "--own", "passkey",
             "--own_prompts", 1, "--recall_rows", 8, "--audit_tokens", 512, "--audit_prompts", 3, "--skeleton_tokens", 256, 512,
             "--structured_tokens", 512, "--criteria_tokens", 512, "--criteria_groups", 2, "--budget_blocks", 4,
             "--flash_tokens", 512, 4096, "--repeats", 1)

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = Path(cls.temporary.name)
        tiny_model.save_model(cls.folder)
        cls.story = cls.folder / "story.txt"
        cls.story.write_text("".join(f"In year {n} the river rose {n * n % 97} feet and fell again. " for n in range(60)))

    def command(self, *words, output="out") -> tuple:
        return tiny_model.command(cli.main, self.folder, "--report", "seeds", "--output", self.folder / output, "--text",
                                  self.story, *words)

    @contextlib.contextmanager
    def simple_policies(self):
        """share, flex, ... all are an A-shape, which needs no library."""
        def policy(bench, spec, model=None):
            return policies.make("dense" if spec == "dense" else f"a_shape:sink_tokens=9,window_tokens={64 + len(spec)}")

        with mock.patch.object(Bench, "policy", policy):
            yield

    def test_all_experiments(self):
        with self.simple_policies():
            status, out, err = self.command(*self.FLAGS)
        self.assertEqual(status, 0, err)
        folder = self.folder / "out"
        self.assertEqual(out, (folder / "report.md").read_text())
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        self.assertEqual({row["params"]["experiment"] for row in rows}, {f"seeds:{n}" for n in range(1, 7)})
        for row in rows:
            self.assertLessEqual({"bench", "device", "commit", "date", "params", "metrics", "peers"}, row.keys())
            self.assertLessEqual({"model", "tokens", "policy", "set"}, row["params"].keys())
            self.assertIn("value", row["metrics"])
        sets = {(row["params"]["experiment"], row["params"]["set"]) for row in rows}
        self.assertLessEqual({("seeds:1", "prefill_ms_per_token"), ("seeds:2", "ppl:story"), ("seeds:2", "own_passkey"),
                              ("seeds:3", "iou:layers"), ("seeds:3", "iou:prompts"), ("seeds:4", "attention_pflop"),
                              ("seeds:4", "criteria:exact"), ("seeds:5", "ppl:story"), ("seeds:6", "attention:structured"),
                              ("seeds:6", "attention:captured")}, sets)
        self.assertEqual(len([row for row in rows if row["params"]["experiment"] == "seeds:5"]), 2 * 9)
        self.assertIn("4096 tokens left out: the model is for 2048 at most", out)
        self.assertIn("27.78x", out)
        self.assertEqual(sorted(path.name for path in folder.glob("*.png")),
                         [f"seeds_{n}.png" for n in range(1, 7)] if HAS_MATPLOTLIB else [])
        if not HAS_MATPLOTLIB:
            print("skipped: pictures, matplotlib is not installed")
            self.assertIn("matplotlib is not installed", err)

    def test_a_policy_that_fails_is_named_and_the_others_are_timed(self):
        def policy(bench, spec, model=None):
            if spec.startswith(("share", "flash2")):
                raise NotImplementedError(f"no {spec} here")
            return policies.make("dense")

        with mock.patch.object(Bench, "policy", policy):
            status, out, err = self.command(*self.FLAGS, "--experiments", "1,6", output="failing")
        self.assertEqual(status, 1, err)
        self.assertIn("- failed: share:pivots_per_layer=1 at 512: NotImplementedError: no share:pivots_per_layer=1 here", out)
        self.assertIn("- failed: flash2:dense_layers=0 at 512 tokens: NotImplementedError: no flash2", out)
        self.assertIn("| 512 | flex |", out)
        self.assertIn("| headwater |", out)
        for number in (1, 6):
            kept = json.loads((self.folder / "failing" / f"seeds_{number}.json").read_text())
            self.assertTrue(all(cell["partial"] for cell in kept["cells"].values()))

    def test_chosen_ones_join_what_is_there(self):
        with self.simple_policies():
            self.assertEqual(self.command(*self.FLAGS, "--experiments", "1", output="some")[0], 0)
            status, out, err = self.command(*self.FLAGS, "--experiments", "6", "--limit_s", "0", output="some")
        self.assertEqual(status, 0, err)
        self.assertIn("## 1. ", out)
        self.assertIn("left out, the 0 s are over: structured at 512", out)
        folder = self.folder / "some"
        (folder / "report.md").unlink()
        status, again, err = tiny_model.command(cli.main, "--report", "seeds", "--output", folder, "--draw")
        self.assertEqual((status, again), (0, out), err)

    def test_what_is_wrong_is_said_with_status_2(self):
        for words, says in ((("--experiments", "7"), "'7' is not one of 1, 2, 3, 4, 5, 6"),
                            (("--tokens", "8"), "--tokens=8; 256"), (("--windows", "0"), "--windows=0"),
                            (("--audit_prompts", "1"), "--audit_prompts=1"),
                            (("--clusters", "/no/such"), "/no/such"), (("--text", "/no/such.txt"), "no such file")):
            with self.subTest(says):
                status, _, err = self.command(*words)
                self.assertEqual(status, 2)
                self.assertIn(says, err)
        self.assertEqual(self.command("--device", "cpu", output="story.txt")[0], 2)

    def test_two_experiments_with_the_published_policies(self):
        if "HEADWATER_REFERENCE" not in os.environ:
            print("skipped: HEADWATER_REFERENCE is not set, the published policies did not run")
            self.skipTest("no library of references")
        status, out, err = self.command(*self.FLAGS, "--experiments", "4,6", output="real")
        self.assertEqual(status, 0, err)
        self.assertIn("| skeleton:budget_blocks=4 |", out)
        self.assertIn("| flash2:dense_layers=0 |", out)


if __name__ == "__main__":
    unittest.main()
