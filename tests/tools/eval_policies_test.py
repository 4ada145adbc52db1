"""headwater.eval's attention, block tables and policies against brute force, on CPU tensors. Skipped where torch is not
installed."""

import math
import sys
import unittest
from pathlib import Path

try:
    import torch
except ImportError:
    print("skipped: torch is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater import ops  # noqa: E402
from headwater.eval import attention, blocks, policies  # noqa: E402


def inputs(tokens, q_heads=4, kv_heads=2, dim=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, dim, generator=draw) for heads in (q_heads, kv_heads, kv_heads)]


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def brute(q, k, v, mask):
    """Attention head by head under bool [query heads, tokens, keys]."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head // group].double().T / math.sqrt(q.shape[2])
        weights = torch.softmax(scores.masked_fill(~mask[head], -math.inf), dim=-1)
        heads.append((weights @ v[:, head // group].double()).float())
    return torch.stack(heads, dim=1)


def probe_lists(q, k, policy):
    """The rule of kernels/reference/select_blocks.cc, a block at a time. bool [KV heads, tiles, blocks]."""
    tokens, group = len(q), q.shape[1] // k.shape[1]
    positions, scale = 128 // group, 1 / math.sqrt(q.shape[2])
    tiles, num_blocks = -(-tokens // positions), -(-tokens // 128)
    listed = torch.zeros(k.shape[1], tiles, num_blocks, dtype=torch.bool)
    for head in range(k.shape[1]):
        means = [k[128 * b:128 * (b + 1), head].mean(dim=0).bfloat16().double() for b in range(num_blocks)]
        for tile in range(tiles):
            first, end = tile * positions, min(tokens, (tile + 1) * positions)
            complete, total = (first + 1) // 128, -(-end // 128)
            weights = {}
            for h in range(group * head, group * (head + 1)):
                mean = q[first:end, h].mean(dim=0).bfloat16().double()
                raised = [math.exp(float(mean @ means[b]) * scale) for b in range(complete)]
                for b in range(complete):
                    weights[b] = max(weights.get(b, 0), raised[b] / sum(raised))
            dense = policy.dense_last_tokens > 0 and tile >= max(0, tokens - policy.dense_last_tokens) // positions
            for b in range(total):
                always = b < policy.sink_blocks or b >= min(total - policy.window_blocks, complete)
                listed[head, tile, b] = dense or always or weights[b] >= policy.threshold * max(weights.values())
    return listed


class AttentionTest(unittest.TestCase):
    def test_dense_and_exact_rows(self):
        q, k, v = inputs(200)
        wanted = brute(q, k, v, causal(200).expand(4, -1, -1))
        rows = torch.tensor([0, 7, 199])
        torch.testing.assert_close(attention.dense_attention(q, k, v), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(attention.exact_rows(q[rows], k, v, rows), wanted[rows], atol=1e-5, rtol=0)
        last = torch.arange(190, 200)
        torch.testing.assert_close(attention.exact_rows(q[190:], k, v, last), wanted[190:], atol=1e-5, rtol=0)

    def test_recall_and_error_of_hand_values(self):
        # All scores are equal: a row at position p spreads its mass over p + 1 keys. v is the key's position.
        q = torch.zeros(8, 2, 4)
        v = torch.arange(8.0)[:, None, None].expand(8, 1, 4).contiguous()
        mask = torch.zeros(2, 8, 8, dtype=torch.bool)
        mask[0, :, :2] = True  # two keys
        mask[1] = True
        stats = attention.Stats("test", lambda: 0.0, lambda rows: mask[:, rows])
        rows = torch.tensor([1, 3, 7])
        exact = attention.exact_rows(q[rows], torch.zeros(8, 1, 4), v, rows)
        self.assertEqual(exact[:, 0, 0].tolist(), [0.5, 1.5, 3.5])
        out = torch.zeros(8, 2, 4)
        out[rows] = exact * 1.5
        recall, error = attention.recall_and_error(q, torch.zeros(8, 1, 4), v, out, stats, rows)
        torch.testing.assert_close(recall, torch.tensor([[1, 0.5, 0.25], [1, 1, 1]]))
        self.assertAlmostEqual(error, 0.5, places=6)

    def test_recall_of_dense_is_one(self):
        q, k, v = inputs(50)
        recall, error = attention.recall_and_error(q, k, v, attention.dense_attention(q, k, v), attention.dense_stats(),
                                                   torch.tensor([3, 49]))
        self.assertEqual((recall.min().item(), recall.shape), (1, (4, 2)))
        self.assertLess(error, 1e-5)


class BlockTableTest(unittest.TestCase):
    def table(self, tokens=300, tile_positions=64):
        draw = torch.Generator().manual_seed(4)
        listed = torch.rand(2, -(-tokens // tile_positions), -(-tokens // 128), generator=draw) < 0.5
        table = blocks.BlockTable(listed, tile_positions, tokens, tokens)
        table.listed &= torch.arange(listed.shape[2]) < table.visible()[:, None]
        table.listed[..., 0] = True
        return table

    def test_it_is_an_index_and_back(self):
        table = self.table()
        index = blocks.index_of_table(table)
        index.validate(300, 300)
        again = blocks.table_of_index(index, 300, 300)
        self.assertTrue(torch.equal(again.listed, table.listed))
        self.assertAlmostEqual(again.density(), index.density(300, 300))

    def test_a_dense_segment_is_every_visible_block(self):
        index = ops.BlockIndex(1, 3, 128, torch.tensor([1, -1, 2], dtype=torch.int32), torch.tensor([0, 0, 1]),
                               torch.tensor([0, 0, 2], dtype=torch.int32))
        self.assertEqual(blocks.table_of_index(index, 300, 300).listed[0].tolist(),
                         [[True, False, False], [True, True, False], [True, False, True]])

    def test_it_runs_as_a_mask(self):
        table, (q, k, v) = self.table(), inputs(300)
        wanted = torch.zeros(4, 300, 300, dtype=torch.bool)
        for head in range(4):
            for row in range(300):
                for block in table.listed[head // 2, row // 64].nonzero().flatten().tolist():
                    wanted[head, row, 128 * block:128 * (block + 1)] = True
        out, stats = blocks.run_as_mask(q, k, v, table)
        torch.testing.assert_close(out, brute(q, k, v, wanted & causal(300)), atol=1e-5, rtol=0)
        self.assertTrue(torch.equal(stats.row_mask(torch.tensor([5, 299])), wanted[:, [5, 299]]))


class PoliciesTest(unittest.TestCase):
    def test_specs(self):
        self.assertLessEqual({"dense", "a_shape", "probe"}, set(policies.names()))
        self.assertEqual(policies.make("probe:threshold=0.5,sink_blocks=1").threshold, 0.5)
        for spec, says in (("x", "'x' is not one of a_shape"), ("probe:alpha=1", "no parameter 'alpha=1'"),
                           ("probe:threshold=2", "threshold is 2.0"), ("a_shape:window_tokens=0", "window_tokens is 0"),
                           ("a_shape:sink_tokens=x", "sink_tokens is 'x'; int"), ("dense:x=1", "it has none")):
            with self.subTest(spec), self.assertRaisesRegex(ValueError, says):
                policies.make(spec)

    def test_a_shape(self):
        q, k, v = inputs(300)
        for sink, window in ((0, 1), (3, 40), (130, 100), (10, 290)):
            policy = policies.make(f"a_shape:sink_tokens={sink},window_tokens={window}")
            mask = torch.zeros(300, 300, dtype=torch.bool)
            for row in range(300):
                for key in range(row + 1):
                    mask[row, key] = key < sink or row - window < key
            out, stats = policy.attend(0, q, k, v)
            with self.subTest(policy):
                torch.testing.assert_close(out, brute(q, k, v, mask.expand(4, -1, -1)), atol=1e-5, rtol=0)
                self.assertAlmostEqual(stats.density(), float(mask.sum() / causal(300).sum()), places=6)
                if stats.row_mask is not None:
                    rows = torch.tensor([0, 150, 299])
                    self.assertTrue(torch.equal(stats.row_mask(rows) & causal(300)[rows], mask[rows].expand(4, -1, -1)))

    def test_blocks_of_a_shape_hold_its_keys_and_no_other_blocks(self):
        for sink, window in ((0, 1), (1, 129), (128, 300), (130, 64)):
            policy = policies.make(f"a_shape:sink_tokens={sink},window_tokens={window}")
            table = policy.block_table(4, 2, 1000, torch.device("cpu"))
            mask = policy.row_mask(torch.arange(1000), 1000) & causal(1000)
            wanted = torch.zeros_like(table.listed)
            for tile in range(table.listed.shape[1]):
                keys = mask[64 * tile:64 * (tile + 1)].any(dim=0).nonzero().flatten()
                wanted[:, tile, (keys // 128).unique()] = True
            with self.subTest(policy):
                self.assertTrue(torch.equal(table.listed, wanted))

    def test_probe(self):
        for tokens, heads, spec in ((1100, (4, 2), "threshold=0.7"),
                                    (1000, (2, 2), "threshold=0.9,sink_blocks=0,window_blocks=1"),
                                    (1024, (8, 1), "threshold=0.8,sink_blocks=1,window_blocks=2,dense_last_tokens=0"),
                                    (100, (4, 2), "threshold=1"), (1, (1, 1), "threshold=1,window_blocks=0")):
            policy = policies.make(f"probe:min_tokens=0,{spec}")
            q, k, v = inputs(tokens, *heads)
            q, k = q * 10, k * 10
            table, wanted = policy.select(q, k), probe_lists(q, k, policy)
            with self.subTest(tokens=tokens, spec=spec):
                self.assertTrue(torch.equal(table.listed, wanted))
                if tokens >= 1000:
                    self.assertLess(table.density(), 0.95)
            out, stats = policy.attend(0, q, k, v)
            mask = torch.stack([table.row_mask(torch.arange(tokens), head * heads[1] // heads[0]) for head in range(heads[0])])
            # Scores are large: f32 leaves 1e-4 of them.
            torch.testing.assert_close(out, brute(q, k, v, mask & causal(tokens)), atol=1e-3, rtol=0)

    def test_probe_is_dense_under_min_tokens_and_at_a_tiny_threshold(self):
        q, k, v = inputs(700)
        self.assertEqual(policies.make("probe").attend(0, q, k, v)[1].ran, "dense")
        out, stats = policies.make("probe:min_tokens=0,threshold=1e-30").attend(0, q, k, v)
        self.assertEqual(stats.density(), 1)
        torch.testing.assert_close(out, attention.dense_attention(q, k, v), atol=1e-5, rtol=0)


if __name__ == "__main__":
    unittest.main()
