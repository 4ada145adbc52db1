"""headwater.eval's published policies and `headwater` on a CPU against brute force; their references come from
libheadwater_reference.so (HEADWATER_REFERENCE). Skipped where torch is not installed."""

import json
import math
import os
import sys
import tempfile
import unittest
from pathlib import Path

try:
    import torch
except ImportError:
    print("skipped: torch is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater import ops  # noqa: E402
from headwater.eval import policies  # noqa: E402
from headwater.eval.attention import dense_attention  # noqa: E402
from headwater.eval.maps import block_averages  # noqa: E402

SPECS = ("flash:alpha=0.8,dense_last_blocks=0", "flash2:alpha=0.9,dense_layers=0,dense_last_tiles=1",
         "flex:gamma=0.4,min_budget_tokens=128", "share:gamma=0.4,min_budget_tokens=128,pivots_per_layer=1",
         "skeleton:epsilon=200", "vertical_slash:n_vertical=40,n_slash=60", "xattention:stride=8,threshold=0.5")


def inputs(tokens, q_heads=4, kv_heads=2, dim=32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, dim, generator=draw) for heads in (q_heads, kv_heads, kv_heads)]


def topics(tokens, **shape):
    """Inputs whose queries and keys have a topic every 100 tokens, so that patterns are sparse."""
    q, k, v = inputs(tokens, **shape)
    theme = torch.randn(5, q.shape[2], generator=torch.Generator().manual_seed(9)) * 2
    of_token = theme[torch.arange(tokens) // 100 * 3 % 5][:, None]
    return q + of_token, k + of_token, v


def brute(q, k, v, mask):
    """Attention head by head under bool [query heads, tokens, keys], causality added."""
    group, heads = q.shape[1] // k.shape[1], []
    mask = mask & torch.ones(len(q), len(k), dtype=torch.bool).tril()
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head // group].double().T / math.sqrt(q.shape[2])
        heads.append((torch.softmax(scores.masked_fill(~mask[head], -math.inf), -1) @ v[:, head // group].double()).float())
    return torch.stack(heads, dim=1)


class ReferenceTest(unittest.TestCase):
    def test_output_is_attention_over_the_lists(self):
        q, k, v = topics(1500)
        for spec in SPECS:
            with self.subTest(spec):
                policy = policies.make(spec)
                for layer in range(2):
                    out, stats = policy.attend(layer, q, k, v)
                    self.assertEqual(stats.ran, policy.name)
                    self.assertLess(stats.density(), 1)
                    torch.testing.assert_close(out, brute(q, k, v, stats.row_mask(torch.arange(1500))), atol=1e-4, rtol=0)

    def test_a_prompt_begins_at_layer_0(self):
        q, k, v = inputs(700)
        policy = policies.make("share:gamma=0.4,min_budget_tokens=128,pivots_per_layer=1")
        first = [policy.attend(layer, q, k, v)[0] for layer in range(2)]
        again = [policy.attend(layer, q, k, v)[0] for layer in range(2)]
        for one, other in zip(first, again):
            self.assertTrue(torch.equal(one, other))

    def test_clusters_come_from_a_file(self):
        q, k, v = topics(1500)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clusters.json"
            path.write_text(json.dumps({
                "format": 1, "model": "m-0", "layers": 2, "heads": 4, "gamma": 0.9, "shared_clusters": ["0"],
                "clusters": {"0": [[0, 3], [1, 2]], **{str(1 + i): [[i // 4, i % 4]] for i in range(8) if i not in (3, 6)}},
                "calibration": {"texts": ["a"], "held_out": "b", "tokens": 4096, "block_tokens": 128, "dims": 64,
                                "max_distance": 0.4, "tolerance": 0.02, "max_density": 0.5, "tests": {}}}))
            policy = policies.make(f"share:clusters={path},gamma=0.4,min_budget_tokens=128")
            own = policies.make("share:gamma=0.4,min_budget_tokens=128")
            seen = [[one.attend(layer, q, k, v)[1].row_mask(torch.arange(1500)) for layer in range(2)] for one in (policy, own)]
            self.assertTrue(bool(seen[0][0][3][1499].all()))  # a pivot is dense
            self.assertFalse(bool(seen[1][0][3][1499].all()))
            self.assertTrue(torch.equal(seen[0][0][:3], seen[1][0][:3]))

    def test_short_prompts_are_dense(self):
        q, k, v = inputs(300)
        out, stats = policies.make("flex").attend(0, q, k, v)
        self.assertEqual(stats.ran, "dense")
        torch.testing.assert_close(out, dense_attention(q, k, v), atol=1e-5, rtol=0)

    def test_refuses_by_name_and_range(self):
        for spec, says in (("flash:alpha=2", "alpha 2 is not from 0 to 1"), ("flex:gamma=1", "gamma 1 is"),
                           ("xattention:stride=24", "stride 24"), ("skeleton:local_tokens=0", "local_tokens"),
                           ("flash2:dense_layers=-1", "dense_layers -1"), ("flash:gamma=0.5", "no parameter 'gamma")):
            with self.subTest(spec), self.assertRaisesRegex(ValueError, says):
                policies.make(spec)

    def test_the_model_gives_rotary_frequencies(self):
        angles = tuple(100.0 ** (-2 * m / 32) for m in range(16))
        plain, told = (policies.make("skeleton:epsilon=200", *model) for model in ((), ({"rope_frequencies": angles},)))
        self.assertEqual((plain.rope_frequencies, told.rope_frequencies), ((), angles))
        q, k, v = topics(1500)
        self.assertFalse(torch.equal(plain.attend(0, q, k, v)[0], told.attend(0, q, k, v)[0]))
        with self.assertRaisesRegex(ValueError, "no parameter 'rope_frequencies"):
            policies.make("skeleton:rope_frequencies=1")

    def test_tables_are_checked(self):
        model = {"layers": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 32}
        with self.assertRaisesRegex(ValueError, "15 rope_frequencies; 16"):
            ops.Reference("skeleton", rope_frequencies=[1.0] * 15, **model)
        with self.assertRaisesRegex(ValueError, "clusters are for policy share"):
            ops.Reference("flex", clusters=[(0, 0, 0)], **model)
        with self.assertRaisesRegex(ValueError, "cluster 1 of head 4 in layer 0 is outside"):
            ops.Reference("share", clusters=[(0, 4, 1)], **model)
        with self.assertRaisesRegex(ValueError, "is not one of dense, "):
            ops.Reference("sparse", **model)
        with self.assertRaises(NotImplementedError):
            ops.Reference("dense", **model).select(0, *inputs(10))
        with self.assertRaisesRegex(ValueError, r"k is \(10, 4, 32\)"):
            ops.Reference("flash", **model).select(0, inputs(10)[0], inputs(10)[0])


class HeadwaterTest(unittest.TestCase):
    def test_means_stand_for_what_is_not_listed(self):
        q, k, v = topics(1100)
        policy = policies.make("headwater:threshold=0.9,window_blocks=1,dense_last_tokens=0,dense_below_tokens=0")
        out, stats = policy.attend(0, q, k, v)
        self.assertLess(stats.density(), 0.9)
        listed = stats.row_mask(torch.arange(1100))
        self.assertFalse(bool(listed[:, 1090].all()))
        for row, head in ((5, 0), (400, 1), (700, 2), (1090, 1), (1090, 3)):
            first, kv = row // 64 * 64, head // 2
            logits, values = [], []
            for begin in range(0, row + 1, 128):
                end = min(begin + 128, row + 1)
                if listed[head, row, begin]:
                    logits += (k[begin:end, kv] @ q[row, head] / math.sqrt(32)).tolist()
                    values += list(v[begin:end, kv])
                elif begin + 128 <= first + 1:
                    means = [x[begin:begin + 128, kv].mean(0).bfloat16().float() for x in (k, v)]
                    logits.append(float(means[0] @ q[row, head]) / math.sqrt(32) + math.log(128))
                    values.append(means[1])
            wanted = torch.softmax(torch.tensor(logits), 0) @ torch.stack(values)
            torch.testing.assert_close(out[row, head], wanted, atol=1e-5, rtol=0)

    def test_without_correction_it_is_its_lists(self):
        q, k, v = inputs(1000)
        policy = policies.make("headwater:threshold=0.9,correction=0,window_blocks=1,dense_below_tokens=0")
        out, stats = policy.attend(0, q, k, v)
        torch.testing.assert_close(out, brute(q, k, v, stats.row_mask(torch.arange(1000))), atol=1e-5, rtol=0)

    def test_short_prompts_are_dense(self):
        self.assertEqual(policies.make("headwater").attend(0, *inputs(500))[1].ran, "dense")


class OracleTest(unittest.TestCase):
    def test_the_fewest_blocks_that_hold_the_recall(self):
        q, k, v = inputs(1000, seed=1)
        q, k = q * 2, k * 2
        policy = policies.make("oracle:recall=0.8")
        mass = block_averages(q, k)
        listed = policy.select(mass)
        held = (mass * listed).sum(dim=-1)
        self.assertGreaterEqual(float(held.min()), 0.8)
        for head, tile in ((0, 4), (1, 7), (3, 5)):
            others = [block for block in range(tile) if listed[head, tile, block]]
            least = min(float(mass[head, tile, block]) for block in others)
            self.assertLess(float(held[head, tile]) - least, 0.8)
        out, stats = policy.attend(0, q, k, v)
        torch.testing.assert_close(out, brute(q, k, v, stats.row_mask(torch.arange(1000))), atol=1e-5, rtol=0)

    def test_all_of_it_is_dense(self):
        listed = policies.make("oracle:recall=1").select(block_averages(*inputs(700)[:2]))
        self.assertEqual(int(listed.sum()), 4 * 6 * 7 // 2)


if __name__ == "__main__":
    if "HEADWATER_REFERENCE" not in os.environ:
        print("skipped: HEADWATER_REFERENCE is not set")
        sys.exit(77)
    unittest.main()
