"""Tests of prefill_parity and its driver on a golden model: the CPU's bf16 stands for a device's, its ranks for GPUs."""

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

    def test_ranks_that_share_a_gpu_need_one(self):
        done = self.parity(f"--tokens={self.tokens}", "--ranks=2", "--share_gpu")
        self.assertEqual(done.returncode, 2)
        self.assertIn("--share_gpu", done.stderr)

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
        for flag, wanted in (("--linear=fp8", "a CPU computes in bf16 or f32"), ("--linear=f32", "no other prefill to compare"),
                             ("--policy=probe", "its block lists are made on GPUs"), ("--ranks=65", "--ranks: over 64")):
            done = self.parity(f"--tokens={self.tokens}", flag)
            self.assertEqual(done.returncode, 2)
            self.assertIn(wanted, done.stderr)

    def shared(self, *flags):
        """Rows of two ranks, and of eight with a block of tokens each; the last block is short."""
        tokens = self.folder / "long"
        tokens.write_text(" ".join(str(i * i // 7 % 256) for i in range(7 * 256 + 100)))
        done = self.parity(f"--tokens={tokens}", "--linear=f32", "--ranks=2,8", *flags)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        ways = [(ranks, partition, strategy) for ranks in (2, 8) for partition in ("contiguous", "zigzag", "striped")
                for strategy in ("allgather", "sparse", "ring")]
        self.assertEqual([(row["ranks"], row["partition"], row["strategy"]) for row in rows], ways)
        for row in rows:
            self.assertEqual(row["reference"], "one rank")
            self.assertLess(row["kv_error"], 1e-5)
            self.assertGreater(row["exchange_bytes"], 0)
        return {way: row for way, row in zip(ways, rows, strict=True)}

    def test_ranks_of_a_cpu_agree_with_one(self):
        rows = self.shared()
        # Their sums are in another order.
        self.assertGreater(max(row["kv_error"] for row in rows.values()), 0)
        for (ranks, partition, strategy), row in rows.items():
            self.assertEqual(row["density"], 1)
            if strategy == "sparse":
                self.assertTrue(row["equals_allgather"])
                # Keys behind a rank's last query stay where they are.
                self.assertLessEqual(row["exchange_bytes"], rows[ranks, partition, "allgather"]["exchange_bytes"])

    def test_one_partition_alone(self):
        done = self.parity(f"--tokens={self.tokens}", "--linear=f32", "--ranks=2", "--partition=striped")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([json.loads(line)["partition"] for line in done.stdout.splitlines()], 3 * ["striped"])

    def test_ranks_of_a_cpu_agree_where_attention_is_sparse(self):
        rows = self.shared("--policy=a_shape", "--policy_parameters=sink_tokens=128,window_tokens=200")
        for (ranks, partition, strategy), row in rows.items():
            self.assertLess(row["density"], 0.5)
            if strategy == "sparse":
                self.assertTrue(row["equals_allgather"])
                self.assertLess(row["exchange_bytes"], rows[ranks, partition, "allgather"]["exchange_bytes"])

    def test_the_driver_judges_every_row(self):
        row = {"model": "m", "tokens": 167, "device": "GPU", "linear": "bf16", "policy": "dense", "ranks": 1,
               "reference": "CPU, f32", "k_errors": [1e-3], "v_errors": [1e-3], "kv_error": 1e-3, "logits_error": 1e-3, "top": 1, "reference_top": 1, "tolerance": 1, "ok": True}
        shared = {**row, "ranks": 2, "partition": "striped", "strategy": "ring", "reference": "one rank"}

        def drive(status, *rows):
            program = self.folder / "program"
            program.write_text("#!/bin/sh\ncat <<'E'\n" + "\n".join(map(json.dumps, rows)) + f"\nE\nexit {status}\n")
            program.chmod(0o755)
            return self.run_words(sys.executable, "-S", DRIVER, "run", GOLDEN, "--tokens", self.folder, "--program", program,
                                  "--ranks=2", "--output", self.folder / "rows.jsonl")

        near = drive(0, row, shared)
        self.assertEqual(near.returncode, 0, near.stdout + near.stderr)
        self.assertIn("2 ranks, striped, ring", near.stdout)
        rows = [json.loads(line) for line in (self.folder / "rows.jsonl").read_text().splitlines()]
        self.assertEqual([made["params"]["ranks"] for made in rows], [1, 2])
        self.assertEqual(rows[1]["params"]["partition"], "striped")
        self.assertEqual(rows[1]["metrics"]["k_error"], 1e-3)
        far = drive(1, row, {**shared, "ok": False})
        self.assertEqual(far.returncode, 1)
        self.assertIn("too far, or not run: qwen3_d64-golden", far.stdout)
        for status, rows in ((1, (row, shared)), (2, ()), (0, ())):
            done = drive(status, *rows)
            self.assertEqual(done.returncode, 1)
            self.assertIn(f"ended with status {status}", done.stdout)

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
