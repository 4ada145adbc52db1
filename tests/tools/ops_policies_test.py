"""The policies' part of the C interface through headwater.ops.library: structures and refusals. Needs no GPU and no torch."""

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


def config(name="headwater", parameters=None, **changes):
    parameters = parameters or {}
    keys = (ctypes.c_char_p * max(1, len(parameters)))(*(key.encode() for key in parameters))
    values = (ctypes.c_double * max(1, len(parameters)))(*parameters.values())
    made = library.PolicyConfig(**{**dict(
        name=name.encode(), keys=ctypes.cast(keys, ctypes.c_void_p), values=ctypes.cast(values, ctypes.c_void_p),
        num_parameters=len(parameters), num_layers=4, num_q_heads=8, num_kv_heads=2, head_dim=128, softmax_scale=0.1),
        **changes})
    made.owned = (keys, values)
    return made


def array(kind, *values):
    return (kind * len(values))(*values)


class PolicyTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.lib = library.load()

    def made(self, *args, **changes):
        handle = self.lib.policy_create(config(*args, **changes))
        self.addCleanup(self.lib.policy_destroy, handle)
        return handle

    def refused(self, says, *args, error=ValueError, **changes):
        with self.subTest(says), self.assertRaisesRegex(error, says):
            self.lib.policy_create(config(*args, **changes))

    def test_every_policy_can_be_made(self):
        for name in ("dense", "a_shape", "headwater", "probe", "flash", "flash2", "flex", "share", "skeleton",
                     "vertical_slash", "xattention"):
            with self.subTest(name):
                handle = self.made(name)
                wanted = self.lib.policy_memory_bytes(handle, 100000)
                self.assertEqual(wanted > 0, name != "dense")
                self.assertGreater(self.lib.policy_workspace_bytes(handle, 100000), 0)
                # Short prompts are dense.
                self.assertEqual(self.lib.policy_memory_bytes(handle, 1000), 0)

    def test_refuses_by_name_and_value(self):
        self.refused("policy \"sparse\" is not one of dense, a_shape", "sparse")
        self.refused("alpha 2 is not from 0 to 1", "flash", {"alpha": 2})
        self.refused("has no parameter \"beta\"", "flash", {"beta": 2})
        self.refused("name or parameters are null", "flash", num_parameters=1, keys=None)
        self.refused("head_dim 96", "flash", head_dim=96, error=NotImplementedError)
        self.refused("7 query heads are not a multiple", "flex", num_q_heads=7)
        self.refused("softmax_scale is -1", "flex", softmax_scale=-1)
        self.refused("num_layers is 0", "flex", num_layers=0)

    def test_tables_are_read_where_the_header_has_them(self):
        frequencies = array(ctypes.c_double, *[0.1] * 64)
        self.refused("rope_frequencies are for policy skeleton", "flex",
                     rope_frequencies=ctypes.cast(frequencies, ctypes.c_void_p))
        self.made("skeleton", rope_frequencies=ctypes.cast(frequencies, ctypes.c_void_p))
        heads = (library.HeadCluster * 1)(library.HeadCluster(4, 0, 1))
        self.refused("cluster 1 of head 0 in layer 4", "share", clusters=ctypes.cast(heads, ctypes.c_void_p), num_clusters=1)
        thresholds, windows = array(ctypes.c_float, 0.1, 0.2, 0.3), array(ctypes.c_int32, *[4] * 8)
        self.refused("3 thresholds or windows; 8", thresholds=ctypes.cast(thresholds, ctypes.c_void_p), num_thresholds=3)
        self.refused("thresholds and windows are for policy headwater", "probe",
                     windows=ctypes.cast(windows, ctypes.c_void_p), num_windows=8)
        self.refused("thresholds: a count of 8 and no array", num_thresholds=8)
        self.refused("windows: a count of -1", windows=ctypes.cast(windows, ctypes.c_void_p), num_windows=-1)
        negative = array(ctypes.c_float, *[-1.0] * 8)
        self.refused("threshold 0 is -1", thresholds=ctypes.cast(negative, ctypes.c_void_p), num_thresholds=8)
        self.made(windows=ctypes.cast(windows, ctypes.c_void_p), num_windows=8)

    def test_a_prompt_must_begin(self):
        handle = self.made("flash")
        with self.assertRaisesRegex(ValueError, "no prompt has begun"):
            self.lib.policy_attention(handle, 0, *[ADDRESS] * 4, 0, ADDRESS, 1, 0)
        with self.assertRaisesRegex(ValueError, "has 1 bytes"):
            self.lib.policy_begin(handle, 100000, ADDRESS, 1, 0)
        with self.assertRaisesRegex(ValueError, "num_tokens is 0"):
            self.lib.policy_begin(handle, 0, ADDRESS, 1, 0)
        self.assertEqual(self.lib.policy_memory_bytes(handle, 0), 0)
        self.lib.policy_destroy(None)

    def test_a_selection_of_another_size_is_refused_before_anything_runs(self):
        handle = self.made("dense")
        self.lib.policy_begin(handle, 100, None, 0, 0)
        found = library.Selection()
        found.struct_size = 8
        status = self.lib._lib.hw_policy_attention(ctypes.c_void_p(handle), 0, *[ctypes.c_void_p(ADDRESS)] * 6, ctypes.c_size_t(1),
                                                   None, ctypes.byref(found))
        self.assertEqual(status, 3)
        self.assertIn("argument structure", self.lib._lib.hw_last_error().decode())

    def test_share_wants_lse_where_a_cluster_is_shared(self):
        heads, shared = (library.HeadCluster * 2)(library.HeadCluster(0, 0, 3), library.HeadCluster(1, 2, 3)), array(ctypes.c_int32, 3)
        clusters = dict(clusters=ctypes.cast(heads, ctypes.c_void_p), num_clusters=2)
        self.assertFalse(self.lib.policy_wants_lse(self.made("flex")))
        self.assertFalse(self.lib.policy_wants_lse(self.made("share", **clusters)))
        self.assertTrue(self.lib.policy_wants_lse(self.made(
            "share", **clusters, shared_clusters=ctypes.cast(shared, ctypes.c_void_p), num_shared_clusters=1)))


if __name__ == "__main__":
    try:
        library.load()
    except OSError as error:
        print(f"skipped: {error}")
        sys.exit(77)
    unittest.main()
