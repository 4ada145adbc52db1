"""headwater.ops.BlockIndex: what it refuses. On CPU tensors; skipped where torch is not installed."""

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

CPU = torch.device("cpu")


def index(lists, num_lists=1, tile_positions=128):
    """An index from lists of blocks, one a segment; None: dense."""
    counts = [-1 if blocks is None else len(blocks) for blocks in lists]
    flat = [block for blocks in lists if blocks for block in blocks]
    offsets = [sum(max(count, 0) for count in counts[:i]) for i in range(len(counts))]
    return ops.BlockIndex(num_lists, len(lists) // num_lists, tile_positions, torch.tensor(counts, dtype=torch.int32),
                          torch.tensor(offsets, dtype=torch.int64), torch.tensor(flat or [0], dtype=torch.int32))


class BlockIndexTest(unittest.TestCase):
    def test_ascending_visible_lists_hold_for_their_lengths(self):
        good = index([[0], [0, 1], None, []])
        good.validate(500, 500)
        self.assertEqual(good.validated, (500, 500))
        self.assertAlmostEqual(good.density(500, 500), (1 + 2 + 3 + 0) / 10)

    def test_wrong_lists_name_the_segment(self):
        for lists, says in (([[0], [1, 0]], "segment 1: block 0 at place 1"), ([[0], [0, 0]], "segment 1: block 0"),
                            ([[1], [0]], "segment 0: block 1"), ([[0], [-1]], "segment 1: block -1")):
            with self.subTest(lists), self.assertRaisesRegex(ValueError, says):
                index(lists).validate(200, 200)

    def test_counts_and_offsets_that_leave_the_array(self):
        for change, says in ((lambda i: i.counts.fill_(-2), "count below -1"), (lambda i: i.offsets.fill_(-1), "outside"),
                             (lambda i: i.offsets.fill_(7), "outside")):
            wrong = index([[0], [0, 1]])
            change(wrong)
            with self.subTest(says), self.assertRaisesRegex(ValueError, says):
                wrong.validate(200, 200)

    def test_an_index_of_other_lengths_or_heads_is_refused(self):
        two_tiles = index([[0], [0, 1]])
        two_tiles.check_shape(200, 1, 1, CPU)
        with self.assertRaisesRegex(ValueError, "2 tiles of 128 positions; 3 of 128"):
            two_tiles.check_shape(300, 1, 1, CPU)
        with self.assertRaisesRegex(ValueError, "; 7 of 32 are wanted for 200 queries"):
            two_tiles.check_shape(200, 4, 1, CPU)
        with self.assertRaisesRegex(ValueError, "num_lists is 1; 2"):
            two_tiles.check_shape(200, 4, 2, CPU)
        two_tiles.counts = two_tiles.counts.long()
        with self.assertRaisesRegex(ValueError, "counts is torch.int64"):
            two_tiles.check_shape(200, 1, 1, CPU)


class PrefillAttentionTest(unittest.TestCase):
    def test_tensors_off_the_gpu_are_refused(self):
        q = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
        with self.assertRaisesRegex(ValueError, "q is .* on cpu"):
            ops.prefill_attention(q, q, q)


class MassTest(unittest.TestCase):
    def refused(self, says, function, *args, **more):
        with self.assertRaisesRegex(ValueError, says):
            function(*args, **more)

    def test_what_is_not_on_a_gpu_or_of_another_shape_is_refused(self):
        q, k = torch.zeros(256, 8, 128, dtype=torch.bfloat16), torch.zeros(256, 2, 128, dtype=torch.bfloat16)
        rows = torch.arange(4)
        self.refused("q is .* on cpu; .* on a CUDA device", ops.block_mass, q, k, torch.zeros(256, 8))
        self.refused("q has 2 dimensions", ops.row_mass, q[0], k, rows)
        self.refused("k has 2 dimensions", ops.row_mass, q, k[0], rows)
        self.refused(r"mass is \(4, 8, 3\); .* 2\] is wanted for 256 tokens", ops.recall_of_rows, torch.zeros(4, 8, 3), rows,
                     index([[0]]), 256)
        self.refused("mass is .* on cpu", ops.recall_of_rows, torch.zeros(4, 8, 2), rows, index([[0]]), 256)


if __name__ == "__main__":
    unittest.main()
