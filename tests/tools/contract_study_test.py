"""tools/contract_study.py on a tiny random Llama, with torch in place of the GPU's kernels. Skipped where torch or transformers
is not installed."""

import contextlib
import io
import json
import math
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

try:
    import tokenizers  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]
import contract_recall  # noqa: E402
import contract_study  # noqa: E402
import tiny_model  # noqa: E402
from headwater.eval.attention import dense_attention, exact_rows  # noqa: E402
from headwater.eval.blocks import BlockTable, index_of_table, run_as_mask, table_of_index  # noqa: E402
from headwater.eval.maps import block_averages  # noqa: E402
from headwater.eval.policies.probe import Probe  # noqa: E402
from ops_index_test import index  # noqa: E402

torch.set_num_threads(1)
LAYERS, HEADS = tiny_model.SHAPE["num_hidden_layers"], tiny_model.SHAPE["num_key_value_heads"]
SETTINGS = {(0, 0): (0.5, 1), (0, 1): (0.0, 1), (1, 0): (0.9, 2), (1, 1): (0.2, 1)}  # threshold, window


class FakePolicy:
    """Lists of headwater.eval's rule; seen: (q, k, table or None) of each layer."""

    def __init__(self, report):
        self._report, self.seen = report, []

    def attention(self, layer, q, k, v):
        heads = range(layer * HEADS, (layer + 1) * HEADS)
        settings = [(self._report.thresholds()[i], self._report.windows()[i]) for i in heads]
        if all(threshold == 0 for threshold, _ in settings):
            self.seen.append((q, k, None))
            return dense_attention(q, k, v), types.SimpleNamespace(dense=True, index=None)
        tables = [Probe(threshold or 1e-30, 1, window, 0).select(q, k) for threshold, window in settings]
        listed = torch.stack([table.listed[head] for head, table in enumerate(tables)])
        visible = torch.arange(listed.shape[2]) < tables[0].visible()[:, None]
        for head, (threshold, _) in enumerate(settings):
            if threshold == 0:
                listed[head] = visible
        table = BlockTable(listed, tables[0].tile_positions, len(q), len(k))
        self.seen.append((q, k, table))
        return run_as_mask(q, k, v, table)[0], types.SimpleNamespace(dense=False, index=index_of_table(table))


class FakeKernels:
    def policy(self, report, q, k):
        self.made = FakePolicy(report)
        return self.made

    def lse(self, q, k, v, index=None):
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1)) / math.sqrt(q.shape[2])
        rows = torch.arange(len(q))
        mask = (torch.arange(len(k)) <= rows[:, None]).expand_as(scores)
        if index is not None:
            mask = mask & table_of_index(index, len(q), len(k)).stats("", q.shape[1]).row_mask(rows)
        return scores.masked_fill(~mask, -math.inf).logsumexp(dim=-1).T

    def block_mass(self, q, k, lse):
        return block_averages(q, k)


def bench_row(name, tokens, settings=None, **attention):
    groups = [{"layer": layer, "kv_head": head, "density": 1.0 if threshold == 0 else 0.4, "threshold": threshold,
               "window_blocks": window, "rounds": 4 if threshold == 0 else 0,
               **({"fallback": "dense_recall"} if threshold == 0 else {"recall": 0.9})}
              for (layer, head), (threshold, window) in (settings or SETTINGS).items()]
    return {"bench": "prefill", "params": {"prompt": name, "tokens": tokens, "policy": "headwater", "min_recall": 0.95},
            "attention": {"density": 0.5, "groups": groups, **attention}}


def group(recall, **changes):
    return {"layer": 0, "kv_head": 0, "dense": False, "fell_back": False, "recall": recall, "density": 0.2,
            "reported_density": 0.2, "estimate": None, **changes}


def detail(name, groups, density=0.2):
    return {"name": name, "tokens": 1, "density": density, "min_recall": 0.95, "groups": groups}


