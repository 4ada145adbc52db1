"""headwater.ops.library against the built library: structures, versions and errors. Needs no GPU and no torch."""

import ctypes
import importlib.util
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("ops_library", ROOT / "python" / "headwater" / "ops" / "library.py")
library = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(library)

ADDRESS = 1 << 20  # never dereferenced: arguments are refused before


def attention(**changes):
    values = dict(q=ADDRESS, k=ADDRESS, v=ADDRESS, out=ADDRESS, total_q=100, total_k=200, num_q_heads=8, num_kv_heads=2,
                  head_dim=128, softmax_scale=0.1, num_sequences=1, query_position=library.BOTTOM_RIGHT)
    return library.AttentionArgs(**{**values, **changes})


def search(**changes):
    values = dict(q=ADDRESS, k=ADDRESS, total_q=100, total_k=200, num_q_heads=8, num_kv_heads=2, head_dim=128,
                  softmax_scale=0.1, query_position=library.BOTTOM_RIGHT, threshold=0.18, sink_blocks=2, window_blocks=4,
                  counts=ADDRESS, offsets=ADDRESS, blocks=ADDRESS, capacity=100, used=ADDRESS, overflows=ADDRESS)
    return library.SearchArgs(**{**values, **changes})


class LibraryTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.lib = library.load()

    def test_last_fields_are_read_where_the_header_has_them(self):
        with self.assertRaisesRegex(ValueError, "num_lists is 5"):
            self.lib.attention(attention(lists=library.BlockLists(num_lists=5)), ADDRESS, 1 << 20, 0)
        with self.assertRaisesRegex(ValueError, "output is null"):
            self.lib.select_blocks(search(overflows=None), ADDRESS, 1 << 20, 0)

        with self.assertRaisesRegex(ValueError, "v_means is null"):
            self.lib.attention(attention(k_means=ADDRESS), ADDRESS, 1 << 20, 0)
        with self.assertRaisesRegex(ValueError, "k or k_means"):
            self.lib.select_blocks(search(k_means=ADDRESS + 8), ADDRESS, 1 << 20, 0)
        with self.assertRaisesRegex(ValueError, "forced_density is 1.5"):
            self.lib.select_blocks(search(forced_density=1.5), ADDRESS, 1 << 20, 0)
        with self.assertRaisesRegex(NotImplementedError, "head_dim 96"):
            self.lib.merge_partials(library.MergeArgs(num_rows=1, head_dim=96), 0)

    def test_invalid_arguments_name_the_value(self):
        with self.assertRaisesRegex(ValueError, "kv_len 99 is less than q_len 100"):
            self.lib.attention(attention(total_k=99), ADDRESS, 1 << 20, 0)
        with self.assertRaisesRegex(NotImplementedError, "head_dim 96"):
            self.lib.attention(attention(head_dim=96), ADDRESS, 1 << 20, 0)
        with self.assertRaisesRegex(ValueError, "threshold is 2"):
            self.lib.select_blocks(search(threshold=2), ADDRESS, 1 << 20, 0)

    def test_workspaces_and_tiles(self):
        self.assertGreater(self.lib.attention_workspace_bytes(attention()), 0)
        self.assertEqual(self.lib.attention_workspace_bytes(attention(head_dim=96)), 0)
        self.assertEqual(self.lib.search_tiles(search()), 4)
        with self.assertRaisesRegex(ValueError, "workspace has 1 bytes"):
            self.lib.attention(attention(), ADDRESS, 1, 0)

    def refused(self, function, args, says, error=ValueError):
        with self.subTest(type(args).__name__), self.assertRaisesRegex(error, says):
            function(args, 0)

    def test_layer_operations_read_their_last_fields(self):
        lib = self.lib
        heads = dict(num_kv_heads=8, head_dim=128)
        odd = library.BlockStats(v_max_norm=ADDRESS + 8)
        self.refused(lib.block_statistics, library.BlockStatisticsArgs(total_k=100, **heads, stats=odd),
                     "v_max_norm is not 16-byte")
        self.refused(lib.mean_tables, library.MeanTablesArgs(total_k=100, num_kv_heads=8, head_dim=80), "head_dim is 80",
                     NotImplementedError)
        self.refused(lib.embed_tokens, library.EmbedTokensArgs(num_tokens=1, vocab=10, width=12), "width is 12")
        rows = dict(out=ADDRESS, num_tokens=1, width=8, scale=ADDRESS + 8)
        self.refused(lib.rms_norm, library.RmsNormArgs(num_tokens=1, width=16392), "width is 16392")
        self.refused(lib.rms_norm, library.RmsNormArgs(x=ADDRESS, weight=ADDRESS, **rows), "scale is not 16-byte")
        self.refused(lib.silu_mul, library.SiluMulArgs(gate_up=ADDRESS, **rows), "scale is not 16-byte")
        self.refused(lib.quantize_rows, library.QuantizeRowsArgs(num_rows=1, width=60), "width is 60")
        frequencies = (ctypes.c_double * 64)()
        self.refused(lib.rope_table, library.RopeTableArgs(inverse=ctypes.addressof(frequencies), head_dim=128, num_tokens=1,
                                                           attention_factor=1, cos=ADDRESS), "sin is null")
        split = library.SplitQkvArgs(num_tokens=1, num_q_heads=32, **heads, stats=library.BlockStats(k_mean=ADDRESS),
                                     first_token=64)
        self.refused(lib.split_qkv, split, "first_token is 64")
        self.refused(lib.silu_mul, library.SiluMulArgs(num_tokens=1, width=4), "width is 4")
        self.refused(lib.first_nonfinite_row, library.FirstNonFiniteRowArgs(num_tokens=1, width=8, row=4), "row is null or not")
        pack = library.PackKvArgs(k=ADDRESS, k_destination=ADDRESS, num_tokens=1, **heads, destination_bytes=100,
                                  runs=ADDRESS, num_runs=1, problems=2)
        self.refused(lib.pack_kv, pack, "problems is not 4-byte")
        linear = lambda args, stream: lib.linear_run(None, args, stream)  # noqa: E731
        self.refused(linear, library.LinearArgs(num_tokens=0, in_features=8, out_features=12), "out_features is 12")
        self.refused(linear, library.LinearArgs(num_tokens=0, in_features=8, out_features=8), "linear is null")
        self.refused(linear, library.LinearArgs(weight_scale=ADDRESS), "x_scale is null and weight_scale is not")
        self.refused(lambda options, _: lib.linear_create(options), library.LinearOptions(max_plans=-1), "max_plans is -1")
        self.refused(lib.rms_norm, library.RmsNormArgs(x_dtype=3, num_tokens=1, width=8), "x_dtype is 3")

    def test_masses_read_their_last_fields(self):
        lib = self.lib
        problem = dict(q=ADDRESS, k=ADDRESS, num_tokens=100, num_q_heads=8, num_kv_heads=2, head_dim=128, softmax_scale=0.1)
        maps = dict(problem, lse_ln=ADDRESS, average=ADDRESS, num_heads=8)
        self.refused(lib.block_mass, library.BlockMassArgs(**{**maps, "num_heads": 9}), "num_heads is 9")
        self.refused(lib.block_mass, library.BlockMassArgs(**{**maps, "average": ADDRESS + 2}), "average is not 4-byte")
        self.refused(lib.block_mass, library.BlockMassArgs(**{**maps, "lse_ln": None}), "lse_ln is null")
        self.refused(lib.block_mass, library.BlockMassArgs(**maps, heads=ADDRESS + 1), "heads is not 4-byte")
        self.refused(lib.block_mass, library.BlockMassArgs(**{**maps, "head_dim": 96}), "head_dim 96", NotImplementedError)
        self.refused(lib.block_mass, library.BlockMassArgs(**{**maps, "softmax_scale": 0}), "softmax_scale is 0")
        lib.block_mass(library.BlockMassArgs(**{**maps, "num_heads": 0}), 0)
        rows = dict(problem, positions=ADDRESS, mass=ADDRESS, num_rows=4)
        self.refused(lib.row_mass, library.RowMassArgs(**{**rows, "num_rows": 65537}), "num_rows is 65537")
        self.refused(lib.row_mass, library.RowMassArgs(**{**rows, "positions": None}), "positions")
        self.refused(lib.row_mass, library.RowMassArgs(**{**rows, "mass": ADDRESS + 1}), "mass is not 4-byte")
        held = dict(mass=ADDRESS, positions=ADDRESS, recall=ADDRESS, num_tokens=100, num_q_heads=8, num_rows=4)
        three = library.RecallOfRowsArgs(**held, lists=library.BlockLists(num_lists=3))
        self.refused(lib.recall_of_rows, three, "3 lists for 8")
        self.refused(lib.recall_of_rows, library.RecallOfRowsArgs(**{**held, "recall": None}), "recall is null")
        odd = library.BlockLists(2, ADDRESS, ADDRESS, ADDRESS + 2)
        self.refused(lib.recall_of_rows, library.RecallOfRowsArgs(**held, lists=odd), "blocks is not 4-byte")

    def test_mean_table_rows(self):
        self.assertEqual(self.lib.mean_table_rows(8193), 72 + 16)
        self.assertEqual(self.lib.mean_table_coarse_row(8193), 72)

    def test_an_older_caller_gets_zeros_and_a_newer_one_is_refused(self):
        older = attention()
        older.struct_size = library.AttentionArgs.lists.offset
        self.assertGreater(self.lib.attention_workspace_bytes(older), 0)
        none = attention()
        none.struct_size = 0
        with self.assertRaisesRegex(ValueError, "argument structure"):
            self.lib.attention(none, ADDRESS, 1 << 20, 0)

        class Newer(ctypes.Structure):
            _fields_ = [("known", library.AttentionArgs), ("unknown", ctypes.c_int64)]

        newer = Newer(known=attention(), unknown=1)
        newer.known.struct_size = ctypes.sizeof(Newer)
        with self.assertRaisesRegex(ValueError, "later version"):
            self.lib.attention(newer, ADDRESS, 1 << 20, 0)


if __name__ == "__main__":
    try:
        library.load()
    except OSError as error:
        print(f"skipped: {error}")
        sys.exit(77)
    unittest.main()
