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
