"""Tests of prefill_parity and its driver on a golden model, the CPU's bf16 standing for a device's."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "model" / "golden" / "qwen3_d64"
PROGRAM = os.environ.get("PREFILL_PARITY", "")
DRIVER = ROOT / "tools" / "prefill_parity.py"


class PrefillParityTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        done = self.run_words(sys.executable, DRIVER, "prompts", GOLDEN, "--output", self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.tokens = self.folder / "qwen3_d64-golden.tokens"

    def run_words(self, *words):
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=100)

    def parity(self, *flags):
        return self.run_words(PROGRAM, "--device=cpu", "--linear=bf16", f"--model={GOLDEN}", *flags)

    def test_prompts_are_the_golden_ones(self):
        self.assertEqual(len(self.tokens.read_text().split()), 167)

    def test_bf16_is_near_f32_but_not_equal(self):
        done = self.parity(f"--tokens={self.tokens}", f"--logits={self.folder}/logits")
        self.assertEqual(done.returncode, 0, done.stderr)
        row = json.loads(done.stdout)
        self.assertEqual(len(row["k_errors"]), 2)
        self.assertEqual(len(row["v_errors"]), 2)
        self.assertEqual(max(row["k_errors"] + row["v_errors"]), row["kv_error"])
        self.assertGreater(row["kv_error"], 1e-4)
        self.assertLess(row["kv_error"], 2e-2)
        for name in ("device", "reference"):
            self.assertEqual((self.folder / f"logits.{name}.f32").stat().st_size, 4 * 256)

    def test_a_difference_over_the_tolerance_is_status_1(self):
        done = self.parity(f"--tokens={self.tokens}", "--tolerance=1e-5")
        self.assertEqual(done.returncode, 1)
        self.assertFalse(json.loads(done.stdout)["ok"])

    def test_wrong_input_is_named(self):
        tokens = self.folder / "wrong"
        tokens.write_text("1 256")
        done = self.parity(f"--tokens={tokens}")
        self.assertEqual(done.returncode, 2)
        self.assertIn("token id 256 is not below the vocabulary's 256", done.stderr)
        self.assertEqual(self.parity("--tokens=/nonexistent").returncode, 2)
        done = self.parity(f"--tokens={self.tokens}", "--gpus=2")
        self.assertEqual(done.returncode, 2)
        self.assertIn("--gpus=2 with --device=cpu", done.stderr)

    def test_several_gpus_are_tried_in_every_way(self):
        spec = importlib.util.spec_from_file_location("prefill_parity", DRIVER)
        driver = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(driver)
        self.assertEqual(driver.sharings(1), [[]])
        ways = driver.sharings(2)
        self.assertEqual(len(set(map(tuple, ways))), 6)
        self.assertIn(["--gpus=2", "--partition=striped", "--strategy=ring"], ways)

    def test_the_driver_tells_near_from_far(self):
        words = [sys.executable, DRIVER, "run", GOLDEN, "--tokens", self.folder, "--device=cpu", "--program", PROGRAM]
        near = self.run_words(*words, "--tolerance=0.05", "--logits_tolerance=0.05")
        self.assertEqual(near.returncode, 0, near.stdout + near.stderr)
        self.assertIn("all within their tolerances", near.stdout)
        self.assertIn("qwen3_d64-golden: 167 tokens", near.stdout)
        nothing = self.run_words(sys.executable, DRIVER, "run", ROOT, "--tokens", self.folder, "--program", PROGRAM)
        self.assertEqual(nothing.returncode, 1)
        self.assertIn("'prompts' writes them", nothing.stderr)


if __name__ == "__main__":
    if not PROGRAM:
        print("SKIPPED: PREFILL_PARITY names no program")
        sys.exit(77)
    unittest.main()
