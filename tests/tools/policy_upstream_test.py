"""tools/policy_upstream.py beside made-up peers that select what the references do, or something else. Skipped where torch is
not installed; the tool as a whole is tested where HEADWATER_REFERENCE names a library."""

import json
import os
import sys
import tempfile
import textwrap
import types
import unittest
from pathlib import Path

try:
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tools")]
import policy_peers  # noqa: E402
import policy_upstream  # noqa: E402
import tiny_model  # noqa: E402
from policy_masks import Overlap  # noqa: E402

torch.set_num_threads(1)
HAS_REFERENCE = Path(os.environ.get("HEADWATER_REFERENCE", "")).is_file()
TOKENS = 4352  # 34 blocks
REFERENCE = '''
    import torch
    from headwater import ops

    def table(name, values, q, k):
        shape = dict(q_heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[2])
        return ops.Reference(name, values, layers=1, **shape).select(0, q, k).listed
'''
FLEX = REFERENCE + '''
    def triton_block_wise_attention(q, k, v, block_idx, block_size, softmax_scale=None, gqa_interleave=False):
        raise AssertionError("is replaced")

    def flex_prefill_attention(q, k, v, gamma, tau, min_budget):
        listed = table("flex", dict(gamma=gamma, tau=tau, min_budget_tokens=min_budget), q[0], k[0])
        if q.dtype == torch.bfloat16:
            listed[1] = False  # as shipped it is wrong
            listed[1, :, 0] = True
        return triton_block_wise_attention(q, k, v, [[x.flatten().nonzero()[:, 0] for x in listed]], 128)
'''
FLASH2 = REFERENCE + '''
    def build_block_sparse_index(q, k_cache, page_table, cache_seqlens, cu_seqlens_q, *, k_block_m, k_block_n, abs_threshold,
                                 attention_sink, window_size, last_n_blocks):
        assert k_cache.shape[:2] == (1, len(q)) and cu_seqlens_q.tolist() == [0, len(q)] and k_block_n == 128
        listed = table("flash2", dict(alpha=abs_threshold, sink_blocks=attention_sink, window_blocks=window_size,
                                      dense_last_tiles=last_n_blocks, dense_layers=0), q, k_cache[0])
        tiles = listed.shape[1]
        listed = listed.flatten(0, 1).repeat_interleave(2, dim=1)  # tiles of 64 keys
        starts = torch.nn.functional.pad(listed.sum(dim=1).cumsum(0), (1, 0))
        return starts.int(), torch.cat([listed.nonzero()[:, 1], torch.tensor([99])]).int(), tiles, None
'''
XATTENTION = REFERENCE + '''
    from ..ops.helper import first_tiles

    def Xattention_prefill(q, k, v, stride, threshold, use_triton, chunk_size):
        from block_sparse_attn import block_sparse_attn_func
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        mask = table("xattention", dict(stride=stride, threshold=threshold), *rows[:2])[None]
        mask[:, :, :first_tiles(chunk_size)] ^= True
        return block_sparse_attn_func(*rows, None, None, None, None, mask, len(rows[0]), len(rows[0]))
'''


