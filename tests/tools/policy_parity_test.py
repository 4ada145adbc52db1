"""tools/policy_parity.py on a tiny random Llama, with a policy made of the reference in place of the GPU's, and its parts.
Skipped where torch or transformers is not installed; the whole is tested where HEADWATER_REFERENCE names a library."""

import json
import math
import os
import sys
import tempfile
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]
import policy_exact  # noqa: E402
import policy_masks  # noqa: E402
import policy_parity  # noqa: E402
import tiny_model  # noqa: E402
from headwater import ops  # noqa: E402
from headwater.eval.blocks import BlockTable, index_of_table  # noqa: E402
from headwater.ops.policies import KeyRanges  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
TOKENS = 1400
SCALE = tiny_model.SHAPE["head_dim"] ** -0.5
HAS_REFERENCE = Path(os.environ.get("HEADWATER_REFERENCE", "")).is_file()


class FakeGpu:
    """What headwater.ops.PatternPolicy is, from the reference; `spoil` changes what it returns."""

    def __init__(self, spec, shape, layers, spoil=lambda listed, out: None):
        self._spec, self._spoil, self._rule = spec, spoil, policy_masks.References(None, shape, [], 0)
        if spec.name != "headwater":
            self._reference = ops.Reference(spec.name, spec.values, **spec.model(shape, layers))

    def begin(self, tokens):
        self._tokens = tokens

    def attention(self, layer, q, k, v):
        found = types.SimpleNamespace(dense=False, index=None, ranges=None, overflows=lambda: 0)
        if self._spec.name == "headwater":
            table = self._rule._headwater(self._spec, policy_masks.Layer(layer, q, k, v))
        else:
            table = self._reference.select(layer, q, k, v)
        listed, positions = table.listed, table.tile_positions
        out = torch.empty_like(q)
        keys = torch.arange(len(q))
        for head in range(q.shape[1]):
            of_head = listed[head * len(listed) // q.shape[1]][torch.arange(len(q)) // positions]
            mask = of_head.repeat_interleave(128, dim=1)[:, :len(q)] & (keys <= keys[:, None])
            means = masks = None
            if table.window_tokens >= 0:
                mask &= (keys < table.sink_tokens) | (keys > keys[:, None] - table.window_tokens)
                found.ranges = a_shape_ranges(len(q), table.sink_tokens, table.window_tokens)
            elif self._spec.name == "vertical_slash":  # all diagonals
                found.ranges = ranges_of(len(q), [[(0, first + 64)] for first in range(0, len(q), 64)], lists=q.shape[1])
            if self._spec.corrected:
                means = policy_exact.Means(k[:, head // 2], v[:, head // 2])
                masks = policy_exact.mean_keys(of_head, (keys // positions * positions + 1) // 128)
            out[:, head] = policy_exact.attention(q[:, head], k[:, head // 2], v[:, head // 2], mask, SCALE, means, masks)
        self._spoil(listed, out)
        if found.ranges is None:
            found.index = index_of_table(BlockTable(listed, positions, len(q), len(q)))
        return out, found


def ranges_of(tokens, of_tiles, columns=None, sink=-1, window=-1, lists=1):
    """KeyRanges of `lists` equal lists from [(begin, end)] a tile, None: whole; columns: [keys] a tile."""
    def flat(tiles):
        counts = [-1 if one is None else len(one) for one in tiles]
        offsets = [sum(max(0, count) for count in counts[:i]) for i in range(len(counts))]
        entries = torch.tensor([entry for one in tiles if one for entry in one] or [0], dtype=torch.int32).flatten()
        return torch.tensor(counts, dtype=torch.int32).repeat(lists), torch.tensor(offsets).repeat(lists), entries

    ranges = KeyRanges.__new__(KeyRanges)
    ranges._tokens, ranges.num_lists, ranges._limits, ranges._ranges = tokens, lists, (sink, window), flat(of_tiles)
    ranges._ranges = (*ranges._ranges[:2], torch.cat([ranges._ranges[2], torch.tensor([7], dtype=torch.int32)]))  # what follows
    ranges._columns = flat(columns) if columns else None
    return ranges


def a_shape_ranges(tokens, sink, window):
    sinks = -(-sink // 64) * 64
    of_tiles = []
    for first in range(0, tokens, 64):
        begin = max(0, first - window + 1) // 64 * 64
        of_tiles.append([(0, first + 64)] if begin <= sinks else [(0, sinks), (begin, first + 64)])
    return ranges_of(tokens, of_tiles, sink=sink, window=window)


class KeyRangesTest(unittest.TestCase):
    def test_ranges_columns_and_whole_tiles(self):
        ranges = ranges_of(200, [[(0, 64)], [(10, 74), (100, 164)], None, [(136, 200)]], [[], [2, 5], [], [0]])
        wanted = torch.zeros(4, 200, dtype=torch.bool)
        wanted[0, :64] = wanted[1, 10:74] = wanted[1, 100:128] = wanted[1, [2, 5]] = wanted[2, :192] = True
        wanted[3, 136:] = wanted[3, 0] = True
        self.assertTrue(torch.equal(ranges.tile_keys(0, 0, 4), wanted))
        self.assertTrue(torch.equal(ranges.tile_keys(0, 1, 3), wanted[1:3]))
        rows = torch.tensor([3, 70, 130, 199])
        causal = torch.arange(200) <= rows[:, None]
        self.assertTrue(torch.equal(ranges.list_mask(0, rows) & causal, wanted & causal))
        self.assertTrue(torch.equal(ranges.row_mask(rows, 3), ranges.list_mask(0, rows).expand(3, -1, -1)))

    def test_a_window_ends_at_each_row(self):
        ranges = a_shape_ranges(500, 10, 100)
        rows, keys = torch.arange(500), torch.arange(500)
        causal = keys <= rows[:, None]
        wanted = causal & ((keys < 10) | (keys > rows[:, None] - 100))
        self.assertTrue(torch.equal(ranges.list_mask(0, rows) & causal, wanted))
        tiles = torch.stack([wanted[first:first + 64].any(dim=0) for first in range(0, 500, 64)])
        self.assertTrue(torch.equal(ranges.tile_keys(0, 0, 8), tiles))
        blocks = policy_masks.blocks_of_ranges(ranges, 1, 500)
        self.assertEqual(blocks[0].int().tolist(), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]])


class ExactTest(unittest.TestCase):
    def test_mean_keys_are_the_rule_of_the_header(self):
        listed = torch.zeros(4, 21, dtype=torch.bool)
        listed[1, 9] = listed[2, :21] = True
        fine, coarse = policy_exact.mean_keys(listed, torch.tensor([20, 16, 20, 7]))
        self.assertEqual([row.nonzero()[:, 0].tolist() for row in fine],
                         [[16, 17, 18, 19], [8, 10, 11, 12, 13, 14, 15], [], list(range(7))])
        self.assertEqual(coarse.int().tolist(), [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])

    def test_means_of_equal_keys_are_exact(self):
        draw = torch.Generator().manual_seed(0)
        k = torch.randn(1, 16, generator=draw).bfloat16().float().expand(1300, 16)
        v = torch.randn(11, 16, generator=draw).bfloat16().float().repeat_interleave(128, 0)[:1300]
        v[:1024] = v[0]  # one superblock's
        q = torch.randn(1, 16, generator=draw)
        listed = torch.zeros(1, 11, dtype=torch.bool)
        listed[0, 10] = True
        mask = listed.repeat_interleave(128, 1)[:, :1300]
        means = policy_exact.Means(k, v)
        masks = policy_exact.mean_keys(listed, torch.tensor([10]))
        out = policy_exact.attention(q, k, v, mask, 1.0, means, masks)
        dense = policy_exact.attention(q, k, v, torch.ones(1, 1300, dtype=torch.bool), 1.0)
        self.assertLess(policy_exact.error(out, dense), 1e-12)
        self.assertGreater(policy_exact.error(policy_exact.attention(q, k, v, mask, 1.0), dense), 0.1)

    def test_sampled_rows_lie_in_agreeing_tiles(self):
        rows = policy_exact.sample_rows(torch.tensor([False, True, False, True]), 128, 400, 64, 1)
        self.assertEqual(set((rows // 128).tolist()), {1, 3})
        self.assertLess(int(rows.max()), 400)
        self.assertEqual(len(policy_exact.sample_rows(torch.zeros(3, dtype=torch.bool), 128, 400, 64, 1)), 0)


class MasksTest(unittest.TestCase):
    def test_specs(self):
        spec = policy_masks.Spec.parse("share:clusters=neighbours,gamma=0.95")
        self.assertEqual((spec.name, spec.values, spec.in_order), ("share", {"gamma": 0.95}, True))
        fields = spec.model(policy_masks.Shape(10, 2, 1, 16), 3)
        self.assertEqual(fields["clusters"], [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 1)])
        self.assertEqual((fields["layers"], fields["shared_clusters"]), (3, [0, 1]))
        with self.assertRaisesRegex(policy_masks.MaskError, "'alpha=x' is not parameter=number"):
            policy_masks.Spec.parse("flash:alpha=x")

    def test_overlap(self):
        ours = torch.tensor([[[1, 1, 0]], [[0, 0, 0]]], dtype=torch.bool)
        overlap = policy_masks.Overlap.of(ours, torch.tensor([[[1, 0, 1]], [[0, 1, 0]]], dtype=torch.bool))
        self.assertEqual((overlap.iou.tolist(), overlap.differing), ([1 / 3, 0.0], 3))
        with self.assertRaisesRegex(policy_masks.MaskError, "do not compare"):
            policy_masks.Overlap.of(ours, ours[:1])


@unittest.skipUnless(HAS_REFERENCE, "HEADWATER_REFERENCE names no library")
class ToolTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        tiny_model.save_model(cls.folder)
        np.save(cls.folder / "ids.npy", np.random.default_rng(0).integers(0, 257, TOKENS))

    def run_tool(self, *policies, spoil=lambda listed, out: None, tokens=TOKENS):
        output = self.folder / f"{self.id()}.jsonl"
        with mock.patch.object(policy_parity, "make_gpu", lambda *model: FakeGpu(*model[:3], spoil)):
            status, said, errors = tiny_model.command(
                policy_parity.main, self.folder, "--prompt_ids", self.folder / "ids.npy", "--tokens", tokens, "--layers=0,2",
                "--output", output, "--device=cpu", "--policies", *policies)
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return status, said + errors, {row["params"]["policy"]: row["metrics"] for row in rows}

    def test_every_policy_agrees_with_itself(self):
        policies = ("flash:alpha=0.5", "flash2:dense_layers=0,alpha=0.6,dense_last_tiles=2", "flex:min_budget_tokens=128",
                    "skeleton", "xattention:threshold=0.5", "a_shape:sink_tokens=100,window_tokens=300",
                    "share:pivots_per_layer=1,min_budget_tokens=128", "share:clusters=neighbours,min_budget_tokens=128",
                    "headwater:threshold=0.9,window_blocks=1,dense_below_tokens=0,dense_last_tokens=16")
        status, said, rows = self.run_tool(*policies)
        self.assertEqual(status, 0, said)
        self.assertEqual(set(rows), set(policies))
        status, said, all_keys = self.run_tool("vertical_slash:n_slash=2000")
        self.assertEqual((status, all_keys["vertical_slash:n_slash=2000"]["density"]), (0, 1), said)
        for policy, metrics in rows.items():
            with self.subTest(policy):
                self.assertEqual((metrics["iou_min"], metrics["differing"]), (1, 0))
                self.assertLess(metrics["rel_error"], 4e-3)
                self.assertLess(metrics["density"], 0.999)
                self.assertEqual(metrics["rows"], 2 * 4 * policy_parity.ROWS_PER_HEAD)

    def test_another_block_or_output_is_status_1(self):
        def drop(listed, _):
            listed[1, -1, 0] = False
            listed[1, -1, 3] = False

        status, said, rows = self.run_tool("flash:alpha=0.5,dense_last_blocks=1", spoil=drop)
        self.assertEqual(status, 1, said)
        self.assertEqual(rows["flash:alpha=0.5,dense_last_blocks=1"]["differing"], 4)
        self.assertIn("is below 0.99", said)
        status, said, rows = self.run_tool("flex", spoil=lambda _, out: out.mul_(1.02))
        self.assertEqual(status, 1, said)
        self.assertAlmostEqual(rows["flex"]["rel_error"], 0.02, delta=3e-3)
        self.assertIn("is over 0.006", said)

    def test_what_cannot_run_is_named_and_others_go_on(self):
        status, said, rows = self.run_tool("flash:no_such=1", "flash")
        self.assertEqual(status, 1)
        self.assertIn("no_such", said)
        self.assertEqual(list(rows), ["flash"])
        status, said, _ = self.run_tool("flash", tokens=TOKENS + 1)
        self.assertEqual(status, 1)
        self.assertIn(f"{TOKENS + 1} in a row are wanted", said)
        with mock.patch.object(policy_parity, "SHARE_TOKENS", 1000):
            _, said, rows = self.run_tool("share:pivots_per_layer=1", "flash")
        self.assertIn("share:pivots_per_layer=1: left out over 1000 tokens", said)

    def test_heads_alone_are_heads_of_the_whole(self):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(TOKENS, heads, 16, generator=draw).bfloat16() for heads in (4, 2, 2))
        k += torch.randn(11, 2, 16, generator=draw).repeat_interleave(128, 0)[:TOKENS].bfloat16()  # blocks that differ
        shape = policy_masks.Shape(3, 4, 2, 16, tuple(10000.0 ** (-i / 8) for i in range(8)))
        layer = policy_masks.Layer(2, q, k, v)
        with ThreadPoolExecutor(2) as pool:
            references = policy_masks.References(pool, shape, [layer], 100)
            for text in ("flash:alpha=0.9,window_blocks=1",
                         "flash2:dense_layers=0,alpha=0.9,window_blocks=1,dense_last_tiles=0",
                         "skeleton:sink_tokens=0,local_tokens=64,epsilon=2", "vertical_slash:n_vertical=1,n_slash=1",
                         "xattention:threshold=0.3", "flex:min_budget_tokens=128"):
                spec = policy_masks.Spec.parse(text)
                with self.subTest(text):
                    whole = ops.Reference(spec.name, spec.values, **spec.model(shape, 1)).select(2, q, k, v)
                    part = references.start(spec)[0]()
                    self.assertEqual(part.tile_positions, whole.tile_positions)
                    self.assertTrue(torch.equal(part.listed, whole.listed))
                    self.assertLess(float(whole.listed.float().mean()), 0.5)


class DeadlineTest(unittest.TestCase):
    def test_a_reference_past_its_limit_is_an_error(self):
        layer = policy_masks.Layer(0, *(torch.zeros(256, heads, 16) for heads in (2, 1, 1)))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(__import__("time").sleep, 1)
            references = policy_masks.References(pool, policy_masks.Shape(1, 2, 1, 16), [layer], 0.05)
            with self.assertRaises(policy_parity.WaitError):
                references.start(policy_masks.Spec.parse("headwater"))[0]()
        self.assertTrue(math.isnan(policy_parity.Measured([1.0], [0.0, math.nan], [1.0], [1.0]).metrics()["rel_error"]))


if __name__ == "__main__":
    unittest.main()