class ReportTest(unittest.TestCase):
    def refused(self, says, **changes):
        with self.assertRaisesRegex(ValueError, says):
            contract_recall.Report.of({**bench_row("text:8:0", 8), **changes}, LAYERS, HEADS)

    def test_settings_by_layer_and_head_with_a_dense_last_layer(self):
        row = bench_row("text:8:0", 8, {**SETTINGS})
        row["attention"]["groups"] = row["attention"]["groups"][:2] + [{"layer": 1, "density": 1.0, "rounds": 0,
                                                                        "fallback": "dense_by_policy"}]
        found = contract_recall.Report.of(row, LAYERS, HEADS)
        self.assertEqual(found.thresholds(), [0.5, 0.0, 0.0, 0.0, 0.0, 0.0])
        self.assertEqual(found.windows(), [1, 1, 16, 16, 16, 16])
        self.assertEqual(found.groups[0, 1].fallback, "dense_recall")
        self.assertEqual(found.groups[1, 1].fallback, "dense_by_policy")

    def test_what_cannot_be_made_again_is_refused(self):
        self.refused("not a run of policy headwater", attention=None)
        self.refused("not a run of policy headwater", params={"prompt": "p", "tokens": 8, "policy": "flex", "min_recall": 0.9})
        self.refused("0 groups; 2 layers of 2", attention={"density": 1, "groups": []})
        bound = {"layer": 0, "density": 0.1, "rounds": 1, "fallback": "density_bound"}
        self.refused("forced density", attention={"density": 1, "groups": [bound]})
        self.refused("no threshold", attention={"density": 1, "groups": [{"layer": 0, "density": 0.1, "rounds": 0}]})

    def test_a_short_prompt_is_dense_and_not_computed(self):
        row = bench_row("text:3:0", 3, fallback="dense_short_prompt")
        row["attention"]["groups"] = []
        found = contract_recall.measure(None, [1, 2, 3], contract_recall.Report.of(row, LAYERS, HEADS), None, True)
        self.assertEqual([one["dense"] for one in found["groups"]], [True] * 4)
        with self.assertRaisesRegex(ValueError, "has 2 tokens, its report 3"):
            contract_recall.measure(None, [1, 2], contract_recall.Report.of(row, LAYERS, HEADS), None, True)


class FloorTest(unittest.TestCase):
    def test_fewest_by_hand(self):
        values = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.125, 0.25, 0.5]])
        self.assertEqual(contract_recall.fewest(values, torch.tensor([0.75, 0.8125])).tolist(), [2, 3])

    def test_a_tile_each_and_the_mean_of_all(self):
        # Two blocks; the second one, of 64 rows, spreads: alone it wants both, on the mean of 192 rows neither is missed.
        mass = torch.tensor([[[1.0, 0.0], [0.75, 0.25]]])
        found = contract_recall.least_densities(mass, 192, 1, 0.9)
        self.assertEqual(found[0], (1.0, 2 / 3))

    def test_densities_count_dense_tiles(self):
        table = index([[0], None, [0], [1]], num_lists=2)
        self.assertEqual(contract_recall.densities(table, 256), [1.0, 2 / 3])

    def test_first_percentile_is_of_nearest_rank(self):
        self.assertEqual(contract_recall.first_percentile(torch.arange(200.0).view(2, 100)), 1)
        self.assertEqual(contract_recall.first_percentile(torch.tensor([3.0, 2.0])), 2)


class SummaryTest(unittest.TestCase):
    def test_shares_and_errors_by_hand(self):
        dense = group(1.0, dense=True, density=1.0, reported_density=1.0)
        found = contract_study.summary([
            detail("text:8:0", [group(0.96, estimate=0.95), group(0.94, estimate=0.96, reported_density=0.25)], 0.1),
            detail("text:8:1", [dense, {**dense, "fell_back": True}], 0.3)])
        self.assertEqual([found[name] for name in ("groups", "kept", "kept_sparse", "below", "dense", "fell_back")],
                         [4, 0.5, 0.25, 0.25, 0.5, 0.25])
        self.assertEqual(found["kept_of_sparse"], 0.5)
        self.assertAlmostEqual(found["density"], 0.2)
        self.assertAlmostEqual(found["density_rebuilt_error"], 0.05)
        self.assertAlmostEqual(found["estimate_bias"], 0.005)
        self.assertAlmostEqual(found["estimate_error"], 0.015)
        self.assertEqual(found["recall_least"], 0.94)
        self.assertNotIn("floor_mean", found)

    def test_verdicts_hold_and_fail(self):
        good = contract_study.verdicts({"kept": 0.99, "dense": 0.1, "density_rebuilt_error": 0.01},
                                       {32768: {"density": 0.25}, 65536: {"density": 1.0}, 131072: {"density": 0.1}})
        self.assertEqual([holds for *_, holds in good], [True] * 5)
        bad = contract_study.verdicts({"kept": 0.98, "dense": 0.11, "density_rebuilt_error": 0.02},
                                      {131072: {"density": 0.11}})
        self.assertEqual([holds for *_, holds in bad], [False] * 5, "no prompt of 32768 tokens does not hold either")

    def test_lengths_count_for_the_next_power_of_two(self):
        self.assertEqual([contract_study.bucket_of(f"text:{n}:0") for n in (1, 32768, 32769, 131072)],
                         [1, 32768, 65536, 131072])
        for name in ("text", "text:x:0", "text:0:0"):
            with self.assertRaisesRegex(ValueError, "KIND:LENGTH:NUMBER"):
                contract_study.bucket_of(name)


class StudyTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        tiny_model.save_model(self.folder)
        (self.folder / "text.txt").write_text("".join(f"The {i}th line of a text. " for i in range(400)))
        self.prompts, self.results = self.folder / "prompts.jsonl", self.folder / "bench.jsonl"
        self.details, self.rows = self.folder / "details.jsonl", self.folder / "rows.jsonl"

    def make(self, *more):
        status, _, err = tiny_model.command(contract_study.main, "make", self.folder, "--text", self.folder / "text.txt",
                                            "--output", self.prompts, *more)
        self.assertEqual(status, 0, err)
        return [json.loads(line) for line in self.prompts.read_text().splitlines()]

    def check(self, kernels, *more):
        args = contract_study.parser().parse_args([str(word) for word in (
            "check", self.folder, "--prompts", self.prompts, "--results", self.results, "--details", self.details,
            "--output", self.rows, "--device", "cpu", *more)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = contract_study.check(args, kernels, torch.float32)
        return status, out.getvalue(), err.getvalue()

    def write_results(self, prompts):
        self.results.write_text("".join(json.dumps(bench_row(one["name"], len(contract_study.ids_of(one)))) + "\n"
                                        for one in prompts))

    def test_prompts_are_of_every_kind_and_length_and_the_same_each_time(self):
        made = self.make("--count", 20, "--tokens", 2400, 4000)
        names = [one["name"].split(":") for one in made]
        self.assertEqual({(kind, length) for kind, length, _ in names},
                         {(kind, length) for kind in contract_study.KINDS for length in ("2400", "4000")})
        for (kind, length, _), one in zip(names, made):
            ids = contract_study.ids_of(one)
            self.assertLessEqual(len(ids), int(length))
            self.assertGreater(len(ids), 0.8 * int(length), kind)
        self.assertEqual(made, self.make("--count", 20, "--tokens", 2400, 4000))
        mixed = self.make("--count", 10, "--tokens", 2400, 4000, "--mixed_lengths")
        lengths = [int(one["name"].split(":")[1]) for one in mixed]
        self.assertTrue(all(2400 <= length <= 4000 for length in lengths) and len(set(lengths)) > 3, lengths)
        self.assertIn("tokens", json.loads(contract_study.prompt_line("a", [70000], 70001)))

    def test_recall_is_that_of_every_row(self):
        made = self.make("--count", 1, "--tokens", 700)
        self.write_results(made)
        kernels = FakeKernels()
        status, out, _ = self.check(kernels, "--oracle", "--commit", "abc")
        self.assertEqual(status, 1)  # tiny lists: recall is short

        found = json.loads(self.details.read_text())
        self.assertEqual(len(found["groups"]), 4)
        self.assertEqual(len(kernels.made.seen), LAYERS - 1)
        for one in found["groups"]:
            q, k, table = kernels.made.seen[one["layer"]]
            heads = slice(2 * one["kv_head"], 2 * one["kv_head"] + 2)
            mask = table.stats("", q.shape[1]).row_mask(torch.arange(len(q)))
            held = torch.zeros(q.shape[1], len(q))

            def visit(head, rows, mass, held=held, mask=mask):
                both = slice(head, head + len(mass))
                held[both, rows] = torch.where(mask[both, rows], mass, 0).sum(dim=-1)

            exact_rows(q, k, k, torch.arange(len(q)), visit)
            self.assertAlmostEqual(one["recall"], float(held[heads].mean()), places=4)
            self.assertAlmostEqual(one["worst_head"], float(held[heads].mean(dim=1).min()), places=4)
            visible = float(table.visible().sum())
            self.assertAlmostEqual(one["density"], float(table.listed[one["kv_head"]].sum()) / visible)
            self.assertEqual(one["dense"], one["density"] == 1)
            self.assertTrue(0 < one["floor_mean"] <= one["floor_per_tile"] <= 1)
        self.assertEqual([one["fell_back"] for one in found["groups"]], [False, True, False, False])
        self.assertTrue(any(one["recall"] < 0.95 for one in found["groups"]))
        self.assertIn("FAILS: kept", out)
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        self.assertEqual([row["params"].get("tokens") for row in rows], [1024, None])
        self.assertEqual(rows[0]["params"]["set"], "contract")
        self.assertEqual(rows[0]["bench"], "policies")
        self.assertFalse(rows[1]["metrics"]["holds"])
        off = [0.9 - one["recall"] for one in found["groups"] if not one["dense"]]
        self.assertAlmostEqual(rows[1]["metrics"]["estimate_bias"], sum(off) / len(off), places=4)

    def test_a_run_in_parts_does_nothing_twice_and_says_what_is_missing(self):
        made = self.make("--count", 2, "--tokens", 300)
        self.write_results(made[:1])
        status, _, err = self.check(FakeKernels(), "--limit_s", -1)
        self.assertEqual(status, 1)
        self.assertIn("not measured: 2 of 2 prompts (1 without a result)", err)
        status, _, err = self.check(FakeKernels())
        self.assertIn("not measured: 1 of 2", err)
        before = self.details.read_text()
        with mock.patch.object(contract_study, "measure", side_effect=AssertionError("measured again")):
            self.check(FakeKernels())
        self.assertEqual(self.details.read_text(), before)
        self.details.write_text(before.replace('"density": 0.5', '"density": 0.6'))
        with self.assertRaisesRegex(ValueError, "another run"):
            self.check(FakeKernels())

    def test_overhead_is_the_median_of_prompts(self):
        free, measured = self.folder / "free.jsonl", self.folder / "measured.jsonl"
        words = ("overhead", "--free", free, "--measured", measured, "--output", self.rows)

        def rows(path, times, **more):
            path.write_text("".join(json.dumps({
                "device": "D", "commit": "c",
                "params": {"model": "m", "policy": "headwater", "tokens": tokens, "prompt": f"text:{tokens}:{number}", **more},
                "metrics": {"ttft_s": one}}) + "\n"
                for tokens, some in times.items() for number, runs in enumerate(some) for one in runs))

        rows(free, {900: [[1, 2, 9], [4, 4, 4], [8, 8, 8]], 2048: [[10, 10, 10]]})
        rows(measured, {900: [[2, 2, 2], [4.4, 4.4, 0], [8, 8.08, 9]], 2048: [[10.1, 10.1, 10.1]]}, measure_recall=True)
        status, out, err = tiny_model.command(contract_study.main, *words)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("m, 1024 tokens, prompts 3: 4 s, measuring adds +1.00 %", out)
        self.assertEqual([json.loads(line)["metrics"]["added"] for line in self.rows.read_text().splitlines()], [0.01, 0.01])
        rows(measured, {900: [[2.1], [4.4], [8]], 2048: [[10.1]]}, measure_recall=True)
        self.assertEqual(tiny_model.command(contract_study.main, *words)[0], 1)
        rows(measured, {900: [[2]]}, measure_recall=True)
        status, _, err = tiny_model.command(contract_study.main, *words)
        self.assertEqual((status, "the same prompts" in err), (2, True))
        rows(measured, {900: [[2]]}, measure_recall=True, min_recall=0.9)
        status, _, err = tiny_model.command(contract_study.main, *words)
        self.assertEqual((status, "headwater and min_recall" in err), (2, True))
        rows(measured, {900: [[2]]})
        status, _, err = tiny_model.command(contract_study.main, *words)
        self.assertEqual((status, "without measure_recall" in err), (2, True))

    def test_input_that_cannot_be_used_ends_with_2(self):
        made = self.make("--count", 1, "--tokens", 300)
        self.write_results([*made, *made])
        words = ["check", self.folder, "--prompts", self.prompts, "--results", self.results, "--details", self.details,
                 "--output", self.rows, "--device", "cpu"]
        status, _, err = tiny_model.command(contract_study.main, *words)
        self.assertEqual(status, 2)
        self.assertIn("is there twice", err)
        self.write_results([{**made[0], "name": "text:300:9"}])
        status, _, err = tiny_model.command(contract_study.main, *words)
        self.assertEqual((status, "text:300:9 is not in" in err), (2, True), err)
        for tokens, count, says in ((100000, 1, "100000 are wanted"), (600, 5, "numbers:600:2: .* do not fit"),
                                    (600, 0, "--count: 0 is not")):
            status, _, err = tiny_model.command(contract_study.main, "make", self.folder, "--tokens", tokens, "--count", count,
                                                "--text", self.folder / "text.txt", "--output", self.prompts)
            self.assertEqual(status, 2)
            self.assertRegex(err, says)


if __name__ == "__main__":
    unittest.main()