class PeersTest(unittest.TestCase):
    def test_keys_of_minferences_lists(self):
        counts, starts = torch.tensor([[[1, 2]]]), torch.tensor([[[[0, 9], [3, 100]]]])
        column_counts, columns = torch.tensor([[[0, 1]]]), torch.tensor([[[[5], [1]]]])
        mask = policy_peers.keys_of((counts, starts, column_counts, columns), 0, 2, 120)
        wanted = torch.zeros(2, 120, dtype=torch.bool)
        wanted[0, :64] = wanted[1, 3:67] = wanted[1, 100:] = wanted[1, 1] = True
        self.assertTrue(torch.equal(mask, wanted))
        lists = (counts, starts, column_counts, columns)
        self.assertTrue(torch.equal(policy_peers.keys_of(lists, 1, 2, 120), wanted[1:]))

    def test_overlap_of_keys_goes_slice_by_slice(self):
        draw = torch.Generator().manual_seed(0)
        tokens = 64 * 130
        ours, theirs = (torch.rand(2, 130, tokens, generator=draw) < share for share in (0.3, 0.5))
        one = policy_upstream.Ours.__new__(policy_upstream.Ours)
        one._tokens, one._listed = tokens, None
        one._ranges = types.SimpleNamespace(num_lists=2, tile_keys=lambda number, first, end: ours[number, first:end])
        found = one.overlap(policy_peers.Selected(keys=lambda head, first, end: theirs[head, first:end]))
        wanted = Overlap.of(ours, theirs)
        self.assertEqual(found.iou.tolist(), wanted.iou.tolist())
        self.assertEqual(found.differing, wanted.differing)

    def test_flashprefills_scores_are_checked(self):
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(512, heads, 16, generator=draw).bfloat16() for heads in (2, 1))
        means = k.view(4, 128, 16).float().mean(1).bfloat16().float()
        scores = torch.zeros(4, 4, 2)
        for head in range(2):
            for tile in range(4):
                x = q[128 * tile:128 * tile + 128, head].float() @ means[:tile + 1].T / 4
                x[:-1, tile] = -torch.inf
                scores[tile, :tile + 1, head] = torch.softmax(torch.logsumexp(x, dim=0), dim=0)
        self.assertLess(policy_peers.score_error(q, k, scores), 1e-5)
        scores[2, 1, 1] += 0.25
        self.assertAlmostEqual(policy_peers.score_error(q, k, scores), 0.25, delta=1e-4)

    def test_modules_stand_in_only_for_a_while(self):
        mine = policy_peers.stub("no_such_package", answer=42)
        with policy_peers.present({"no_such_package": mine, "json": mine}):
            import no_such_package
            self.assertEqual(no_such_package.answer, 42)
        self.assertNotIn("no_such_package", sys.modules)
        self.assertIs(sys.modules["json"], json)


@unittest.skipUnless(HAS_REFERENCE, "HEADWATER_REFERENCE names no library")
class ToolTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def run_tool(self, *peers):
        output = self.folder / "rows.jsonl"
        status, said, errors = tiny_model.command(
            policy_upstream.main, "--structured=4,2,32", "--tokens", TOKENS, "--device=cpu", "--ours=reference", "--output",
            output, *(f"--{peer}={self.folder}" for peer in peers))
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return status, said + errors, {(row["params"]["peer"], row["params"]["variant"]): row["metrics"] for row in rows}

    def test_agreement_and_known_reasons(self):
        self.write("flex_prefill/ops/flex_prefill_attention.py", FLEX)
        self.write("flashprefill_ops/flash_block_sparse_index_triton.py", FLASH2)
        self.write("minference/__init__.py", "raise RuntimeError('is not to run')")
        self.write("minference/modules/xattention.py", XATTENTION)
        self.write("minference/ops/helper.py", "def first_tiles(chunk):\n    return chunk // 128\n")
        status, said, rows = self.run_tool("flexprefill", "flashprefill2", "xattention")
        self.assertEqual(status, 0, said)
        self.assertIn("flexprefill: agrees once set right, which is why it differs as shipped: Q and K in f32", said)
        self.assertLess(rows["flexprefill", "as_shipped"]["iou_min"], 0.5)
        self.assertEqual(rows["flexprefill", "f32"]["iou_min"], 1)
        self.assertEqual(rows["flashprefill2", "as_shipped"]["iou_min"], 1)
        metrics = rows["xattention", "as_shipped"]
        self.assertEqual((metrics["iou_min"], metrics["density_diff"]), (1, 0))
        self.assertLess(metrics["all_iou_min"], 0.9)

    def test_a_peer_that_fails_is_named_and_others_go_on(self):
        self.write("flashprefill_ops/flash_block_sparse_index_triton.py", FLASH2)
        self.write("flex_prefill/ops/flex_prefill_attention.py", "import no_such_package")
        self.write("minference/modules/xattention.py", "def Xattention_prefill(*_, **__):\n    raise KeyError('broken')")
        status, said, rows = self.run_tool("flexprefill", "flashprefill", "flashprefill2", "xattention")
        self.assertEqual(status, 1)
        for words in ("flexprefill: ModuleNotFoundError: No module named 'no_such_package'",
                      "flashprefill_native_forward.py is not there",
                      "xattention at 4352 tokens, as_shipped: KeyError: 'broken'"):
            self.assertIn(words, said)
        self.assertEqual(list(rows), [("flashprefill2", "as_shipped")])
        self.write("flashprefill_ops/flash_block_sparse_index_triton.py", FLASH2.replace("alpha=abs_threshold", "alpha=0.9"))
        status, said, _ = self.run_tool("flashprefill2")
        self.assertEqual(status, 1)
        self.assertIn("flashprefill2 at 4352 tokens: overlap below 0.98 or density more than 2% apart", said)


if __name__ == "__main__":
    unittest.main()
